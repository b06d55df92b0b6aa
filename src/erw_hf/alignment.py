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
"""Alignment: projectors, losses, the normalisation of targets, the schedule of lambda."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


AlignmentLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class MLPProjector(nn.Module):
    """
    Maps tokens of the transformer into the space of the encoder's tokens, one by one (REPA, arXiv 2410.06940, §3.2).

    Args:
        in_dim (`int`): Width of the transformer.
        out_dim (`int`): Width of the encoder.
        hidden_dim (`int`, *optional*, defaults to 2048): Width of the two hidden layers.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, out_dim),
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(tokens)  # (B, N, out_dim)


class ConvProjector(nn.Module):
    """
    iREPA's projector (arXiv 2512.10794): one 3x3 convolution over the token grid, which keeps the spatial structure
    that an MLP per token loses.

    Args:
        in_dim (`int`): Width of the transformer.
        out_dim (`int`): Width of the encoder.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, kernel_size=3, padding=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        grid = math.isqrt(tokens.shape[1])
        image = tokens.transpose(1, 2).unflatten(2, (grid, grid))  # (B, D, g, g)
        return self.conv(image).flatten(2).transpose(1, 2)  # (B, N, out_dim)


class TransformerProjector(nn.Module):
    """
    PixelREPA's adapter (arXiv 2603.14366): a shallow transformer, which can predict an encoder's token from those around it
    where its own is hidden. Theirs is also told the time and the class, which the tokens of the model hold already.

    Args:
        in_dim (`int`): Width of the transformer.
        out_dim (`int`): Width of the encoder.
        heads (`int`): Attention heads.
        num_tokens (`int`): Tokens of an image.
        num_layers (`int`, *optional*, defaults to 2): Blocks.
    """

    def __init__(self, in_dim: int, out_dim: int, heads: int, num_tokens: int, num_layers: int = 2) -> None:
        super().__init__()
        # A hidden token is zeros, and its position all that it has.
        self.positions = nn.Parameter(0.02 * torch.randn(num_tokens, in_dim))
        block = partial(nn.TransformerEncoderLayer, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True)
        self.blocks = nn.ModuleList(block(in_dim, heads, 4 * in_dim) for _ in range(num_layers))
        self.norm = nn.LayerNorm(in_dim)
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        # A class token, which has no place in the grid, comes first.
        tokens = tokens + F.pad(self.positions, (0, 0, tokens.shape[1] - len(self.positions), 0))
        for block in self.blocks:
            tokens = block(tokens)
        return self.proj(self.norm(tokens))  # (B, N, out_dim)


def hidden_count(num_tokens: int, ratio: float) -> int:
    """
    Args:
        num_tokens (`int`): Tokens of an image.
        ratio (`float`): Share that is hidden, in [0, 1).

    Returns:
        `int`: How many those are, the nearest whole number; at least one token is seen.
    """
    return min(round(ratio * num_tokens), num_tokens - 1)


def seen_tokens(tokens: torch.Tensor, hidden: torch.Tensor, ratio: float) -> torch.Tensor:
    """
    The tokens that an alignment on a subset compares.

    Args:
        tokens (`torch.Tensor` of shape `(B, L, D)`): Tokens; those before the last N, as a class token, are always seen.
        hidden (`torch.Tensor` of shape `(B, N)`, bool): Which are hidden, [`hidden_count`] of each sample.
        ratio (`float`): Their share.

    Returns:
        `torch.Tensor` of shape `(B, L - hidden, D)`: The others, in their order.
    """
    length, num_tokens = tokens.shape[1], hidden.shape[1]
    order = F.pad(hidden, (length - num_tokens, 0)).long().argsort(dim=1, stable=True)  # a count needs no device sync
    return tokens.take_along_dim(order[:, : length - hidden_count(num_tokens, ratio), None], dim=1)


def cosine_alignment_loss(projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Patch-wise alignment, one minus the cosine similarity of each token pair (REPA, arXiv 2410.06940, Eq. 8; ERW, arXiv
    2504.10188, Eq. 13 as its code has it).

    Args:
        projected (`torch.Tensor` of shape `(B, N, D)`): Projected tokens of the transformer.
        target (`torch.Tensor` of shape `(B, N, D)`): Tokens of the frozen encoder.

    Returns:
        `torch.Tensor` of shape `(B,)`: The mean over each sample's tokens, in [0, 2], float32. The loss is the mean
        over all samples; the published code used only the last sample of a batch.
    """
    return (1 - F.cosine_similarity(projected.float(), target.float(), dim=-1)).mean(dim=1)


def nt_xent_alignment_loss(projected: torch.Tensor, target: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """
    NT-Xent with in-batch negatives, as in ERW's text (arXiv 2504.10188, Eq. 13; SimCLR, arXiv 2002.05709, Eq. 1; the text
    gives neither the temperature nor the negatives). Here each token must find the target token of its own image
    among those of the whole batch at the same position in the grid.

    Args:
        projected (`torch.Tensor` of shape `(B, N, D)`): Projected tokens of the transformer.
        target (`torch.Tensor` of shape `(B, N, D)`): Tokens of the frozen encoder.
        temperature (`float`, *optional*, defaults to 0.1): Divides the cosine similarities.

    Returns:
        `torch.Tensor` of shape `(B,)`: The mean over each sample's tokens, float32; log B for an untrained model.
    """
    projected = F.normalize(projected.float(), dim=-1).transpose(0, 1)  # (N, B, D)
    target = F.normalize(target.float(), dim=-1).transpose(0, 1)
    with torch.autocast(projected.device.type, enabled=False):
        logits = projected @ target.transpose(1, 2) / temperature  # (N, B, B)
    return -torch.diagonal(logits.log_softmax(dim=-1), dim1=1, dim2=2).mean(dim=0)


def structural_alignment_loss(projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Alignment of structure instead of content: the mean squared difference of the two token self-similarity matrices
    (the autocorrelation loss of SARA, "Structural and Adversarial Representation Alignment", 2025).

    Args:
        projected (`torch.Tensor` of shape `(B, N, D)`): Projected tokens of the transformer.
        target (`torch.Tensor` of shape `(B, N, E)`): Tokens of the frozen encoder; their width may differ.

    Returns:
        `torch.Tensor` of shape `(B,)`: The mean over each sample's token pairs, float32.
    """
    projected, target = F.normalize(projected.float(), dim=-1), F.normalize(target.float(), dim=-1)
    with torch.autocast(projected.device.type, enabled=False):
        difference = projected @ projected.transpose(1, 2) - target @ target.transpose(1, 2)  # (B, N, N)
    return difference.square().mean(dim=(1, 2))


def spatial_normalize(target: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """
    iREPA's normalisation of the encoder's tokens (arXiv 2512.10794): each channel gets mean 0 and deviation 1 over the
    grid. This removes what all tokens of an image share and keeps how they differ.

    Args:
        target (`torch.Tensor` of shape `(B, N, D)`): Tokens of the frozen encoder.
        eps (`float`, *optional*, defaults to 1e-6): Added to the deviation.

    Returns:
        `torch.Tensor` of shape `(B, N, D)`, float32: The normalised tokens.
    """
    target = target.float()
    return (target - target.mean(dim=1, keepdim=True)) / (target.std(dim=1, keepdim=True) + eps)


def choose_alignment_loss(name: str, temperature: float) -> AlignmentLoss:
    """
    Args:
        name (`str`): `"cosine"`, `"nt_xent"` or `"structural"`.
        temperature (`float`): Of `"nt_xent"`.

    Returns:
        `Callable`: The loss of each sample, `(B,)`, of projected tokens and targets.
    """
    if name == "nt_xent":
        return partial(nt_xent_alignment_loss, temperature=temperature)
    return structural_alignment_loss if name == "structural" else cosine_alignment_loss


def alignment_weight(
    step: int, schedule: str, initial: float, half_life: int | None = None, stop_step: int | None = None
) -> float:
    """
    The weight lambda of the alignment loss at a step of full training.

    Args:
        step (`int`): Steps of full training done so far; the first step has 0.
        schedule (`str`):
            `"constant"` (REPA); `"half_life"`: `initial * 2 ** (-step / half_life)` (ERW, arXiv 2504.10188, Eq. 14 ff:
            `c0 exp(-k / tau)` with tau = half_life / ln 2); `"stop"`: `initial` before `stop_step`, then 0 (HASTE,
            arXiv 2505.16792).
        initial (`float`): lambda at step 0.
        half_life (`int`, *optional*): Steps over which lambda halves; `"half_life"` only.
        stop_step (`int`, *optional*): First step without alignment; `"stop"` only.

    Returns:
        `float`: lambda.

    Raises:
        ValueError: if the schedule is unknown or its parameter is missing.
    """
    if schedule == "constant":
        return initial
    if schedule == "half_life":
        if not half_life:
            raise ValueError('the alignment schedule "half_life" needs alignment_half_life')
        return initial * 2 ** (-step / half_life)
    if schedule == "stop":
        if stop_step is None:
            raise ValueError('the alignment schedule "stop" needs alignment_stop_step')
        return initial if step < stop_step else 0.0
    raise ValueError(f'the alignment schedule must be "constant", "half_life" or "stop", got {schedule!r}')
