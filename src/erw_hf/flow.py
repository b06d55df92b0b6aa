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
"""The interpolation path, the velocity target and the draw of t, as pure functions of tensors.

Time runs from data to noise: `t = 0` is the clean latent, `t = 1` is Gaussian noise (SiT, arXiv 2401.08740, Eq. 1).
"""

import math

import torch


SAMPLE_LOSS_TIME = 0.05  # JiT's clamp (arXiv 2511.13720, table 9)


def path_coefficients(
    t: torch.Tensor, path_type: str = "linear"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coefficients of `x_t = alpha(t) x_0 + sigma(t) noise` and their time derivatives (SiT, arXiv 2401.08740, §2.1).

    Args:
        t (`torch.Tensor` of any shape): Flow time in [0, 1].
        path_type (`str`, *optional*, defaults to `"linear"`):
            `"linear"`: alpha = 1 - t, sigma = t. `"cosine"`: alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]`: alpha, sigma, d alpha/dt, d sigma/dt, each of
        the shape of `t`.

    Raises:
        ValueError: if `path_type` is neither of the two.
    """
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path_type == "cosine":
        angle = t * math.pi / 2
        alpha, sigma = torch.cos(angle), torch.sin(angle)
        return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha
    raise ValueError(f'path_type must be "linear" or "cosine", got {path_type!r}')


def interpolate(
    x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, path_type: str = "linear"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A point on the path and the velocity there, which the model learns to predict.

    Args:
        x0 (`torch.Tensor` of shape `(B, C, H, W)`): Clean latents.
        noise (`torch.Tensor` of shape `(B, C, H, W)`): Standard normal noise.
        t (`torch.Tensor` of shape `(B,)`): Flow time in [0, 1], one for each sample.
        path_type (`str`, *optional*, defaults to `"linear"`): See [`path_coefficients`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `x_t` and `dx_t/dt`, both `(B, C, H, W)`. On the linear path the velocity
        is `noise - x0`.
    """
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t.reshape(-1, *[1] * (x0.ndim - 1)), path_type)
    return alpha * x0 + sigma * noise, d_alpha * x0 + d_sigma * noise


def timestep_from_normal(
    normal: torch.Tensor,
    distribution: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    shift: float = 1.0,
) -> torch.Tensor:
    """Flow times from standard normal draws, so that one seeded draw per sample serves every distribution of t.

    Args:
        normal (`torch.Tensor` of shape `(B,)`): Standard normal draws.
        distribution (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"` on [0, 1] (SiT, REPA, ERW) or `"logit_normal"` (SD3, arXiv 2403.03206, Eq. 19).
        logit_mean (`float`, *optional*, defaults to 0.0): Mean of logit(t); `"logit_normal"` only.
        logit_std (`float`, *optional*, defaults to 1.0): Standard deviation of logit(t); `"logit_normal"` only.
        shift (`float`, *optional*, defaults to 1.0):
            `t -> s t / (1 + (s - 1) t)` (SD3, Eq. 23): values above 1 move mass towards noise, as latents of many
            dimensions need.

    Returns:
        `torch.Tensor` of shape `(B,)`: Flow times in [0, 1].

    Raises:
        ValueError: if `distribution` is neither of the two.
    """
    if distribution == "uniform":
        t = torch.special.ndtr(normal)
    elif distribution == "logit_normal":
        t = torch.sigmoid(logit_mean + logit_std * normal)
    else:
        raise ValueError(f'distribution must be "uniform" or "logit_normal", got {distribution!r}')
    return shift * t / (1 + (shift - 1) * t)


def sample_loss_weight(t: torch.Tensor) -> torch.Tensor:
    """
    The weight of the velocity loss of a model that predicts clean samples ([`~transformer_erw.velocity_from_sample`]). That
    loss is |x - x_0|^2 / t^2, which must not grow without bound near the data: with this weight it is JiT's,
    |x - x_0|^2 / max(t, 0.05)^2 (arXiv 2511.13720, §4). JiT clamps the velocity itself, and so samples with a shortened one.

    Args:
        t (`torch.Tensor` of any shape): Flow time in [0, 1].

    Returns:
        `torch.Tensor` of the shape of `t`: The weight, 1 for t of at least 0.05.
    """
    return (t / t.clamp(min=SAMPLE_LOSS_TIME)).square()
