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
"""Between pixels and the latents that the transformer is trained on."""

import torch


def pixels_to_latents(
    pixels: torch.Tensor, vae: torch.nn.Module | None, posterior_noise: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Encodes images; the inverse of [`ERWPipeline.decode_latents`].

    Args:
        pixels (`torch.Tensor` of shape `(B, C, H, W)`, uint8): Images.
        vae (a diffusers autoencoder, *optional*): `None` trains on pixels in [-1, 1].
        posterior_noise (`torch.Tensor` of shape `(B, c, h, w)`, *optional*):
            Standard normal draw for a variational autoencoder's posterior. `None` takes the mean.

    Returns:
        `torch.Tensor` of shape `(B, c, h, w)`, float32: Latents, scaled as the autoencoder's config says.
    """
    images = pixels.float() / 127.5 - 1
    if vae is None:
        return images
    with torch.no_grad():
        encoded = vae.encode(images.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mean.float()
        if posterior_noise is not None:
            latents = latents + encoded.latent_dist.std.float() * posterior_noise
    else:
        latents = encoded.latent.float()  # a deterministic autoencoder: AutoencoderDC, AutoencoderRAE
    config = vae.config
    scaling, shift = getattr(config, "scaling_factor", None) or 1.0, getattr(config, "shift_factor", None) or 0.0
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean = torch.as_tensor(mean, device=latents.device).reshape(1, -1, 1, 1)
        std = torch.as_tensor(std, device=latents.device).reshape(1, -1, 1, 1)
        return (latents - mean) * scaling / std
    return (latents - shift) * scaling
