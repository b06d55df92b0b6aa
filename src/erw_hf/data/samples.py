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
"""From rows to training samples, each random draw a function of (seed, epoch, sample key), and the order of samples.

Seeds of images that are drawn for an evaluation are in `evaluation.images`.
"""

import hashlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image, UnidentifiedImageError

from erw_hf.data.source import FEATURES_COLUMN, MOMENTS_COLUMN, Source


logger = logging.getLogger(__name__)

# What PIL raises for files that are no images, or are broken ones.
IMAGE_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)


def read_file(path: str) -> bytes:
    """
    Args:
        path (`str`): A file, also in an archive or on the Hub, as `datasets` names it.

    Returns:
        `bytes`: Its content.
    """
    with xopen(path, "rb") as file:
        return file.read()


def image_name(encoded: dict[str, Any] | None) -> str:
    """
    Args:
        encoded (`dict`, *optional*): What an undecoded image column of `datasets` holds.

    Returns:
        `str`: Its path, or that it has none.
    """
    return (encoded or {}).get("path") or "an image without a name"


def decode_image(encoded: dict[str, Any] | None) -> tuple[Image.Image, bytes]:
    """
    Args:
        encoded (`dict`, *optional*):
            `bytes`, or the `path` to read them from, as an undecoded image column of `datasets` has them.

    Returns:
        `tuple[PIL.Image.Image, bytes]`: The image, and its file's content.

    Raises:
        OSError: or another of `IMAGE_ERRORS`, for a file that is no readable image.
    """
    if encoded is None:
        raise OSError("the row holds none")
    content = read_file(encoded["path"]) if encoded["bytes"] is None else encoded["bytes"]
    image = Image.open(io.BytesIO(content))
    image.load()
    return image, content


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """
    ADM's preprocessing (arXiv 2105.05233): the largest centred square, resized to `size`.

    Args:
        image (`PIL.Image.Image`): Any image.
        size (`int`): Side of the result in pixels.

    Returns:
        `PIL.Image.Image`: The square image.
    """
    # Box-halving down to less than twice the size, then bicubic: what the reference statistics of FID were made with.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def prepare_image(image: Image.Image, size: int, channels: int) -> Image.Image:
    """
    Args:
        image (`PIL.Image.Image`): Any image.
        size (`int`): Side of the result in pixels.
        channels (`int`): 3 for RGB, 1 for grey.

    Returns:
        `PIL.Image.Image`: Its [`center_crop`], in these colours.
    """
    return center_crop(image.convert({1: "L", 3: "RGB"}[channels]), size)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """
    Args:
        image (`PIL.Image.Image`): What [`prepare_image`] gave.

    Returns:
        `torch.Tensor` of shape `(C, H, W)`, uint8: Its pixels.
    """
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def sample_rng(seed: int, epoch: int, key: str | int) -> np.random.Generator:
    """
    The random numbers of one sample in one epoch, whoever draws them: any process, any loader worker, any restart.

    Args:
        seed (`int`): Seed of the run.
        epoch (`int`): Epoch, from 0.
        key (`str` or `int`): What identifies the sample in its data set.

    Returns:
        `numpy.random.Generator`: A counter-based generator keyed by the three.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class SampleMaker:
    """
    Turns a row into a training sample: the image and all random draws that training makes of it.

    Args:
        source ([`Source`]): The data.
        image_size (`int`): Side of the image in pixels.
        channels (`int`): 3 for RGB, 1 for grey.
        latent_shape (`tuple[int, int, int]`): Shape (C, h, w) of the noise.
        seed (`int`): Seed of the run.
        class_dropout_prob (`float`): Probability of the null class.
        random_flip (`bool`): Mirror half of the images; the latents of a cache stay as they are, so not with one.
        class_token_dim (`int`, *optional*): Width of the class token that is noised too; `None` for none.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        channels: int,
        latent_shape: tuple[int, int, int],
        seed: int,
        class_dropout_prob: float,
        random_flip: bool,
        class_token_dim: int | None = None,
    ) -> None:
        self.source = source
        self.image_size = image_size
        self.channels = channels
        self.latent_shape = latent_shape
        self.seed = seed
        self.class_dropout_prob = class_dropout_prob
        self.random_flip = random_flip
        self.class_token_dim = class_token_dim

    def __call__(
        self,
        image: Image.Image | None,
        label: int | None,
        epoch: int,
        key: str | int,
        moments: bytes | None = None,
        features: bytes | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            image (`PIL.Image.Image`, *optional*): The image, of any mode and size.
            label (`int`, *optional*): Its class.
            epoch (`int`): Epoch, from 0.
            key (`str` or `int`): What identifies the sample.
            moments (`bytes`, *optional*): Moments from a latent cache.
            features (`bytes`, *optional*): An encoder's tokens from a latent cache.

        Returns:
            `dict[str, torch.Tensor]`: `pixels` (C, H, W) uint8 where there is an image, `label`, `drop`, `time_normal`,
            `noise` (c, h, w), `posterior_noise` (c, h, w), with a class token `class_noise` (E,) and, from a cache,
            `moments` (2 c, h, w) float16 and `features` (N D,) bfloat16.
        """
        rng = sample_rng(self.seed, epoch, key)
        # The order of the draws is part of the reproducibility promise: append, never insert.
        flip = rng.random() < 0.5
        drop = rng.random() < self.class_dropout_prob
        time_normal = rng.standard_normal(dtype=np.float32)
        noise = rng.standard_normal(self.latent_shape, dtype=np.float32)
        posterior_noise = rng.standard_normal(self.latent_shape, dtype=np.float32)

        sample = {
            "label": torch.tensor(0 if label is None else label),
            "drop": torch.tensor(drop or label is None),
            "time_normal": torch.tensor(time_normal),
            "noise": torch.from_numpy(noise),
            "posterior_noise": torch.from_numpy(posterior_noise),
        }
        if self.class_token_dim is not None:
            sample["class_noise"] = torch.from_numpy(rng.standard_normal(self.class_token_dim, dtype=np.float32))
        if image is not None:
            image = prepare_image(image, self.image_size, self.channels)
            if flip and self.random_flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            sample["pixels"] = to_pixels(image)
        if features is not None:
            sample["features"] = torch.frombuffer(bytearray(features), dtype=torch.bfloat16)
        if moments is not None:
            channels, height, width = self.latent_shape
            array = np.frombuffer(moments, dtype=np.float16).reshape(2 * channels, height, width)
            sample["moments"] = torch.from_numpy(array.copy())
        return sample


class TrainingSamples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """
    Training samples of a data set that is at hand, read in any order.

    Args:
        maker ([`SampleMaker`]): Makes samples of rows.
    """

    def __init__(self, maker: SampleMaker) -> None:
        self.maker = maker
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.maker.source.dataset)

    def __getitem__(self, position: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = position
        number, row, image = self._readable(index)
        label_column = self.maker.source.label_column
        label = None if label_column is None else row[label_column]
        return self.maker(image, label, epoch, number, row.get(MOMENTS_COLUMN), row.get(FEATURES_COLUMN))

    def _readable(self, index: int) -> tuple[int, dict[str, Any], Image.Image | None]:
        """Number, row and image; the next readable one's for a broken one, so that batches keep their size and a
        resumed run its order."""
        source = self.maker.source
        for candidate in range(index, index + len(self)):
            number = candidate % len(self)
            row = source.dataset[number]
            if source.image_column is None:
                return number, row, None
            try:
                image, _ = decode_image(row[source.image_column])
                return number, row, image
            except IMAGE_ERRORS as error:
                self.skipped += 1
                name = image_name(row[source.image_column])
                logger.warning(
                    f"skipped row {number} ({name}), which is no readable image ({error}); {self.skipped} skipped so far"
                )
        raise ValueError("the data set holds no readable image")


class StepSampler(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """
    The batches of one process as a pure function of the step, so that resuming needs no state but the step.

    The run reads an endless row of positions, each epoch a fresh permutation. Step s takes the positions
    `[s B, (s + 1) B)`, B being the batch over all processes and accumulation steps; so the same samples make up a step
    however B is divided.

    Args:
        num_samples (`int`): Rows of the data set.
        batch_size (`int`): Samples of one process in one forward.
        accumulation_steps (`int`): Forwards of one process in a step.
        num_processes (`int`): Number of processes.
        process_index (`int`): This process.
        start_step (`int`): First step, counted from 0.
        end_step (`int`): Step after the last one.
        seed (`int`): Seed of the run.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        accumulation_steps: int,
        num_processes: int,
        process_index: int,
        start_step: int,
        end_step: int,
        seed: int,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.num_processes = num_processes
        self.process_index = process_index
        self.start_step = start_step
        self.end_step = end_step
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start_step, self.end_step):
            for micro_step in range(self.accumulation_steps):
                chunk = (step * self.accumulation_steps + micro_step) * self.num_processes + self.process_index
                first = chunk * self.batch_size
                yield [self._row(position) for position in range(first, first + self.batch_size)]

    def _row(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.num_samples)
        if epoch not in self._permutations:
            # A batch spans two epochs at most times, so older permutations can go.
            self._permutations = {e: p for e, p in self._permutations.items() if e >= epoch - 1}
            self._permutations[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        return epoch, int(self._permutations[epoch][offset])
