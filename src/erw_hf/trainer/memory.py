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
"""What a step takes of a GPU's memory, worked out from its configuration; `benchmarks/block_cost.py` counts a block."""

import math

from diffusers import ModelMixin

from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.ema import ema_profiles
from erw_hf.trainer.run_record import split_names


GIB = 2**30
# By ten times the budget: of a block with GELU, and with SwiGLU.
KEPT_COMPILED = {
    10: (36, 38),
    9: (24, 27),
    8: (24, 27),
    7: (24, 23),
    6: (20, 23),
    5: (20, 17),
    4: (14, 12),
    3: (10, 10),
}
# The same of layers whose weights are frozen: no inputs are kept for their gradients.
KEPT_LORA = {10: (26.5, 31), 7: (20.5, 25), 5: (10.5, 12.5)}
REST = 10  # bytes for each token and channel outside the blocks, as counted
# Four tensors of the 128 channels that Stable Diffusion's autoencoder has at the images' own size, in float32.
BYTES_OF_PIXEL = 4 * 128 * 4
CONTEXT = 0.8 * GIB  # CUDA's own, cuBLAS's and cuDNN's workspaces: an assumption, not measured


def step_memory(
    config: TrainingConfig,
    parameters: int,
    trained: int,
    frozen: int,
    vae: ModelMixin | None,
    image_size: int,
    under: int = 0,
) -> dict[str, float]:
    """
    Bytes of one GPU in a step of full training in bf16 (in float32 for `mixed_precision` `"no"`), without sharding.

    Args:
        config ([`TrainingConfig`]): The run.
        parameters (`int`): Of the transformer; beside an adapter those that are trained.
        trained (`int`): Parameters that are trained: the transformer's and the projectors'.
        frozen (`int`): Parameters of the encoders.
        vae (a diffusers autoencoder, *optional*): What a step encodes images with; on the meta device.
        image_size (`int`): Side of those images, in pixels.
        under (`int`, *optional*, defaults to 0): Parameters under an adapter, which are not trained.

    Returns:
        `dict[str, float]`: `state` (weights, gradients in DDP's buckets, AdamW's moments, averages, all float32), `copies` (the
        weights in bf16), `frozen` (encoders and autoencoder), `activations`, of the largest forward, and `context`.
    """
    size = 4 if config.mixed_precision == "no" else 2
    encoding = 0.0
    if vae is not None:
        frozen += 2 * sum(p.numel() for p in vae.parameters())  # float32, where encoders are in bf16
        encoding = config.train_batch_size * image_size**2 * BYTES_OF_PIXEL
    return {
        "state": 4.0 * (4 * trained + len(ema_profiles(config)) * parameters + under),
        "copies": 2.0 * (trained + under) if size == 2 else 0.0,
        "frozen": float(size * frozen),
        # Images are encoded before the model keeps anything.
        "activations": max(size / 2 * activation_bytes(config), encoding),
        "context": CONTEXT,
    }


def activation_bytes(config: TrainingConfig) -> float:
    """Bytes that the blocks keep for the backward pass of one forward in bf16, and one block's while it goes back."""
    width = config.num_attention_heads * config.attention_head_dim
    numbers = config.train_batch_size * (config.token_grid**2 + (config.class_token_weight > 0)) * width
    block = kept_by_block(config)
    if config.gradient_checkpointing:
        return numbers * (2 * config.num_layers + block + REST)
    return numbers * block * (config.num_layers + 1)


def kept_by_block(config: TrainingConfig) -> float:
    """Bytes per token and channel, as `benchmarks/block_cost.py` counts them: eager, compiled, or compiled with
    `activation_memory_budget`; torch stays a little below it."""
    qk_norm, swiglu = config.qk_norm != "none", config.activation_fn == "swiglu"
    wide = any("ff.net.2".endswith(target) for target in split_names(config.lora_targets))  # its input has four widths
    if config.torch_compile == "no" and config.lora_rank > 0:
        return 44.0 + 8 * (qk_norm + (config.norm_type == "rms_norm") + wide)
    if config.torch_compile == "no":
        return 52.0 + 16 * qk_norm + 8 * (config.norm_type == "rms_norm") + 5 * swiglu
    # torch chooses among few ways to keep less, so between two tenths the count is that of the higher one.
    tenth = max(3, math.ceil(round(10 * config.activation_memory_budget, 6)))
    if config.lora_rank > 0:
        kept = KEPT_LORA[min(key for key in KEPT_LORA if key >= tenth)][swiglu]
        return kept * (1.15 if qk_norm else 1.0) + 8 * (wide and tenth > 5)
    return KEPT_COMPILED[tenth][swiglu] * (1.1 if qk_norm else 1.0)
