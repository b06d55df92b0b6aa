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
"""The two phases of ERW and the hand-over between them (arXiv 2504.10188, §3.3)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from erw_hf.alignment import AlignedTransformer, cosine_alignment_loss
from erw_hf.flow import interpolate
from erw_hf.transformer_erw import ERWTransformer2DModel


# A function of projected and target tokens, both (B, N, D), that gives one value a sample, (B,).
AlignmentLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# The warmup model has a final layer only because it is an ordinary ERWTransformer2DModel. It is not trained and not
# handed over.
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


@dataclass
class TrainingBatch:
    """
    What a step of either phase is made of. Every random draw is in it, so that the losses are functions.

    Args:
        x0 (`torch.Tensor` of shape `(B, C, H, W)`): Clean latents.
        class_labels (`torch.LongTensor` of shape `(B,)`, *optional*): Class ids.
        drop (`torch.Tensor` of shape `(B,)`): Non-zero where the label is dropped.
        targets (`Sequence[torch.Tensor]` of shape `(B, N, D)`, *optional*):
            Each encoder's tokens of the clean images; `None` in a step that does not align.
        noise (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): Standard normal noise; `None` for clean inputs.
        t (`torch.Tensor` of shape `(B,)`, *optional*): Flow time in [0, 1], of the noise.
        class_token (`torch.Tensor` of shape `(B, E)`, *optional*): The first encoder's class token, for a model with one.
        class_noise (`torch.Tensor` of shape `(B, E)`, *optional*): Standard normal noise, for the class token.
    """

    x0: torch.Tensor
    class_labels: torch.Tensor | None
    drop: torch.Tensor
    targets: Sequence[torch.Tensor] | None
    noise: torch.Tensor | None = None
    t: torch.Tensor | None = None
    class_token: torch.Tensor | None = None
    class_noise: torch.Tensor | None = None


def warmup_loss(
    model: AlignedTransformer,
    batch: TrainingBatch,
    alignment_loss: AlignmentLoss = cosine_alignment_loss,
    path_type: str = "linear",
) -> dict[str, torch.Tensor]:
    """
    Phase 1 (ERW, Eq. 13): align the early blocks' tokens of the clean latent, at t = 0, with the encoder's tokens.

    With noise in the batch it is the noised latent's tokens instead, the control that the paper does not have.

    Args:
        model ([`AlignedTransformer`]): In warmup mode.
        batch ([`TrainingBatch`]): With targets.
        alignment_loss (`Callable`, *optional*, defaults to [`~alignment.cosine_alignment_loss`]): The loss of a sample.
        path_type (`str`, *optional*, defaults to `"linear"`): See [`~flow.path_coefficients`].

    Returns:
        `dict[str, torch.Tensor]`: scalars `loss` and `alignment`, which are equal here.
    """
    x_t, t, class_token = batch.x0, batch.x0.new_zeros(len(batch.x0), dtype=torch.float32), batch.class_token
    if batch.noise is not None:
        (x_t, _), (class_token, _) = _interpolate(batch, path_type)
        t = batch.t  # type: ignore[assignment]  # comes with the noise
    _, projected, _ = model(x_t, t, batch.class_labels, batch.drop, class_token)
    alignment = _mean_alignment(alignment_loss, projected, batch)
    return {"loss": alignment, "alignment": alignment}


def full_loss(
    model: AlignedTransformer,
    batch: TrainingBatch,
    weight: float,
    path_type: str = "linear",
    alignment_loss: AlignmentLoss = cosine_alignment_loss,
    contrastive_weight: float = 0.0,
    class_token_weight: float = 0.0,
) -> dict[str, torch.Tensor]:
    """
    Phase 2 (ERW, Eq. 5 and 14): velocity matching plus lambda times the alignment of the noised latent's tokens.

    Args:
        model ([`AlignedTransformer`]): The full model.
        batch ([`TrainingBatch`]): With noise. A class token is noised with the same t (REG, arXiv 2507.01467).
        weight (`float`): lambda.
        path_type (`str`, *optional*, defaults to `"linear"`): See [`~flow.path_coefficients`].
        alignment_loss (`Callable`, *optional*, defaults to [`~alignment.cosine_alignment_loss`]): The loss of a sample.
        contrastive_weight (`float`, *optional*, defaults to 0.0):
            Weight of contrastive flow matching (arXiv 2506.05350, Eq. 5): the prediction is pushed away from the velocity
            of another sample, here the one before it in the batch.
        class_token_weight (`float`, *optional*, defaults to 0.0): Weight of the class token's velocity matching.

    Returns:
        `dict[str, torch.Tensor]`: scalars `loss`, `velocity`, with a weight `contrastive` (the mean squared distance to
        the other velocity), with a class token `class_token` (the squared error of its velocity), and with targets
        `alignment`.
    """
    (x_t, velocity), (class_token, class_velocity) = _interpolate(batch, path_type)
    predicted, projected, predicted_class = model(x_t, batch.t, batch.class_labels, batch.drop, class_token)
    velocity_loss = (predicted.float() - velocity).square().mean()
    losses = {"loss": velocity_loss, "velocity": velocity_loss}
    if contrastive_weight > 0:
        losses["contrastive"] = (predicted.float() - velocity.roll(1, dims=0)).square().mean()
        losses["loss"] = losses["loss"] - contrastive_weight * losses["contrastive"]
    if class_token is not None:
        losses["class_token"] = (predicted_class.float() - class_velocity).square().mean()
        losses["loss"] = losses["loss"] + class_token_weight * losses["class_token"]
    if batch.targets is not None:
        losses["alignment"] = _mean_alignment(alignment_loss, projected, batch)
        losses["loss"] = losses["loss"] + weight * losses["alignment"]
    else:
        # Projectors that rest (lambda = 0) stay in the graph: DistributedDataParallel waits for every gradient.
        losses["loss"] = losses["loss"] + sum(0 * tokens.sum() for tokens in projected)
    return losses


def _interpolate(batch: TrainingBatch, path_type: str) -> tuple[Any, Any]:
    """x_t and its velocity, of the latents and of the class token (`None`, `None` without one)."""
    noised = interpolate(batch.x0, batch.noise, batch.t, path_type)  # type: ignore[arg-type]
    if batch.class_token is None:
        return noised, (None, None)
    return noised, interpolate(batch.class_token, batch.class_noise, batch.t, path_type)  # type: ignore[arg-type]


def _mean_alignment(
    alignment_loss: AlignmentLoss, projected: Sequence[torch.Tensor], batch: TrainingBatch
) -> torch.Tensor:
    targets = list(batch.targets or ())
    # The model says by its output whether its first projector took the class token too (see AlignedTransformer).
    if batch.class_token is not None and projected[0].shape[1] > targets[0].shape[1]:
        targets[0] = torch.cat([batch.class_token.unsqueeze(1), targets[0]], dim=1)
    losses = [alignment_loss(ours, theirs).mean() for ours, theirs in zip(projected, targets, strict=True)]
    return torch.stack(losses).mean()


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
