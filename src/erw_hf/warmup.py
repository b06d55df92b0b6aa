# Copyright 2026 The ERW-HF authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The early model of phase 1, and its hand-over to the full one (ERW, arXiv 2504.10188, §3.3)."""

from collections.abc import Mapping
from typing import Any

import torch

from erw_hf.objective import AlignedTransformer
from erw_hf.transformer_erw import ERWTransformer2DModel


_FINAL_LAYER = ("transformer.norm_out.", "transformer.proj_out.", "transformer.class_token_out.")
_EMBEDDERS = ("transformer.pos_embed.", "transformer.time_class_embed.", "transformer.class_token_embed.")


def build_warmup_transformer(model_config: Mapping[str, Any], warmup_depth: int) -> ERWTransformer2DModel:
    """
    The model of phase 1: the embedders and the first blocks of the full model, and nothing else.

    Args:
        model_config (`Mapping[str, Any]`): Configuration of the full [`ERWTransformer2DModel`].
        warmup_depth (`int`): Number of blocks.

    Returns:
        [`ERWTransformer2DModel`]: A model of `warmup_depth` blocks whose final layer is frozen.

    Raises:
        ValueError: if the full model has not that many blocks.
    """
    num_layers = model_config["num_layers"]
    if not 1 <= warmup_depth <= num_layers:
        raise ValueError(f"warmup_depth={warmup_depth} must lie in [1, num_layers={num_layers}]")
    transformer = ERWTransformer2DModel(**{**model_config, "num_layers": warmup_depth})
    transformer.norm_out.requires_grad_(False)
    transformer.proj_out.requires_grad_(False)
    if transformer.class_token_out is not None:
        transformer.class_token_out.requires_grad_(False)
    return transformer


def check_hand_over(
    warmup_state: Mapping[str, torch.Tensor], model: AlignedTransformer, with_projectors: bool = True
) -> dict[str, torch.Tensor]:
    """
    What a warmup would hand over to a full model, found to fit it. The model may lie on the meta device.

    Args:
        warmup_state (`Mapping[str, torch.Tensor]`): State dict of the warmed-up [`AlignedTransformer`].
        model ([`AlignedTransformer`]): The full model.
        with_projectors (`bool`, *optional*, defaults to `True`):
            Hand the projectors over too, if the full model has any.

    Returns:
        `dict[str, torch.Tensor]`: The tensors to hand over, by name.

    Raises:
        ValueError: if the full model has not a tensor of the name and shape of each one.
    """
    with_projectors = with_projectors and len(model.projectors) > 0
    tensors = {
        name: tensor
        for name, tensor in warmup_state.items()
        if not name.startswith(_FINAL_LAYER) and (with_projectors or not name.startswith("projectors."))
    }
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own:
            raise ValueError(f"hand-over: the full model has no tensor {name}")
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"hand-over: {name} is {tuple(tensor.shape)} in the warmup and {tuple(own[name].shape)} in the full "
                "model"
            )
    embedders = {name for name in own if name.startswith(_EMBEDDERS)}
    missing = sorted(embedders - set(tensors))
    if missing or not any(name.startswith("transformer.transformer_blocks.0.") for name in tensors):
        raise ValueError(f"hand-over: the warmup lacks {missing or 'the first transformer block'}")
    if with_projectors and not any(name.startswith("projectors.") for name in tensors):
        raise ValueError("hand-over: the warmup holds no projector; set hand_over_projector to false for a fresh one")
    return tensors


@torch.no_grad()
def hand_over(
    warmup_state: Mapping[str, torch.Tensor], model: AlignedTransformer, with_projectors: bool = True
) -> list[str]:
    """
    Makes the warmed-up weights the early layers of the full model, and verifies that they are.

    Args:
        warmup_state (`Mapping[str, torch.Tensor]`): State dict of the warmed-up [`AlignedTransformer`].
        model ([`AlignedTransformer`]): The full model, freshly initialised. Its later blocks stay as they are.
        with_projectors (`bool`, *optional*, defaults to `True`):
            Hand the projectors over too, if the full model has any.

    Returns:
        `list[str]`: Names of the tensors handed over.

    Raises:
        ValueError: if the warmup does not fit the full model; see [`check_hand_over`].
        RuntimeError: if a tensor of the full model differs afterwards.
    """
    tensors = check_hand_over(warmup_state, model, with_projectors)
    model.load_state_dict(tensors, strict=False)
    own = model.state_dict()
    differing = [
        name
        for name, tensor in tensors.items()
        if not torch.equal(own[name], tensor.to(own[name].device, own[name].dtype))
    ]
    if differing:
        raise RuntimeError(f"hand-over: {len(differing)} tensors differ afterwards, the first is {differing[0]}")
    return list(tensors)
