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
"""The latent cache: its columns, and whether one fits a run. `training/cache_latents.py` writes it."""

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from erw_hf.provenance import weights_hash


logger = logging.getLogger(__name__)

# Columns beside the image and the label.
MOMENTS_COLUMN = "moments"  # float16 bytes of (2 c, h, w), in C order
FEATURES_COLUMN = "features"  # bfloat16 bytes of (N, D), in C order
KEY_COLUMN = "key"  # what identifies the sample


def check_cache(has_features: bool, encoders: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a latent cache was not made with the autoencoder, size and encoder in a run's `settings`,
    if files are missing, or if the run asks for what a cache cannot provide. `encoders` are what the run aligns
    with."""
    if has_features and len(encoders) > 1:
        raise ValueError(
            "a latent cache holds the tokens of one encoder: to align with several, make it without --encoder"
        )
    if has_features and settings["class_token_weight"] > 0:
        raise ValueError(
            f"a latent cache with the column `{FEATURES_COLUMN}` holds no class tokens, which class_token_weight needs: make "
            "it by cache_latents.py without --encoder (the run then encodes its images), or set class_token_weight to 0"
        )
    name = settings["dataset_name"]
    if settings["vae"] is None:
        raise ValueError(f"{name} is a latent cache: set vae to the one it was made with")
    if settings["random_flip"]:
        raise ValueError("random_flip does not work on a latent cache: cache the flipped images too (--flipped)")
    if settings["random_crop"]:
        raise ValueError(
            "random_crop does not work on a latent cache, which holds the centre: train on the images themselves"
        )
    made = cache_record(name)
    if not made:
        logger.warning(f"{name} was moved without its cache.json: nothing tells which autoencoder made it")
        return
    if made.get("encoder") is not None and encoders:
        for key in ("encoder", "patch_size", "encoder_image_size", "encoder_antialias"):
            if Path(str(made[key])).name != Path(str(settings[key])).name:
                raise ValueError(f"the cache holds tokens of {key}={made[key]!r}, the config has {settings[key]!r}")
    if made["sample_size"] != settings["sample_size"]:
        raise ValueError(f"the cache has sample_size {made['sample_size']}, the config {settings['sample_size']}")
    if Path(made["vae"]).name != Path(settings["vae"]).name:
        raise ValueError(f"the cache was made with the vae {made['vae']!r}, the config names {settings['vae']!r}")
    if Path(name).exists():  # a pushed cache is complete
        check_cache_files(Path(name))


def check_cache_weights(name: str, vae_name: str, vae: torch.nn.Module) -> None:
    """Raises ValueError if an autoencoder has other weights than the one that made a latent cache, whatever their names."""
    made = cache_record(name).get("vae_sha256")  # older caches lack it
    if made is not None and made != weights_hash(vae):
        raise ValueError(
            f"{name} was made with other weights than {vae_name} has: name the autoencoder that made it, or make it again"
        )


def cache_record(name: str) -> dict[str, Any]:
    """What `cache_latents.py` recorded of a cache, in a folder or on the Hub; empty if that is lost."""
    record = Path(name) / "cache.json"
    if not Path(name).exists():
        with contextlib.suppress(EntryNotFoundError):
            record = Path(hf_hub_download(name, "cache.json", repo_type="dataset"))
    return json.loads(record.read_text()) if record.is_file() else {}


def check_cache_files(cache: Path) -> None:
    """Raises ValueError if a latent cache is not finished."""
    files = sorted((cache / "data").glob("train-*.parquet"))
    if not files or len(files) != int(files[0].stem.split("-of-")[1]):
        raise ValueError(f"{cache} lacks files: run cache_latents.py again to finish it")
