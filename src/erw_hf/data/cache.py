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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


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
    folder = Path(name)
    record = folder / "cache.json"
    if not folder.exists():
        with contextlib.suppress(EntryNotFoundError):
            record = Path(hf_hub_download(name, "cache.json", repo_type="dataset"))
    if not record.is_file():  # the cache was moved without its record
        return
    made = json.loads(record.read_text())
    if made.get("encoder") is not None and encoders:
        for key in ("encoder", "patch_size", "encoder_image_size", "encoder_antialias"):
            if Path(str(made[key])).name != Path(str(settings[key])).name:
                raise ValueError(f"the cache holds tokens of {key}={made[key]!r}, the config has {settings[key]!r}")
    if made["sample_size"] != settings["sample_size"]:
        raise ValueError(f"the cache has sample_size {made['sample_size']}, the config {settings['sample_size']}")
    if Path(made["vae"]).name != Path(settings["vae"]).name:
        raise ValueError(f"the cache was made with the vae {made['vae']!r}, the config names {settings['vae']!r}")
    if folder.exists():  # a pushed cache is complete
        check_cache_files(folder)


def check_cache_files(cache: Path) -> None:
    """Raises ValueError if a latent cache is not finished."""
    files = sorted((cache / "data").glob("train-*.parquet"))
    if not files or len(files) != int(files[0].stem.split("-of-")[1]):
        raise ValueError(f"{cache} lacks files: run cache_latents.py again to finish it")
