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
"""SiT in plain PyTorch, written from its equations as such models are published: the baseline of our measurements.

Same function, same initial weights as `ERWTransformer2DModel` with its defaults; a test compares outputs and gradients.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, heads, N, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_1, scale_1))
        return x + gate_2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_2, scale_2))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class PlainSiT(nn.Module):
    """
    Scalable Interpolant Transformer (arXiv 2401.08740), DiT's architecture (arXiv 2212.09748, §3.2) as a velocity model.

    Args:
        sample_size (`int`): Height and width of the latent.
        patch_size (`int`): Side of a patch.
        in_channels (`int`): Channels of the latent.
        num_layers (`int`): Blocks.
        num_attention_heads (`int`): Heads.
        attention_head_dim (`int`): Channels of a head.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Width of the feed-forward over the model's.
        num_classes (`int`, *optional*, defaults to 1000): Classes; one more is the null class.
    """

    def __init__(
        self, sample_size: int, patch_size: int, in_channels: int, num_layers: int, num_attention_heads: int,
        attention_head_dim: int, mlp_ratio: float = 4.0, num_classes: int = 1000,
    ) -> None:  # fmt: skip
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        self.x_embedder = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.t_embedder = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embedder = nn.Embedding(num_classes + 1, dim)
        self.register_buffer("pos_embed", self._positions(sample_size // patch_size, dim), persistent=False)
        self.blocks = nn.ModuleList([Block(dim, num_attention_heads, mlp_ratio) for _ in range(num_layers)])
        self.final_layer = FinalLayer(dim, patch_size * patch_size * in_channels)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.weight.view(self.x_embedder.out_channels, -1))
        nn.init.zeros_(self.x_embedder.bias)
        nn.init.normal_(self.y_embedder.weight, std=0.02)
        nn.init.normal_(self.t_embedder[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder[2].weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @staticmethod
    def _positions(grid: int, dim: int) -> torch.Tensor:
        """Sines and cosines of the column, then of the row (ViT's fixed table)."""
        omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
        angle = torch.outer(torch.arange(grid, dtype=torch.float64), omega)
        axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, D / 2)
        rows, columns = axis.repeat_interleave(grid, dim=0), axis.repeat(grid, 1)
        return torch.cat([columns, rows], dim=1).unsqueeze(0).float()  # (1, N, D)

    @staticmethod
    def _sinusoids(t: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angle = t[:, None].float() * frequencies[None]
        return torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, 256)

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        grid, p, C = math.isqrt(x.shape[1]), self.patch_size, self.in_channels
        x = x.reshape(len(x), grid, grid, p, p, C)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), C, grid * p, grid * p)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, drop: torch.Tensor, depth: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            x (`torch.Tensor` of shape `(B, C, H, W)`): Noised latents.
            t (`torch.Tensor` of shape `(B,)`): Flow time in [0, 1].
            y (`torch.LongTensor` of shape `(B,)`): Class ids.
            drop (`torch.Tensor` of shape `(B,)`): Non-zero where the label is dropped.
            depth (`int`, *optional*): Block, counted from 1, whose tokens are wanted too.

        Returns:
            `tuple`: the velocity `(B, C, H, W)`, and the tokens `(B, N, D)` or `None`.
        """
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D)
        y = torch.where(drop.bool(), self.num_classes, y)
        c = self.t_embedder(self._sinusoids(t)) + self.y_embedder(y)
        tokens = None
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if number == depth:
                tokens = x
        return self.unpatchify(self.final_layer(x, c)), tokens


# Names of ours -> names here; query, key and value lie in one matrix.
_NAMES = {
    "pos_embed.proj.": "x_embedder.",
    "time_class_embed.timestep_embedder.linear_1.": "t_embedder.0.",
    "time_class_embed.timestep_embedder.linear_2.": "t_embedder.2.",
    "time_class_embed.class_embedder.": "y_embedder.",
    "norm_out.modulation.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "blocks.",
    ".attn.to_out.0.": ".attn.proj.",
    ".ff.net.0.proj.": ".mlp.fc1.",
    ".ff.net.2.": ".mlp.fc2.",
    ".modulation.": ".adaLN_modulation.1.",
}


def plain_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Args:
        state (`dict[str, torch.Tensor]`): Parameters of an [`ERWTransformer2DModel`], or their gradients.

    Returns:
        `dict[str, torch.Tensor]`: The same by the names of [`PlainSiT`].
    """
    plain = {}
    for name, tensor in state.items():
        if name == "pos_embed.pos_embed":  # fixed
            continue
        if ".attn.to_k." in name or ".attn.to_v." in name:
            continue
        if ".attn.to_q." in name:
            tensor = torch.cat([state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
            name = name.replace("to_q", "qkv")
        for ours, theirs in _NAMES.items():
            if name.startswith(ours) or (ours.startswith(".") and ours in name and "adaLN" not in name):
                name = name.replace(ours, theirs, 1)
        plain[name] = tensor
    return plain
