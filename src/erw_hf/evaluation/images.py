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
"""Sets of images to measure: drawn by a pipeline, in an npz file, or in a dataset."""

import contextlib
import math
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erw_hf.data.decoding import BadImageError, center_crop, decode_image
from erw_hf.data.samples import sample_rng
from erw_hf.data.source import Source, load_source
from erw_hf.files import written_whole
from erw_hf.pipeline_erw import ERWPipeline


@dataclass(frozen=True)
class ImageSet:
    """Images that can be read by index, in any order and on any rank.

    Args:
        count (`int`): Number of images.
        size (`tuple[int, int]`): Height and width of each.
        read (`Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor | None]]`):
            Indices -> images (B, 3, H, W) uint8 and their classes (B,), where there are any.
        num_classes (`int`, *optional*, defaults to 0): Number of classes; 0 for images without.
        id2label (`dict[int, str]`, *optional*): Their names, if known.
        source (`Source`, *optional*): The dataset that they are from.
    """

    count: int
    size: tuple[int, int]
    read: Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor | None]]
    num_classes: int = 0
    id2label: dict[int, str] | None = None
    source: Source | None = None


def sample_label(seed: int, index: int, num_classes: int, labels: str) -> int:
    """The class of a sample, by its index alone: `"random"` is uniform, as SiT, REPA and ERW; `"balanced"` takes each
    class in turn. 0, the null class, for an unconditional model."""
    if num_classes == 0:
        return 0
    if labels == "balanced":
        return index % num_classes
    return int(sample_rng(seed, 0, index).integers(num_classes))


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The noise of a sample, by its index alone: on the CPU, so that every device draws the same."""
    # torch's generator takes the low 32 bits of a seed: hashes of (seed, index) would collide among 50 000 samples.
    first = int(sample_rng(seed, 0, "noise").integers(2**32))
    return torch.Generator().manual_seed((first + index) % 2**32)


def generated_images(
    pipe: ERWPipeline,
    count: int,
    seed: int,
    labels: str = "random",
    num_inference_steps: int = 250,
    guidance_scale: float = 1.8,
    guidance_interval: tuple[float, float] = (0.0, 0.7),
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> ImageSet:
    """Images that a pipeline draws, each a function of (seed, index). The last bits of an image also depend on the
    batch that it is drawn in, as those of any batched product do; 8-bit rounding hides nearly all of that. `labels`
    are those of [`sample_label`]; the pipeline runs inside `autocast()`. Reading raises ValueError where the model
    gives NaN or infinity."""
    num_classes = pipe.transformer.config.num_classes

    def read(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        classes = [sample_label(seed, index, num_classes, labels) for index in indices]
        with torch.no_grad(), autocast():
            try:
                latents = pipe(
                    class_labels=classes,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    guidance_interval=guidance_interval,
                    generator=[sample_generator(seed, index) for index in indices],
                    output_type="latent",
                ).images
            except ValueError as error:  # it counts within its batch
                text = re.sub(r"^image (\d+) of \d+", lambda found: f"sample {indices[int(found[1])]}", str(error))
                raise ValueError(text) from error
            images = pipe.decode_latents(latents).float()
        # Before the pipeline's last step, which would clip infinity to black or white.
        broken = ~torch.isfinite(images).flatten(1).all(dim=1)
        if broken.any():
            raise ValueError(
                f"sample {indices[int(broken.int().argmax())]} holds NaN or infinity: the weights are broken, or the "
                "precision is too low (try --mixed_precision no)"
            )
        images = pipe.image_processor.postprocess(images, output_type="pt")
        return to_uint8(images), torch.tensor(classes)

    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    names = {int(key): name for key, name in (pipe.config.get("id2label") or {}).items()}
    return ImageSet(count, (side, side), read, num_classes, names)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) images in [0, 1], of 3 channels or one, as (B, 3, H, W) uint8 on the CPU; rounded as diffusers does
    when it makes PIL images, so that what is measured is what users save."""
    return (images * 255).round().to(torch.uint8).cpu().expand(-1, 3, -1, -1)


def npz_images(path: str | Path) -> ImageSet:
    """The images of a file in ADM's layout, whose `arr_0` is (N, H, W, 3) uint8, without reading it into memory.
    Raises ValueError if there is no such array."""
    archive = open_npz(path)
    if "arr_0.npy" not in archive.namelist():
        raise ValueError(
            f"{path} holds no images: it has no arr_0, (N, H, W, 3) uint8 as ADM's sample files, but "
            f"{[name.removesuffix('.npy') for name in archive.namelist()]}"
        )
    stored = archive.open("arr_0.npy")
    version = np.lib.format.read_magic(stored)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(stored)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran_order:
        raise ValueError(f"arr_0 of {path} must be (N, H, W, 3) uint8, it is {shape} {dtype}")
    start, size = stored.tell(), int(np.prod(shape[1:]))

    def read(indices: Sequence[int]) -> tuple[torch.Tensor, None]:
        images = np.empty((len(indices), *shape[1:]), dtype=np.uint8)
        for image, index in zip(images, indices, strict=True):
            stored.seek(start + index * size)
            image[:] = np.frombuffer(stored.read(size), dtype=np.uint8).reshape(shape[1:])
        return torch.from_numpy(images).permute(0, 3, 1, 2), None

    return ImageSet(shape[0], shape[1:3], read)


def open_npz(path: str | Path) -> zipfile.ZipFile:
    """An npz file, open. Raises FileNotFoundError, or ValueError if it is damaged or another kind of file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not an npz file, or was cut short: {error}") from error


def dataset_images(
    dataset_name: str,
    split: str = "train",
    image_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
) -> ImageSet:
    """
    The images of a dataset, which may be a folder of image files; see [`~data.source.load_source`].

    Args:
        image_size (`int`, *optional*):
            Side in pixels of the centred square to take, by ADM's preprocessing. Without it all images must have one size.
        num_classes (`int`, *optional*): 0 where no classes are needed, as in a reference.

    Raises:
        ValueError: for a latent cache without images; when read, for images of several sizes and for broken ones.
    """
    source = load_source(
        dataset_name, split, image_column=image_column, label_column=label_column, num_classes=num_classes
    )
    if source.image_column is None:
        raise ValueError(f"{dataset_name} is a latent cache without images: name a dataset of images")
    first: dict[str, tuple[int, ...]] = {}  # the shape that all images must have

    def decode(index: int, stored: dict[str, Any] | None) -> np.ndarray:
        try:
            image = decode_image(stored)[0].convert("RGB")
        except BadImageError as error:
            raise ValueError(f"row {index} of {dataset_name}: {error}") from error
        return np.asarray(image if image_size is None else center_crop(image, image_size))

    def read(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = [source.dataset[int(index)] for index in indices]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # decoding leaves Python's lock
            images = list(threads.map(decode, indices, [row[source.image_column] for row in rows]))
        labels = [0 if source.label_column is None else row[source.label_column] for row in rows]
        for index, array in zip(indices, images, strict=True):
            if array.shape != first.get("shape", array.shape):
                raise ValueError(
                    f"image {index} of {dataset_name} is {array.shape[1]}x{array.shape[0]} px, others are "
                    f"{first['shape'][1]}x{first['shape'][0]}: set --image_size"
                )
            first["shape"] = array.shape
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return pixels, None if source.label_column is None else torch.tensor(labels)

    height, width = read([0])[0].shape[2:]
    return ImageSet(len(source.dataset), (height, width), read, source.num_classes, source.id2label, source)


def take(images: ImageSet, count: int, seed: int) -> ImageSet:
    """`count` of the images, or all, in their order; chosen at random, because datasets are often sorted by class."""
    if count >= images.count:
        return images
    rows = np.sort(np.random.default_rng(seed).permutation(images.count)[:count])
    return replace(images, count=count, read=lambda indices: images.read(rows[list(indices)].tolist()))


class NpzWriter:
    """Writes `count` images as ADM's sample file, on all ranks; resumable. Until [`close`] the images lie beside it as
    `.npy`."""

    def __init__(self, path: str | Path, count: int) -> None:
        self.path, self.count = Path(path), count
        self.raw = self.path.with_suffix(".npy")
        self.array: np.memmap | None = None

    def write(self, indices: Sequence[int], images: torch.Tensor) -> None:
        """Writes (B, 3, H, W) uint8 images at their indices."""
        pixels = images.permute(0, 2, 3, 1).numpy()
        if self.array is None:
            self.array = self._open((self.count, *pixels.shape[1:]))
        self.array[list(indices)] = pixels
        self.array.flush()

    def _open(self, shape: tuple[int, ...]) -> np.memmap:
        """The array on disk. Every process writes the same header and length, so it does not matter who comes first."""
        self.raw.touch()
        with self.raw.open("r+b") as file:
            header = {"descr": np.dtype(np.uint8).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + math.prod(shape))
        return np.lib.format.open_memmap(self.raw, mode="r+")

    def close(self, is_main_process: bool) -> None:
        """
        Makes the npz file, after all processes have written.

        Args:
            is_main_process (`bool`): Whether this process is the one to do it.
        """
        if is_main_process and self.raw.exists():
            with (
                written_whole(self.path) as temporary,
                zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
            ):
                archive.write(self.raw, "arr_0.npy")
            self.raw.unlink()
