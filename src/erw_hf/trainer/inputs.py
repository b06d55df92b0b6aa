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
"""What a run reads beside its images: the autoencoder, the encoders, the record of a latent cache."""

import contextlib
import json
from pathlib import Path

import torch
from diffusers import AutoModel, ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from erw_hf.data.latents import check_autoencoder, image_channels, pixels_to_latents
from erw_hf.data.source import Source, check_cache_files
from erw_hf.encoders import RepresentationEncoder
from erw_hf.pipeline_erw import ERWPipeline
from erw_hf.trainer.config import TrainingConfig


def load_vae(config: TrainingConfig, device: torch.device) -> tuple[ModelMixin | None, tuple[int, int]]:
    """
    Loads the autoencoder, if the run has one.

    Args:
        config ([`TrainingConfig`]): The run.
        device (`torch.device`): Where to put it.

    Returns:
        `tuple[ModelMixin | None, tuple[int, int]]`: The autoencoder, and the side and channels of the images that make
        latents of the configured size; without one, those of the images that are trained on.

    Raises:
        ValueError: if its latents are of another shape than the model's.
    """
    if config.vae is None:
        return None, (config.sample_size, config.in_channels)
    check_autoencoder(AutoModel.load_config(config.vae), config.vae, config.in_channels)
    # float32: the latents are the data, and bf16 would round them.
    vae = AutoModel.from_pretrained(config.vae).to(device).eval().requires_grad_(False)
    factor = ERWPipeline.vae_scale_factor_of(vae)
    channels = image_channels(vae)
    side = config.sample_size * factor
    with torch.no_grad():
        shape = tuple(pixels_to_latents(torch.zeros(1, channels, side, side, device=device), vae).shape[1:])
    if shape != (config.in_channels, config.sample_size, config.sample_size):
        raise ValueError(
            f"the vae makes latents (C, H, W) = {shape} of {side} px images, the config has in_channels="
            f"{config.in_channels} and sample_size={config.sample_size}"
        )
    return vae, (side, channels)


def load_encoders(config: TrainingConfig, device: torch.device, mixed_precision: str) -> list[RepresentationEncoder]:
    """
    Loads the teachers, if the run aligns at all.

    Args:
        config ([`TrainingConfig`]): The run.
        device (`torch.device`): Where to put them.
        mixed_precision (`str`): `"no"`, `"fp16"` or `"bf16"`: in what they run.

    Returns:
        `list[RepresentationEncoder]`: The encoders, compiled if the run compiles.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    encoders = []
    for name in config.encoders:
        encoder = RepresentationEncoder.from_pretrained(
            name, config.token_grid, config.encoder_image_size, dtype, config.encoder_antialias
        ).to(device)
        if config.compiles(device.type):
            encoder.model.compile()
        encoders.append(encoder)
    return encoders


def check_cache(config: TrainingConfig, source: Source) -> None:
    """
    Sees to it that a latent cache is read as what it was written as.

    Args:
        config ([`TrainingConfig`]): The run.
        source ([`~data.source.Source`]): Its data; nothing is asked of what is no cache.

    Raises:
        ValueError: if the cache is of another autoencoder, size or encoder, has not all of its files, or the run asks
            for what a cache cannot give.
    """
    if not source.is_latent_cache:
        return
    if source.has_features and len(config.encoders) > 1:
        raise ValueError(
            "a latent cache holds the tokens of one encoder: leave its column `features` out to align with several"
        )
    if source.has_features and config.class_token_weight > 0:
        raise ValueError(
            "a latent cache with the column `features` holds no class tokens, which class_token_weight needs: make "
            "it by cache_latents.py without --encoder (the run then encodes its images), or set class_token_weight "
            "to 0"
        )
    if config.vae is None:
        raise ValueError(f"{config.dataset_name} is a latent cache: name the vae that it was made with")
    if config.random_flip:
        raise ValueError("random_flip does not work on a latent cache: cache the flipped images too (--flipped)")
    folder = Path(config.dataset_name)
    record = folder / "cache.json"
    if not folder.exists():
        with contextlib.suppress(EntryNotFoundError):
            record = Path(hf_hub_download(config.dataset_name, "cache.json", repo_type="dataset"))
    if not record.is_file():  # moved without its record
        return
    made = json.loads(record.read_text())
    if made.get("encoder") is not None and config.encoders:
        for name in ("encoder", "patch_size", "encoder_image_size", "encoder_antialias"):
            value = getattr(config, name)
            if Path(str(made[name])).name != Path(str(value)).name:
                raise ValueError(f"the cache holds tokens of {name}={made[name]!r}, the config has {value!r}")
    if made["sample_size"] != config.sample_size:
        raise ValueError(f"the cache has sample_size {made['sample_size']}, the config {config.sample_size}")
    if Path(made["vae"]).name != Path(config.vae).name:
        raise ValueError(f"the cache was made with the vae {made['vae']!r}, the config names {config.vae!r}")
    if not folder.exists():  # a push is of whole caches
        return
    check_cache_files(folder)
