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
"""From a configuration to the modules that the two phases train."""

from collections.abc import Sequence

import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from erw_hf.alignment import AlignedTransformer, ConvProjector, MLPProjector
from erw_hf.encoders import RepresentationEncoder
from erw_hf.trainer.config import TrainingConfig
from erw_hf.transformer_erw import ERWTransformer2DModel
from erw_hf.warmup import build_warmup_transformer


Encoders = Sequence[RepresentationEncoder]


def build_warmup_model(config: TrainingConfig, num_classes: int, encoders: Encoders) -> AlignedTransformer:
    """
    Args:
        config ([`TrainingConfig`]): The run.
        num_classes (`int`): Number of classes of the data.
        encoders (`Sequence[RepresentationEncoder]`): The encoders to align with.

    Returns:
        [`AlignedTransformer`]: The model of phase 1.
    """
    model_config = config.model_config(num_classes, class_token_dim(config, encoders))
    transformer = build_warmup_transformer(model_config, config.warmup_depth)
    return AlignedTransformer(transformer, _projectors(config, encoders), config.warmup_depth, warmup=True)


def build_full_model(config: TrainingConfig, num_classes: int, encoders: Encoders) -> AlignedTransformer:
    """
    Args:
        config ([`TrainingConfig`]): The run.
        num_classes (`int`): Number of classes of the data.
        encoders (`Sequence[RepresentationEncoder]`): The encoders to align with; may be empty.

    Returns:
        [`AlignedTransformer`]: The model of phase 2, without projectors where nothing is aligned.
    """
    transformer = ERWTransformer2DModel(**config.model_config(num_classes, class_token_dim(config, encoders)))
    projectors = _projectors(config, encoders) if config.alignment_weight > 0 else []
    return AlignedTransformer(transformer, projectors, config.projector_depth)


def compile_blocks(transformer: ERWTransformer2DModel, device_type: str) -> None:
    """
    Compiles the blocks in place; one compilation serves them all.

    Args:
        transformer ([`ERWTransformer2DModel`]): The model.
        device_type (`str`): Where it is to run: `"cuda"`, `"cpu"` ...
    """
    # Without this Inductor's tanh, of GELU, takes a CPU three times as long as its exponential does.
    options = {"cpp.use_decompose_tanh": True} if device_type == "cpu" else None
    transformer.compile_repeated_blocks(fullgraph=True, options=options)


def choose_attention(transformer: ERWTransformer2DModel, device_type: str, mixed_precision: str) -> None:
    """
    Lets a CPU in bf16 multiply the matrices of a short attention one by one. torch's fused kernel takes ten times as long there to go
    back through 16 patch tokens, twice as long through 64, and a third of the time through 256 (Xeon with AMX, torch 2.14).

    Args:
        transformer ([`ERWTransformer2DModel`]): The model that is trained, changed in place; what samples keeps its kernel.
        device_type (`str`): Where it is to run: `"cuda"`, `"cpu"` ...
        mixed_precision (`str`): `"no"`, `"fp16"` or `"bf16"`.
    """
    tokens = (transformer.config.sample_size // transformer.config.patch_size) ** 2
    if device_type == "cpu" and mixed_precision == "bf16" and tokens <= 64:
        for processor in transformer.attn_processors.values():
            # Not `set_attention_backend`, which changes all other models of the process too.
            processor._attention_backend = AttentionBackendName._NATIVE_MATH


def class_token_dim(config: TrainingConfig, encoders: Encoders) -> int | None:
    """
    Args:
        config ([`TrainingConfig`]): The run.
        encoders (`Sequence[RepresentationEncoder]`): Its encoders.

    Returns:
        `int`, *optional*: Width of the first encoder's class token, `None` for a run without one.

    Raises:
        ValueError: if that encoder has none.
    """
    return encoders[0].class_token_dim if config.class_token_weight > 0 else None


def encoders_of_step(config: TrainingConfig, encoders: Encoders, aligned: bool) -> list[RepresentationEncoder]:
    """
    Args:
        config ([`TrainingConfig`]): The run.
        encoders (`Sequence[RepresentationEncoder]`): Its encoders.
        aligned (`bool`): Whether the step aligns: one of the warmup, or one with a lambda above 0.

    Returns:
        `list[RepresentationEncoder]`: The encoders that the step runs: all of them, or for a class token alone the first.
    """
    if aligned:
        return list(encoders)
    return list(encoders[:1]) if config.class_token_weight > 0 else []


def _projectors(config: TrainingConfig, encoders: Encoders) -> list[torch.nn.Module]:
    width = config.num_attention_heads * config.attention_head_dim
    if config.projector == "conv":
        return [ConvProjector(width, encoder.embed_dim) for encoder in encoders]
    return [MLPProjector(width, encoder.embed_dim, config.projector_dim) for encoder in encoders]
