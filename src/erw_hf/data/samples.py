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
"""From rows to training samples: every random draw, as a function of (seed, epoch, sample key), and the order of samples.

The seeds of images drawn for an evaluation are in `evaluation.images`.
"""

import hashlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from erw_hf.data.cache import FEATURES_COLUMN, MOMENTS_COLUMN
from erw_hf.data.decoding import BadImageError, crop_at, decode_image, prepare_image, to_pixels
from erw_hf.data.source import Source


logger = logging.getLogger(__name__)

IN_A_ROW = 10_000  # broken images after which the data as a whole is at fault


def sample_rng(seed: int, epoch: int, key: str | int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: the same on any rank, in any loader worker and after any restart."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


class SampleMaker:
    """
    Turns a row into a training sample: the image and all random draws for it.

    Args:
        source ([`Source`]): The data.
        image_size (`int`): Side of the image in pixels.
        channels (`int`): 3 for RGB, 1 for grey.
        latent_shape (`tuple[int, int, int]`): Shape (C, h, w) of the noise.
        seed (`int`): Seed of the run.
        class_dropout_prob (`float`): Probability of the null class.
        random_flip (`bool`): Mirror half of the images; not for a cache, whose latents cannot be mirrored.
        class_token_dim (`int`, *optional*): Width of the class token that is also noised; `None` for none.
        num_tokens (`int`, *optional*, defaults to 0): Tokens of the transformer; some may be hidden.
        num_hidden (`int`, *optional*, defaults to 0): How many tokens per sample the alignment does not see.
        random_crop (`bool`, *optional*, defaults to `False`): Take a part of the image, [`~data.decoding.crop_at`]; not for a cache.
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
        num_tokens: int = 0,
        num_hidden: int = 0,
        random_crop: bool = False,
    ) -> None:
        self.source = source
        self.image_size = image_size
        self.channels = channels
        self.latent_shape = latent_shape
        self.seed = seed
        self.class_dropout_prob = class_dropout_prob
        self.random_flip = random_flip
        self.class_token_dim = class_token_dim
        self.num_tokens = num_tokens
        self.num_hidden = num_hidden
        self.random_crop = random_crop

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
        A sample of an image of any mode and size, or of what a latent cache holds of it.

        Returns:
            `dict[str, torch.Tensor]`: `pixels` (C, H, W) uint8 if there is an image, `label`, `drop`, `time_normal`,
            `noise` (c, h, w), `posterior_noise` (c, h, w), with a class token `class_noise` (E,), with hidden tokens
            `hidden` (N,) bool and, from a cache, `moments` (2 c, h, w) float16 and `features` (N D,) bfloat16.
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
        if self.num_hidden > 0:
            sample["hidden"] = torch.zeros(self.num_tokens, dtype=torch.bool)
            sample["hidden"][rng.permutation(self.num_tokens)[: self.num_hidden]] = True
        if image is not None:
            if self.random_crop:
                image = crop_at(image, *rng.random(3))
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


def read_row(
    source: Source, index: int, retry_seconds: float = 300, skipped: int = 0
) -> tuple[int, dict[str, Any], Image.Image | None, int]:
    """
    Number of a row, the row, its image, and rows skipped so far. A broken row is named in the log and replaced by the
    next readable one, so that batches keep their size and a resumed run keeps its order.

    Raises:
        ValueError: if no row is readable, or `IN_A_ROW` rows in a row are not.
        OSError: naming the file, if the system cannot read it.
    """
    rows = len(source.dataset)
    for candidate in range(index, index + min(rows, IN_A_ROW)):
        number = candidate % rows
        row = source.dataset[number]
        if source.image_column is None:
            return number, row, None, skipped
        try:
            image, _ = decode_image(row[source.image_column], retry_seconds)
            return number, row, image, skipped
        except BadImageError as bad:
            error = bad
            skipped += 1
            logger.warning(f"skipped row {number}: {error}; {skipped} skipped so far")
    raise ValueError(
        f"none of {min(rows, IN_A_ROW)} rows in a row holds a readable image: column {source.image_column!r} holds "
        f"something else, or its files are damaged; the last one: {error}"
    )


class TrainingSamples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Training samples of a dataset that is not streamed, read in any order."""

    def __init__(self, maker: SampleMaker, retry_seconds: float = 300) -> None:
        self.maker = maker
        self.retry_seconds = retry_seconds
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.maker.source.dataset)

    def __getitem__(self, position: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = position
        source = self.maker.source
        number, row, image, self.skipped = read_row(source, index, self.retry_seconds, self.skipped)
        label = None if source.label_column is None else row[source.label_column]
        return self.maker(image, label, epoch, number, row.get(MOMENTS_COLUMN), row.get(FEATURES_COLUMN))


class StepSampler(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """The batches of one rank as a pure function of the step, so that resuming needs only the step.

    The run reads an endless sequence of positions; each epoch is a fresh permutation. Step s takes the positions
    `[s B, (s + 1) B)`, where B is the batch over all ranks and accumulation steps. So a step has the same samples
    however B is divided."""

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


def outlive_signals(_: int) -> None:
    """For a loader's workers. Terminals and schedulers signal all processes of a run at once, and the main one still needs
    batches until its checkpoint: of SIGTERM only the loader's own counts."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_loader, daemon=True).start()


def _end_with_loader() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
