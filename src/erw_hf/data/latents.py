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
"""Conversion of pixels to the latents that the transformer is trained on.

A latent cache holds the moments made here; `training/cache_latents.py` writes it, and `data.source` names its columns.
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers import ModelMixin

from erw_hf.pipeline_erw import is_representation_autoencoder, scale_latents, upcast


def encode_moments(pixels: torch.Tensor, vae: ModelMixin) -> torch.Tensor:
    """
    The posterior of images. A latent cache stores it, so that training can draw from it anew in every epoch.

    Args:
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, uint8): Images.
        vae (a diffusers autoencoder): The encoder.

    Returns:
        `torch.Tensor` of shape `(B, 2 c, h, w)`, float32: Means, then standard deviations, unscaled; the deviations of a
        deterministic autoencoder (AutoencoderDC, AutoencoderRAE) are 0.
    """
    images = pixels.float() / 255
    if not is_representation_autoencoder(vae):
        images = images * 2 - 1
    if images.is_cuda:  # tensor cores take convolutions so; weights and results follow
        images = images.to(memory_format=torch.channels_last)
    with torch.no_grad(), upcast(vae, images.device):
        encoded = vae.encode(images.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1).float()
    return torch.cat([encoded.latent, torch.zeros_like(encoded.latent)], dim=1).float()


def check_finite(moments: torch.Tensor, name: str, vae: ModelMixin, samples: Sequence[object]) -> None:
    """Raises ValueError if moments `(B, 2 c, h, w)`, in the dtype that they are kept in, hold NaN or infinity; names
    the samples and the autoencoder."""
    broken = ~moments.isfinite().flatten(1).all(dim=1)
    if broken.any():
        raise ValueError(
            f"the vae {name} (in {vae.dtype}, kept in {moments.dtype}) returns NaN or infinity for {int(broken.sum())} of "
            f"{len(moments)} images, the first is {samples[int(broken.int().argmax())]}: its weights are broken, or it "
            "overflows in this precision"
        )


def check_autoencoder(config: Mapping[str, object], name: str, in_channels: int) -> None:
    """Raises ValueError if an autoencoder, by its `config.json` alone, gives other than `in_channels` channels, or
    latents of unknown scale."""
    channels = config.get("latent_channels") or config.get("encoder_hidden_size")
    if channels is not None and channels != in_channels:
        raise ValueError(
            f"the vae {name} makes latents with {channels} channels: set in_channels to that, not to {in_channels}"
        )
    scaled = config.get("scaling_factor") not in (None, 1, 1.0) or config.get("latents_std") is not None
    if not scaled:
        raise ValueError(
            f"the vae {name} has neither scaling_factor nor latents_mean and latents_std, so its latents cannot be scaled "
            "to unit variance: write the statistics that cache_latents.py leaves in latent_statistics.json into its "
            "config.json"
        )


def image_channels(vae: ModelMixin) -> int:
    """Channels of the autoencoder's images: 3 for RGB."""
    return vae.config.num_channels if is_representation_autoencoder(vae) else vae.config.in_channels


def moments_to_latents(
    moments: torch.Tensor, vae: ModelMixin, posterior_noise: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Draws latents from their posterior and scales them by [`~pipeline_erw.scale_latents`].

    Args:
        moments (`torch.Tensor` of shape `(B, 2 c, h, w)`): What [`encode_moments`] gave, in any float dtype.
        vae (a diffusers autoencoder): Its config says how latents are scaled.
        posterior_noise (`torch.Tensor` of shape `(B, c, h, w)`, *optional*): Standard normal draw. `None` takes the mean.

    Returns:
        `torch.Tensor` of shape `(B, c, h, w)`, float32: Latents as the transformer sees them.
    """
    latents, deviation = moments.float().chunk(2, dim=1)
    if posterior_noise is not None:
        latents = latents + deviation * posterior_noise
    return scale_latents(latents, vae)


def pixels_to_latents(
    pixels: torch.Tensor, vae: ModelMixin | None, posterior_noise: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Images as the transformer sees them.

    Args:
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, uint8): Images.
        vae (a diffusers autoencoder, *optional*): `None` trains on pixels in [-1, 1].
        posterior_noise (`torch.Tensor` of shape `(B, c, h, w)`, *optional*): See [`moments_to_latents`].

    Returns:
        `torch.Tensor` of shape `(B, c, h, w)`, float32: Latents.
    """
    if vae is None:
        return pixels.float() / 127.5 - 1
    return moments_to_latents(encode_moments(pixels, vae), vae, posterior_noise)
