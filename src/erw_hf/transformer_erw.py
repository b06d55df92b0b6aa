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
"""The transformer: predicts a velocity or a clean sample, always returns the velocity. It travels in Hub repos: imports absolute."""

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
    _skip_attention___ret___hidden_states,
)
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.hooks.tensor_parallel import PackedColwiseParallel
from diffusers.loaders import PeftAdapterMixin
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    PatchEmbed,
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_2d_sincos_pos_embed,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale, logging, set_weights_and_activate_adapters
from huggingface_hub import split_torch_state_dict_into_shards, upload_folder


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

# Where the division of `velocity_from_sample` stops: the last time but 0 of diffusers' grids of 1000, so that no sampler's
# step is shortened. A larger one, as JiT's 0.05, would leave noise in the picture: a step from 0.02 would go 40 % of the way.
MIN_TIME = 1e-3


@dataclass
class ERWTransformer2DModelOutput(BaseOutput):
    """Output of [`ERWTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(B, C, H, W)`):
            The predicted velocity dx_t/dt. `None` with `tokens_only=True`.
        hidden_states (`tuple[torch.Tensor, ...]`, *optional*):
            The tokens `(B, N, D)` after each block named in `hidden_states_depths`, in the order of that argument.
            `None` without depths.
        class_token (`torch.Tensor` of shape `(B, class_token_dim)`, *optional*):
            The predicted velocity of the class token. `None` for a model without one, and when `sample` is.
        class_hidden_states (`tuple[torch.Tensor, ...]`, *optional*):
            The class token `(B, D)` after the same blocks as `hidden_states`. `None` for a model without one.
    """

    sample: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    class_token: torch.Tensor | None = None
    class_hidden_states: tuple[torch.Tensor, ...] | None = None


class ERWAttnProcessor:
    """Self-attention through diffusers' attention dispatcher, so that each of its backends can be chosen."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "ERWAttention",
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        elif self._projects_once(attn, hidden_states):
            # One product in place of three; casting the weights copies them anyway.
            linears = (attn.to_q, attn.to_k, attn.to_v)
            weight, bias = torch.cat([part.weight for part in linears]), torch.cat([part.bias for part in linears])
            query, key, value = nn.functional.linear(hidden_states, weight, bias).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)

        # -1 heads, not `attn.heads`: under tensor parallelism each rank holds its share of them.
        query = query.unflatten(-1, (-1, attn.head_dim))  # (B, N, heads, head_dim)
        key = key.unflatten(-1, (-1, attn.head_dim))
        value = value.unflatten(-1, (-1, attn.head_dim))

        if attn.norm_q is not None:
            # Under autocast the norms return float32, and attention kernels refuse that together with a bf16 value.
            query, key = attn.norm_q(query).to(value.dtype), attn.norm_k(key).to(value.dtype)  # type: ignore[misc]
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

        attend = partial(dispatch_attention_fn, backend=self._attention_backend, parallel_config=self._parallel_config)
        if attn.training and value.device.type == "cpu" and value.dtype.itemsize == 2 and value.shape[1] <= 128:
            # At so few tokens the backward pass of torch's CPU kernel takes 2 to 10 times as long in bf16 as in float32.
            with torch.autocast("cpu", enabled=False):
                hidden_states = attend(query.float(), key.float(), value.float()).to(value.dtype)
        else:
            hidden_states = attend(query, key, value)
        return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2, 3)))  # (B, N, D)

    @staticmethod
    def _projects_once(attn: "ERWAttention", hidden_states: torch.Tensor) -> bool:
        """Training on a GPU, with torch's own layers: no LoRA, hooks, shards of heads or packed weights."""
        return (
            attn.training
            and hidden_states.is_cuda
            and all(
                type(part) is nn.Linear
                and type(part.weight) is nn.Parameter
                and "forward" not in part.__dict__  # diffusers' hooks replace it
                and not (part._forward_hooks or part._forward_pre_hooks)
                for part in (attn.to_q, attn.to_k, attn.to_v)
            )
        )


class ERWAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = ERWAttnProcessor
    _available_processors = [ERWAttnProcessor]
    # Of AttentionModuleMixin, and what its fusion makes.
    processor: Any
    set_processor: Any
    to_qkv: nn.Linear

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: str | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.use_bias = True  # read by the QKV fusion of AttentionModuleMixin
        self.is_cross_attention = False  # read by diffusers' layer-skip hook and guiders

        inner_dim = heads * head_dim
        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim), nn.Dropout(0.0)])
        eps = 1e-5 if qk_norm == "layer_norm" else 1e-6  # PyTorch's default in the published checkpoints
        self.norm_q = None if qk_norm is None else _norm(qk_norm, head_dim, affine=True, eps=eps)
        self.norm_k = None if qk_norm is None else _norm(qk_norm, head_dim, affine=True, eps=eps)
        self.set_processor(self._default_processor_cls())

    def forward(
        self, hidden_states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None, **kwargs
    ) -> torch.Tensor:
        # Guiders and user processors may take more arguments than ours.
        accepted = inspect.signature(self.processor.__call__).parameters
        kwargs = {name: value for name, value in kwargs.items() if name in accepted}
        return self.processor(self, hidden_states, image_rotary_emb=image_rotary_emb, **kwargs)


class ERWTransformerBlock(nn.Module):
    """A DiT block with adaLN-zero modulation (Peebles & Xie, arXiv 2212.09748, §3.2)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        mlp_ratio: float = 4.0,
        qk_norm: str | None = None,
        norm_type: str = "layer_norm",
        activation_fn: str = "gelu-approximate",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        # A gated feed-forward has three matrices instead of two: two thirds of the width keep the parameter count.
        inner_dim = int(dim * mlp_ratio * 2 / 3) if activation_fn == "swiglu" else int(dim * mlp_ratio)
        # RMSNorm has a weight, as in LightningDiT; LayerNorm does not, as in DiT and SiT.
        self.norm1 = _norm(norm_type, dim, affine=norm_type == "rms_norm", eps=norm_eps)
        self.attn = ERWAttention(dim, heads, head_dim, qk_norm)
        self.norm2 = _norm(norm_type, dim, affine=norm_type == "rms_norm", eps=norm_eps)
        self.ff = FeedForward(dim, inner_dim=inner_dim, activation_fn=activation_fn)
        # Tensor parallelism must split SwiGLU's two halves separately, or a rank would gate with another rank's values.
        self.ff.net[0].proj._tp_packed_col_blocks = [inner_dim] * (2 if activation_fn == "swiglu" else 1)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        # temb: (B, D), SiLU applied. Each chunk: (B, 1, D).
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.modulation(temb).unsqueeze(1).chunk(6, dim=-1)
        )
        modulated = self.norm1(hidden_states) * (1 + scale_msa) + shift_msa
        hidden_states = hidden_states + gate_msa * self.attn(modulated, image_rotary_emb=image_rotary_emb)
        modulated = self.norm2(hidden_states) * (1 + scale_mlp) + shift_mlp
        return hidden_states + gate_mlp * self.ff(modulated)  # (B, N, D)


class ERWTimeClassEmbedding(nn.Module):
    """Embeds flow time and class into one vector. Row `num_classes` of the class table is the null class."""

    def __init__(self, dim: int, num_classes: int, class_dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        # downscale_freq_shift=0 is what SiT, REPA and ERW use; diffusers' combined embedder hard-codes 1.
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, dim)
        self.class_embedder = nn.Embedding(num_classes + 1, dim)

    def forward(
        self,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        force_drop_ids: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if class_labels is None:
            class_labels = torch.full_like(timestep, self.num_classes, dtype=torch.long)
        if force_drop_ids is not None:
            class_labels = torch.where(force_drop_ids.bool(), self.num_classes, class_labels)
        elif self.training and self.class_dropout_prob > 0:
            # For other training loops: erw_hf's trainer passes a draw of its own, so that it resumes exactly.
            drop = torch.rand(class_labels.shape, device=class_labels.device) < self.class_dropout_prob
            class_labels = torch.where(drop, self.num_classes, class_labels)
        # The sinusoids need float32: bf16 would round t = 0.043 to 0.04297.
        temb = self.timestep_embedder(self.time_proj(timestep.float()).to(dtype))
        return nn.functional.silu(temb + self.class_embedder(class_labels).to(dtype))  # (B, D)


class ERWClassTokenEmbedding(nn.Module):
    """A noised class token as a token of the model (REG, arXiv 2507.01467)."""

    def __init__(self, class_token_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(class_token_dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)  # as in REG's code, whatever the norm of the blocks

    def forward(self, class_token: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.norm(self.proj(class_token)).to(dtype).unsqueeze(1)  # (B, 1, D)


class ERWRotaryPosEmbed(nn.Module):
    """2D rotary embedding: the first half of each head turns with the row, the second with the column, each times `scale`.
    A class token, which has no place in the grid, does not turn."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        head_dim: int,
        grid_size: int,
        with_class_token: bool = False,
        theta: float = 10000.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        axis = torch.arange(grid_size).float() * scale
        cos, sin = get_1d_rotary_pos_embed(head_dim // 2, axis, theta=theta, use_real=True)  # (grid, head_dim / 2)
        rows = torch.arange(grid_size).repeat_interleave(grid_size)
        columns = torch.arange(grid_size).repeat(grid_size)
        cos = torch.cat([cos[rows], cos[columns]], dim=-1)  # (N, head_dim)
        sin = torch.cat([sin[rows], sin[columns]], dim=-1)
        if with_class_token:
            cos = torch.cat([torch.ones(1, head_dim), cos])
            sin = torch.cat([torch.zeros(1, head_dim), sin])
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos.to(hidden_states.device), self.sin.to(hidden_states.device)


class ERWAdaLayerNormOut(nn.Module):
    """The final modulated norm. Shift comes before scale in the projection, as in the published SiT checkpoints."""

    def __init__(self, dim: int, norm_type: str, norm_eps: float) -> None:
        super().__init__()
        self.norm = _norm(norm_type, dim, affine=norm_type == "rms_norm", eps=norm_eps)
        self.modulation = nn.Linear(dim, 2 * dim)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(temb).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(hidden_states) * (1 + scale) + shift


def _norm(norm_type: str, dim: int, affine: bool, eps: float) -> nn.Module:
    if norm_type == "layer_norm":
        return nn.LayerNorm(dim, eps=eps, elementwise_affine=affine)
    if norm_type == "rms_norm":
        return nn.RMSNorm(dim, eps=eps, elementwise_affine=affine)
    raise ValueError(f'a norm must be "layer_norm" or "rms_norm", got {norm_type!r}')


def velocity_from_sample(x_t: torch.Tensor, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """
    The velocity of the linear path that leads from a predicted clean sample through x_t (JiT, arXiv 2511.13720, table 1):
    x_t = (1 - t) x_0 + t e and v = e - x_0 give v = (x_t - x_0) / t. A step of an ODE sampler from t to 0 then lands on the
    prediction.

    Args:
        x_t (`torch.Tensor` of shape `(B, ...)`): Points of the path.
        sample (`torch.Tensor` of shape `(B, ...)`): Predicted clean samples.
        t (`torch.Tensor` of shape `(B,)`): Flow time in [0, 1]; below `MIN_TIME` it counts as that.

    Returns:
        `torch.Tensor` of the shape and dtype of `sample`: The velocity, computed in float32: a difference of near numbers
        that is divided by a small one.
    """
    t = t.float().clamp(min=MIN_TIME).reshape(-1, *[1] * (sample.ndim - 1))
    return ((x_t.float() - sample.float()) / t).to(sample.dtype)


def _patch_embed(
    sample_size: int, patch_size: int, in_channels: int, dim: int, learned: bool, bottleneck_dim: int | None
) -> PatchEmbed:
    """Its table of positions is computed on the CPU, in float64, which not every device has; a learned one starts from it."""
    arguments = {"patch_size": patch_size, "in_channels": in_channels, "embed_dim": dim}
    embed = PatchEmbed(height=sample_size, width=sample_size, pos_embed_type=None, **arguments)
    if bottleneck_dim is not None:
        embed.proj = nn.Sequential(
            nn.Conv2d(in_channels, bottleneck_dim, kernel_size=patch_size, stride=patch_size, bias=False),
            nn.Conv2d(bottleneck_dim, dim, kernel_size=1),
        )
    del embed.pos_embed
    grid = sample_size // patch_size
    table = (
        get_2d_sincos_pos_embed(dim, grid, base_size=grid, device="cpu", output_type="pt").float().unsqueeze(0)
    )  # (1, N, D)
    table = table.to(torch.get_default_device())
    if learned:
        embed.pos_embed = nn.Parameter(table)
    else:
        embed.register_buffer("pos_embed", table, persistent=False)
    return embed


class ERWTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    r"""
    A class-conditional flow-matching transformer: the SiT architecture (arXiv 2401.08740) that REPA (arXiv 2410.06940)
    and ERW (arXiv 2504.10188) train, with the options that later work added.

    The model returns the velocity dx_t/dt of a path that runs from data (t = 0) to noise (t = 1), whatever its network
    predicts. It does not know losses, encoders or projectors; `forward` returns the tokens that those need.

    Published sizes (`num_layers`, `num_attention_heads`, `attention_head_dim`): S 12, 6, 64; B 12, 12, 64; L 24, 16,
    64; XL 28, 16, 72, each with `patch_size` 2, 4 or 8. The defaults are XL/2 for 256 px images in SD-VAE latents.

    Args:
        sample_size (`int`, defaults to 32): Height and width of the latent (32 for 256 px, 64 for 512 px images).
        patch_size (`int`, defaults to 2): Side of the square patch that becomes one token.
        in_channels (`int`, defaults to 4): Channels of the latent, and of the prediction.
        num_layers (`int`, defaults to 28): Number of transformer blocks.
        num_attention_heads (`int`, defaults to 16): Heads of each attention; the width is heads x head dimension.
        attention_head_dim (`int`, defaults to 72): Channels of each head.
        mlp_ratio (`float`, defaults to 4.0): Width of the feed-forward layers, as a multiple of the model's width.
        num_classes (`int`, defaults to 1000):
            Number of classes. Class `num_classes` is the null class. 0 makes an unconditional model.
        class_dropout_prob (`float`, defaults to 0.1):
            Probability with which a label becomes the null class in training mode, unless `force_drop_ids` decides.
        use_rope (`bool`, defaults to `False`): Add 2D rotary embeddings to the fixed sin-cos ones.
        qk_norm (`str`, *optional*): `"layer_norm"` or `"rms_norm"` over each head's queries and keys; `None` for none.
        norm_type (`str`, defaults to `"layer_norm"`): `"layer_norm"` (without weights) or `"rms_norm"` (with weights).
        activation_fn (`str`, defaults to `"gelu-approximate"`):
            As diffusers names them: `"gelu-approximate"` (by tanh), `"gelu"` (exact), `"geglu-approximate"` (x times the
            sigmoid of 1.702 x, CLIP's) or `"swiglu"`.
        class_token_dim (`int`, *optional*):
            Width of an encoder's class token that is noised and denoised together with the latents, as one more token (REG,
            arXiv 2507.01467); `None` for none. If that makes the number of tokens odd, context parallelism needs
            `ContextParallelConfig(ulysses_anything=True)` and NCCL.
        prediction_type (`str`, defaults to `"velocity"`):
            What the last layer predicts: the `"velocity"`, or the clean `"sample"` (JiT, arXiv 2511.13720), class token
            included, which [`velocity_from_sample`] then turns into the velocity of the linear path.
        pos_embed_type (`str`, defaults to `"sincos"`):
            `"sincos"`, a fixed table of positions, or `"learned"`, a trained one that starts from it.
        norm_eps (`float`, defaults to 1e-6): Epsilon of the norms of blocks and final layer.
        rope_theta (`float`, defaults to 10000.0): Base of the rotary embeddings' periods.
        rope_scale (`float`, defaults to 1.0): What rows and columns are multiplied by before they turn.
        patch_bottleneck_dim (`int`, *optional*):
            Channels that a patch passes on its way to the width of the model: a linear embedding of low rank (JiT, §4.3),
            for patches of many pixels. `None` for the one matrix of DiT.
        noise_scale (`float`, defaults to 1.0):
            Standard deviation of the noise that the network sees, for data of unit size (JiT takes 2 at 512 px). Outside
            the network x_t and v are divided by it, so the noise has standard deviation 1 and the data are smaller; a
            pipeline multiplies what it has drawn by it.

    Raises:
        ValueError: if `sample_size` is not a multiple of `patch_size`, or an option has an unknown value.
    """

    _supports_gradient_checkpointing = True
    _source = Path(__file__).read_bytes()  # saved with a pipeline
    _no_split_modules = [
        "ERWTransformerBlock",
        "PatchEmbed",
        "ERWTimeClassEmbedding",
        "ERWClassTokenEmbedding",
        "ERWAdaLayerNormOut",
    ]
    _repeated_blocks = ["ERWTransformerBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "time_class_embed", "norm"]
    _tp_plan = {
        "transformer_blocks.*.attn.to_q": "colwise",
        "transformer_blocks.*.attn.to_k": "colwise",
        "transformer_blocks.*.attn.to_v": "colwise",
        "transformer_blocks.*.attn.to_out.0": "rowwise",
        "transformer_blocks.*.ff.net.0.proj": PackedColwiseParallel(),
        "transformer_blocks.*.ff.net.2": "rowwise",
    }
    _cp_plan = {
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        use_rope: bool = False,
        qk_norm: str | None = None,
        norm_type: str = "layer_norm",
        activation_fn: str = "gelu-approximate",
        class_token_dim: int | None = None,
        prediction_type: str = "velocity",
        pos_embed_type: str = "sincos",
        norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_scale: float = 1.0,
        patch_bottleneck_dim: int | None = None,
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if prediction_type not in ("velocity", "sample"):
            raise ValueError(f'prediction_type must be "velocity" or "sample", got {prediction_type!r}')
        if not noise_scale > 0:
            raise ValueError(f"noise_scale must be above 0, got {noise_scale}")
        sizes = {
            "sample_size": sample_size, "patch_size": patch_size, "in_channels": in_channels,
            "num_attention_heads": num_attention_heads, "attention_head_dim": attention_head_dim,
        }  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_layers < 0 or num_classes < 0 or not 0 <= class_dropout_prob <= 1 or norm_eps < 0:
            raise ValueError(
                "num_layers, num_classes and norm_eps must be at least 0 and class_dropout_prob between 0 and 1, got "
                f"{num_layers}, {num_classes}, {norm_eps} and {class_dropout_prob}"
            )
        if sample_size % patch_size != 0:
            raise ValueError(f"sample_size={sample_size} is not a multiple of patch_size={patch_size}")
        if activation_fn not in ("gelu-approximate", "gelu", "geglu-approximate", "swiglu"):
            raise ValueError(
                'activation_fn must be "gelu-approximate", "gelu", "geglu-approximate" or "swiglu", '
                f"got {activation_fn!r}"
            )
        if pos_embed_type not in ("sincos", "learned"):
            raise ValueError(f'pos_embed_type must be "sincos" or "learned", got {pos_embed_type!r}')
        dim = num_attention_heads * attention_head_dim

        learned = pos_embed_type == "learned"
        self.pos_embed = _patch_embed(sample_size, patch_size, in_channels, dim, learned, patch_bottleneck_dim)
        self.time_class_embed = ERWTimeClassEmbedding(dim, num_classes, class_dropout_prob)
        self.class_token_embed = None
        if class_token_dim is not None:
            self.class_token_embed = ERWClassTokenEmbedding(class_token_dim, dim)
            # Class and patch tokens have separate final layers, so all tokens are gathered before those.
            self._cp_plan = {
                "transformer_blocks.0": self._cp_plan["transformer_blocks.0"],
                "norm_out": self._cp_plan["proj_out"],
            }
        self.rope = None
        if use_rope:
            if attention_head_dim % 4 != 0:
                raise ValueError(f"use_rope needs attention_head_dim divisible by 4, got {attention_head_dim}")
            self.rope = ERWRotaryPosEmbed(
                attention_head_dim,
                sample_size // patch_size,
                with_class_token=class_token_dim is not None,
                theta=rope_theta,
                scale=rope_scale,
            )
            rope_input = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
            self._cp_plan = {"rope": {0: rope_input, 1: rope_input}, **self._cp_plan}
        self.transformer_blocks = nn.ModuleList(
            [
                ERWTransformerBlock(
                    dim,
                    num_attention_heads,
                    attention_head_dim,
                    mlp_ratio,
                    qk_norm,
                    norm_type,
                    activation_fn,
                    norm_eps,
                )
                for _ in range(num_layers)
            ]
        )
        self.norm_out = ERWAdaLayerNormOut(dim, norm_type, norm_eps)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * in_channels)
        self.class_token_out = None if class_token_dim is None else nn.Linear(dim, class_token_dim)

        self.gradient_checkpointing = False
        self._initialize_weights()

    def set_adapters(self, adapter_names: list[str] | str, weights: float | list[float | None] | None = None) -> None:
        """
        Activates LoRA adapters.

        Args:
            adapter_names (`str` or `list[str]`): Their names.
            weights (`float` or `list[float]`, *optional*): Weight of each; 1.0 by default.

        Raises:
            ValueError: if there are not as many weights as adapters.
        """
        # diffusers' own looks the class up in a table of its models.
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(given) != len(names):
            raise ValueError(f"got {len(given)} weights for the {len(names)} adapters {names}")
        set_weights_and_activate_adapters(self, names, [1.0 if weight is None else weight for weight in given])

    def set_class_table(self, table: torch.Tensor) -> None:
        """
        Replaces the embeddings of the classes, whose number may change.

        Args:
            table (`torch.Tensor` of shape `(num_classes + 1, D)`): The last row is the null class's.
        """
        embed = self.time_class_embed
        old = embed.class_embedder.weight
        # The module stays, with the hooks of offloading, which have to learn of the new parameter.
        embed.class_embedder.weight = nn.Parameter(table.to(old).contiguous(), requires_grad=old.requires_grad)
        embed.class_embedder.num_embeddings = len(table)
        _maybe_remove_and_reapply_group_offloading(self)
        embed.num_classes = len(table) - 1
        self.register_to_config(num_classes=len(table) - 1)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        Saves the model as other diffusers models, and removes earlier weights of the same variant: diffusers would load a
        sharded save, or safetensors, before what was saved last.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write.
            is_main_process (`bool`, *optional*, defaults to `True`): Whether this process writes.
            save_function (`Callable`, *optional*): Instead of `torch.save`.
            safe_serialization (`bool`, *optional*, defaults to `True`): Write safetensors, not pickled `.bin` files.
            variant (`str`, *optional*): Part of the names of the weights, such as `"fp16"`.
            max_shard_size (`int` or `str`, *optional*, defaults to `"10GB"`): Largest size of a file.
            push_to_hub (`bool`, *optional*, defaults to `False`): Also upload the folder.
            kwargs: Further arguments of [`~ModelMixin.save_pretrained`].

        Raises:
            ValueError: before anything is written, for several `.bin` files, which diffusers does not find.
        """
        if not safe_serialization:
            split = split_torch_state_dict_into_shards(self.state_dict(), max_shard_size=max_shard_size)
            if split.is_sharded:
                raise ValueError(
                    "diffusers loads weights in several files from safetensors only: omit safe_serialization=False, or "
                    "set a larger max_shard_size"
                )
        name = re.escape(f".{variant}") if variant else ""
        weights = re.compile(
            rf"diffusion_pytorch_model({name}(-\d+-of-\d+)?\.(safetensors|bin)|\.\w+\.index{name}\.json)"
        )
        before = {
            path: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in Path(save_directory).glob("diffusion_pytorch_model*")
            if is_main_process and weights.fullmatch(path.name)
        }
        super().save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            save_function=save_function,
            safe_serialization=safe_serialization,
            variant=variant,
            max_shard_size=max_shard_size,
            **kwargs,
        )
        for path, was in before.items():
            if path.exists() and (path.stat().st_ino, path.stat().st_mtime_ns) == was:
                path.unlink()
        if push_to_hub:  # the folder as it is now; diffusers uploads what it saves, so it saves once more
            super().save_pretrained(
                os.fspath(save_directory),  # which diffusers splits
                is_main_process=is_main_process,
                save_function=save_function,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
                push_to_hub=True,
                **kwargs,
            )

    def _upload_folder(
        self, working_dir, repo_id, token=None, commit_message=None, create_pr=False, subfolder=None
    ) -> str:
        """As diffusers', which would leave other weights of the repo beside the new ones, and they would be loaded."""
        weights = re.compile(r"diffusion_pytorch_model(\.\w+)?(-\d+-of-\d+)?\.(safetensors|bin)")
        variants = {match[1] or "" for path in Path(working_dir).iterdir() if (match := weights.fullmatch(path.name))}
        kinds = ("{}.safetensors", "{}.bin", "{}-*", ".*.index{}.json")
        stale = ["diffusion_pytorch_model" + kind.format(variant) for variant in variants for kind in kinds]
        return upload_folder(
            repo_id=repo_id,
            folder_path=working_dir,
            path_in_repo=subfolder,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            delete_patterns=stale,
        )

    def _initialize_weights(self) -> None:
        # The initialisation of DiT (arXiv 2212.09748, §3.2), shared by all models of this family.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # There query, key and value form one matrix of three times the height, which has a narrower Xavier bound.
                in_one_matrix = name.endswith((".to_q", ".to_k", ".to_v"))
                nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if in_one_matrix else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The patch embedding is a linear layer in a convolution's clothes, or two.
        for layer in self.pos_embed.proj.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight.view(layer.out_channels, -1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.time_class_embed.class_embedder.weight, std=0.02)
        nn.init.normal_(self.time_class_embed.timestep_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_class_embed.timestep_embedder.linear_2.weight, std=0.02)
        # adaLN-zero: every gate starts shut, so each block starts as the identity ...
        for block in self.transformer_blocks:
            nn.init.zeros_(block.modulation.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(self.norm_out.modulation.weight)
        # ... and the model starts by predicting zeros: no velocity, or a grey sample, as JiT.
        nn.init.zeros_(self.proj_out.weight)
        if self.class_token_out is not None:
            nn.init.zeros_(self.class_token_out.weight)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        force_drop_ids: torch.Tensor | None = None,
        hidden_states_depths: tuple[int, ...] = (),
        tokens_only: bool = False,
        class_token: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> ERWTransformer2DModelOutput | tuple[Any, ...]:
        """
        Predicts the velocity of the path.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, C, H, W)`):
                Noised latents x_t, `H = W = sample_size`.
            timestep (`torch.Tensor` of shape `(B,)`):
                Flow time in [0, 1], 0 is data and 1 is noise, float32. A diffusers scheduler's timestep is 1000 times
                that.
            class_labels (`torch.LongTensor` of shape `(B,)`, *optional*):
                Class ids in [0, num_classes], `num_classes` being the null class. Without labels every sample has
                the null class.
            force_drop_ids (`torch.Tensor` of shape `(B,)`, *optional*):
                Non-zero where the label becomes the null class. When given, nothing is dropped at random, so a trainer can
                make this draw itself.
            hidden_states_depths (`tuple[int, ...]`, *optional*, defaults to `()`):
                Depths in [1, num_layers] whose tokens to return: depth d is the output of the d-th block.
            tokens_only (`bool`, *optional*, defaults to `False`):
                Stop after the deepest of `hidden_states_depths`: later blocks do not run and `sample` is `None`.
            class_token (`torch.Tensor` of shape `(B, class_token_dim)`, *optional*):
                The encoder's class token, noised with the same t; only for a model with `class_token_dim`, and required there.
            attention_kwargs (`dict`, *optional*):
                `{"scale": float}` scales the LoRA layers, if any. There are no other entries.
            return_dict (`bool`, *optional*, defaults to `True`): Return a dataclass instead of a tuple.

        Returns:
            [`ERWTransformer2DModelOutput`] or `tuple`: the velocity `(B, C, H, W)` and the requested tokens.

        Raises:
            ValueError: if a depth lies outside the model, `tokens_only` comes without a depth, a class token is given
                to a model that has none or missing where it has one, the size is not that of a learned or rotary table, or
                `attention_kwargs` has an entry that is not known.
        """
        num_layers = len(self.transformer_blocks)
        if any(not 1 <= depth <= num_layers for depth in hidden_states_depths):
            raise ValueError(f"hidden_states_depths={hidden_states_depths} must lie in [1, {num_layers}]")
        if tokens_only and not hidden_states_depths:
            raise ValueError("tokens_only=True needs hidden_states_depths")
        if (class_token is None) != (self.class_token_embed is None):
            raise ValueError(
                f"this model has class_token_dim={self.config.class_token_dim}: class_token must "
                + (
                    "be left out"
                    if self.class_token_embed is None
                    else "be given, noised with the same t as the latents"
                )
            )
        if attention_kwargs:
            raise ValueError(f"attention_kwargs takes 'scale' alone, not {', '.join(map(repr, attention_kwargs))}")
        depth_to_run = max(hidden_states_depths) if tokens_only else num_layers
        x_t, class_token_t = hidden_states, class_token
        height, width = hidden_states.shape[-2:]
        side = self.config.sample_size
        if (self.config.pos_embed_type == "learned" or self.rope is not None) and (height, width) != (side, side):
            raise ValueError(f"the table of positions has one size: {side}x{side}, got {height}x{width}")
        if height % self.config.patch_size or width % self.config.patch_size:
            raise ValueError(f"{height}x{width} is not a whole number of patches of {self.config.patch_size}")

        noise_scale = self.config.noise_scale
        if noise_scale != 1:
            hidden_states = hidden_states * noise_scale
        hidden_states = self.pos_embed(hidden_states)  # (B, N, D)
        temb = self.time_class_embed(timestep, class_labels, force_drop_ids, hidden_states.dtype)  # (B, D)
        image_rotary_emb = self.rope(hidden_states) if self.rope is not None else None
        if class_token is not None:
            class_token = self.class_token_embed(class_token, hidden_states.dtype)  # type: ignore[misc]
            hidden_states = torch.cat([class_token, hidden_states], dim=1)  # (B, 1 + N, D)

        tokens = {}
        for depth, block in enumerate(self.transformer_blocks[:depth_to_run], start=1):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb, image_rotary_emb)
            else:
                hidden_states = block(hidden_states, temb, image_rotary_emb)
            if depth in hidden_states_depths:
                tokens[depth] = hidden_states

        sample, class_velocity = None, None
        if not tokens_only:
            hidden_states = self.norm_out(hidden_states, temb)
            if class_token is not None:
                class_velocity = self.class_token_out(hidden_states[:, 0])  # type: ignore[misc]  # (B, class_token_dim)
                hidden_states = hidden_states[:, 1:]
            hidden_states = self.proj_out(hidden_states)  # (B, N, p * p * C)
            sample = self._unpatchify(hidden_states, height, width)
            if noise_scale != 1:
                sample = sample / noise_scale
            if self.config.prediction_type == "sample":
                sample = velocity_from_sample(x_t, sample, timestep)
                if class_token_t is not None and class_velocity is not None:
                    class_velocity = velocity_from_sample(class_token_t, class_velocity, timestep)
        taps = tuple(tokens[depth] for depth in hidden_states_depths) or None
        class_taps = None
        if taps is not None and class_token is not None:
            taps, class_taps = tuple(tap[:, 1:] for tap in taps), tuple(tap[:, 0] for tap in taps)
        if not return_dict:
            return (sample, *(value for value in (taps, class_velocity, class_taps) if value is not None))
        return ERWTransformer2DModelOutput(
            sample=sample, hidden_states=taps, class_token=class_velocity, class_hidden_states=class_taps
        )

    def _unpatchify(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        patch_size, channels = self.config.patch_size, self.config.in_channels
        rows, columns = height // patch_size, width // patch_size
        hidden_states = hidden_states.reshape(-1, rows, columns, patch_size, patch_size, channels)
        hidden_states = hidden_states.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, columns, p)
        return hidden_states.reshape(-1, channels, height, width)


# Step caching (FirstBlockCache, TaylorSeer, MagCache) and the layer-skipping and perturbed-attention guiders find
# blocks and processors through these tables.
TransformerBlockRegistry.register(ERWTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
AttentionProcessorRegistry.register(
    ERWAttnProcessor, AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention___ret___hidden_states)
)
