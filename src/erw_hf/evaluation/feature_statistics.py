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
"""Mean and covariance of the features of many images, divided over ranks and resumable.

`quality` turns them into metrics such as FID, and `metrics` has the formula.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from erw_hf.evaluation.extractors import resize
from erw_hf.evaluation.images import ImageSet
from erw_hf.files import written_whole
from erw_hf.processes import done_by_all


class FeatureStatistics:
    """Mean and covariance of features of width `dim` that arrive in batches: only float64 sums are kept."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> None:
        """Adds features, (B, D)."""
        features = features.cpu().double()
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.products += features.T @ features

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds those of other samples."""
        self.count += other.count
        self.sum += other.sum
        self.products += other.products

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D), as of `numpy.cov`. Raises ValueError for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, there are {self.count}")
        mean = self.sum / self.count
        covariance = (self.products - self.count * mean.outer(mean)) / (self.count - 1)
        return mean.numpy(), covariance.numpy()


@dataclass
class Features:
    """What [`extract_features`] found.

    Args:
        statistics (`dict[str, FeatureStatistics]`): Of each layer but `logits`.
        folder (`Path`): Where the layers that were to be kept lie.
        seconds (`dict[str, float]`): Of each stage, in the process that took longest for it.
    """

    statistics: dict[str, FeatureStatistics]
    folder: Path
    seconds: dict[str, float]

    def layer(self, name: str) -> torch.Tensor:
        """A layer that was kept, or `"labels"`: (N, ...) of every image, in order. Raises FileNotFoundError if it was
        not kept."""
        files = sorted(self.folder.glob(f"{name}-*.npy"))
        if not files:
            raise FileNotFoundError(f"the features {name!r} were not kept in {self.folder}")
        return torch.from_numpy(np.concatenate([np.load(file) for file in files]))


@torch.no_grad()
def extract_features(
    images: ImageSet,
    extractors: Sequence[torch.nn.Module],
    accelerator: Accelerator,
    folder: str | os.PathLike[str],
    batch_size: int,
    keep: Sequence[str] = (),
    save_steps: int = 10,
    write: Callable[[Sequence[int], torch.Tensor], None] | None = None,
    description: str = "images",
) -> Features:
    """
    Reads images and sums up their features. All ranks call it, and each takes whole batches: batch b holds the images
    `[b B, (b + 1) B)`, whatever the number of ranks. Finished work is kept in `folder`, which all ranks must see; a
    call after a kill continues there, and with the same number of ranks its sums are bitwise the uninterrupted ones.

    Args:
        keep (`Sequence[str]`, *optional*, defaults to `()`): Layers whose features are to be kept, in files.
        save_steps (`int`, *optional*, defaults to 10): Batches between two saves of the sums.
        write (`Callable`, *optional*): Called with the indices and the pixels of each batch.
        description (`str`, *optional*, defaults to `"images"`): Name of the progress bar.

    Returns:
        [`Features`]: On every rank.

    Raises:
        ValueError: for features that are not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = done_by_all(accelerator, partial(_read_parts, folder))  # before anyone writes
    done = {batch for part in parts.values() for batch in part["done"]}
    rank, processes = accelerator.process_index, accelerator.num_processes
    path = folder / f"part-{rank:05d}.pt"
    part = parts.get(path.name, {"done": [], "seconds": {"read": 0.0, "extract": 0.0}, "sums": {}})
    mine = [b for b in range(math.ceil(images.count / batch_size)) if b % processes == rank and b not in done]

    def read_mine() -> None:
        bar = tqdm(
            total=images.count,
            initial=min(len(done) * batch_size, images.count),
            desc=description,
            unit="img",
            disable=not accelerator.is_main_process,
        )
        for number, batch in enumerate(mine, start=1):
            indices = range(batch * batch_size, min((batch + 1) * batch_size, images.count))
            started = time.perf_counter()
            pixels, labels = images.read(indices)
            if write is not None:
                write(indices, pixels)
            read = time.perf_counter()
            layers = _layers(extractors, pixels.to(accelerator.device))
            for layer, features in layers.items():
                if not torch.isfinite(features).all():
                    raise ValueError(
                        f"the features {layer!r} of {description} {indices[0]} to {indices[-1]} hold NaN or infinity: the "
                        "extractor's weights are broken"
                    )
                if layer != "logits":
                    part["sums"].setdefault(layer, FeatureStatistics(features.shape[1])).update(features)
            kept = {layer: layers[layer] for layer in keep}
            if labels is not None:
                kept["labels"] = labels
            for layer, values in kept.items():
                # Synced, as the list of batches that are done is.
                with written_whole(folder / f"{layer}-{batch:07d}.npy") as temporary, temporary.open("wb") as file:
                    np.save(file, values.numpy())
            part["seconds"]["read"] += read - started
            part["seconds"]["extract"] += time.perf_counter() - read
            part["done"].append(batch)
            if number % save_steps == 0 or number == len(mine):
                _save_part(part, path)
            bar.update(min(len(indices) * processes, bar.total - bar.n))
        bar.close()

    done_by_all(accelerator, read_mine)
    return done_by_all(accelerator, lambda: _merge(list(_read_parts(folder).values()), folder))


def _layers(extractors: Sequence[torch.nn.Module], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features of each layer of all networks, float32 on the CPU."""
    layers: dict[str, torch.Tensor] = {}
    resized: dict[int, torch.Tensor] = {}  # once for all networks of a size, which takes longer than a small network
    pixels = pixels.contiguous()  # other strides round differently
    with _full_float32():
        for extractor in extractors:
            size = getattr(extractor, "size", None)  # Inception resizes inside its graph
            if size is not None and size not in resized:
                resized[size] = resize(pixels, size)
            layers |= extractor(pixels if size is None else resized[size])
    return {layer: features.float().cpu() for layer, features in layers.items()}


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """TF32 rounds features to 10 bits: cuDNN's default, and that of all products in NVIDIA's containers."""
    try:
        precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # this process has set it by torch's newer names, which do not mix with the older ones
        backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, value in zip(backends, before, strict=True):
                backend.fp32_precision = value
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


def _merge(parts: Sequence[dict[str, Any]], folder: Path) -> Features:
    """The work of all ranks together."""
    statistics: dict[str, FeatureStatistics] = {}
    for part in parts:
        for layer, sums in part["sums"].items():
            statistics.setdefault(layer, FeatureStatistics(len(sums.sum))).merge(sums)
    seconds = {stage: max(part["seconds"][stage] for part in parts) for stage in ("read", "extract")}
    return Features(statistics, folder, seconds)


def _save_part(part: dict[str, Any], path: Path) -> None:
    """Written completely or not at all."""
    state = part | {"sums": {layer: vars(sums) for layer, sums in part["sums"].items()}}
    with written_whole(path) as temporary:
        torch.save(state, temporary)


def _read_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """The work of each rank, in an order that does not depend on the file system."""
    parts = {}
    for path in sorted(folder.glob("part-*.pt")):
        part = torch.load(path, weights_only=True)
        for layer, state in part["sums"].items():
            part["sums"][layer] = FeatureStatistics(len(state["sum"]))
            vars(part["sums"][layer]).update(state)
        parts[path.name] = part
    return parts
