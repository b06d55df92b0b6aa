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
"""What each block of a transformer knows of an image: CKNNA with an encoder, and a linear probe of the classes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from erw_hf.data.latents import pixels_to_latents
from erw_hf.data.samples import sample_rng
from erw_hf.data.source import Source, read_images
from erw_hf.encoders import RepresentationEncoder
from erw_hf.evaluation.metrics import cknna
from erw_hf.flow import interpolate
from erw_hf.transformer_erw import ERWTransformer2DModel


logger = logging.getLogger(__name__)

NEIGHBOURS = 10  # of CKNNA


@dataclass(frozen=True)
class ProbeImages:
    """Images held in memory for probing.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, W)`, uint8): The images.
        labels (`torch.Tensor` of shape `(N,)`, *optional*): Their classes.
        noise_seed (`int`): Seed of the noise that is added to each.
    """

    pixels: torch.Tensor
    labels: torch.Tensor | None
    noise_seed: int


def load_probe_pair(
    source: Source, held_out: Source | None, count: int, image_size: int, channels: int, seed: int
) -> tuple[ProbeImages, ProbeImages]:
    """Images to fit a probe on, and others to test it on: of the same split, parts that share none, if `held_out` is `None`.
    See [`load_probe_images`]."""
    first = 0
    if held_out is None:
        held_out = source
        first = min(count, len(source.dataset) // 2) if hasattr(source.dataset, "__len__") else count
        if first == 0:
            raise ValueError("one image cannot be shared by a probe's fit and its test")
        logger.info(f"the probe is fitted on {first} images, and tested on others of the same split")
    return (
        load_probe_images(source, first or count, image_size, channels, seed),
        load_probe_images(held_out, count, image_size, channels, seed, first),
    )


def load_probe_images(
    source: Source, count: int, image_size: int, channels: int, seed: int, first: int = 0
) -> ProbeImages:
    """Reads at most `count` images of `image_size` pixels for probing, after the `first`: of a random order, or that of a
    stream. `seed` is of the order and of the noise. Raises ValueError if none can be read."""
    rows = source.dataset
    if hasattr(rows, "__len__"):
        rows = rows.select(np.random.default_rng(seed).permutation(len(rows))[first : first + count])
    else:
        rows = rows.skip(first).take(count)
    pixels, labels, _ = read_images(replace(source, dataset=rows), image_size, channels)
    if labels is not None and source.num_classes > 1 and len(labels) > 1 and labels.unique().numel() == 1:
        logger.warning(
            f"all {len(labels)} images to probe with are of the class {labels[0]}: their accuracy says nothing"
        )
    return ProbeImages(pixels, labels, seed)


@torch.no_grad()
def block_features(
    transformer: ERWTransformer2DModel,
    images: ProbeImages,
    time: float,
    vae: torch.nn.Module | None = None,
    path_type: str = "linear",
    batch_size: int = 64,
    encoder: RepresentationEncoder | None = None,
) -> torch.Tensor:
    """The mean patch token of each block, `(num_layers, N, D)`, float32, on the CPU. The model is given no class,
    since its embedding would tell the probe the answer. At `time` 0 it sees clean latents, at other times the noise
    of an image is always the same.

    A model with a class token (REG) sees that of the image by its first `encoder`, noised with the same t: at t = 0
    its blocks are shown a part of what they are compared with. Raises ValueError if that encoder is missing or
    another."""
    width = transformer.config.class_token_dim
    if width is not None and (encoder is None or encoder.class_token_dim != width):
        raise ValueError(
            f"the model sees an encoder's class token of width {width}: probe it with the encoder that it was trained with"
        )
    device, depths = transformer.device, tuple(range(1, len(transformer.transformer_blocks) + 1))
    features = []
    for start in range(0, len(images.pixels), batch_size):
        pixels = images.pixels[start : start + batch_size].to(device)
        latents = pixels_to_latents(pixels, vae) / transformer.config.noise_scale
        rngs = [sample_rng(images.noise_seed, 0, f"probe {start + i}") for i in range(len(latents))]
        times = torch.full((len(latents),), time, device=device)
        x_t, class_token = _noised(latents, rngs, times, path_type), None
        if width is not None and encoder is not None:
            class_token = encoder.patch_and_class_tokens(pixels / 255)[1].float()
            class_token = _noised(class_token, rngs, times, path_type).to(transformer.dtype)
        tokens = transformer(
            x_t.to(transformer.dtype), times, hidden_states_depths=depths, tokens_only=True, class_token=class_token
        )
        features.append(torch.stack([depth.float().mean(dim=1) for depth in tokens.hidden_states]).cpu())
    return torch.cat(features, dim=1)


def _noised(
    clean: torch.Tensor, rngs: Sequence[np.random.Generator], times: torch.Tensor, path_type: str
) -> torch.Tensor:
    noise = np.stack([rng.standard_normal(clean.shape[1:], dtype=np.float32) for rng in rngs])
    return interpolate(clean, torch.from_numpy(noise).to(clean.device), times, path_type)[0]


def encoder_features(encoder: RepresentationEncoder, images: ProbeImages, batch_size: int = 64) -> torch.Tensor:
    """The mean patch token of an encoder, `(N, D)`, float32, on the CPU."""
    device = encoder.image_mean.device
    batches = images.pixels.split(batch_size)
    return torch.cat([encoder(batch.to(device) / 255).float().mean(dim=1).cpu() for batch in batches])


def linear_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    weight_decay: float = 1e-3,
) -> float:
    """Accuracy on test features, `(M, D)`, of a multinomial logistic regression on standardised features, `(N, D)`,
    fitted to the optimum by L-BFGS. `weight_decay` is the factor of half the squared norm of the weights, in a loss
    that is a mean over samples."""
    # On the CPU: not every device has float64.
    features, test_features = features.cpu().double(), test_features.cpu().double()
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    x, x_test = ((values - mean) / std for values in (features, test_features))
    num_classes = int(max(labels.max(), test_labels.max())) + 1
    weight = x.new_zeros(x.shape[1], num_classes).requires_grad_()
    bias = x.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, labels) + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    found = (x_test @ weight + bias).argmax(dim=1)
    return (found == test_labels).double().mean().item()


def probe_blocks(
    transformer: ERWTransformer2DModel,
    fit_images: ProbeImages,
    test_images: ProbeImages,
    times: Sequence[float] = (0.0,),
    vae: torch.nn.Module | None = None,
    encoder: RepresentationEncoder | None = None,
    path_type: str = "linear",
    k: int = NEIGHBOURS,
) -> list[dict[str, Any]]:
    """Probes every block: for each time `t`, and lists over blocks, `cknna` (with an encoder, `k` neighbours) and
    `accuracy` (with labels). The linear probe is fitted on `fit_images`; `test_images` are held out. A model with a
    class token sees the encoder's."""
    # Of length 1, as in Huh et al.'s code: else a few long vectors are everyone's nearest neighbours.
    target = None if encoder is None else F.normalize(encoder_features(encoder, test_images), dim=-1)
    results = []
    for time in times:
        tested = block_features(transformer, test_images, time, vae, path_type, encoder=encoder)
        result: dict[str, Any] = {"t": time}
        if target is not None:
            result["cknna"] = [cknna(F.normalize(block, dim=-1).numpy(), target.numpy(), k) for block in tested]
        if fit_images.labels is not None and test_images.labels is not None:
            fitted = block_features(transformer, fit_images, time, vae, path_type, encoder=encoder)
            result["accuracy"] = [
                linear_probe(fit, fit_images.labels, test, test_images.labels)
                for fit, test in zip(fitted, tested, strict=True)
            ]
        results.append(result)
    return results
