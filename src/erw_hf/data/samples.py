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
"""From a `datasets` source to training samples whose every random draw is a function of (seed, epoch, sample key)."""

import hashlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import ClassLabel, Dataset, IterableDataset, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetNotFoundError
from datasets.utils.file_utils import xopen
from PIL import Image, UnidentifiedImageError

from erw_hf.data.digits import load_digits_dataset
from erw_hf.data.retrying import retried


logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
LABEL_COLUMNS = ("label", "cls", "labels", "class")


@dataclass(frozen=True)
class Source:
    """A data set that has been checked: its columns exist and its labels are classes.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The rows.
        image_column (`str`, *optional*): Column of images; `None` where a latent cache is read without them.
        label_column (`str`, *optional*): Column of class ids; `None` for data without labels.
        num_classes (`int`): Number of classes; 0 without labels.
        id2label (`dict[int, str]`, *optional*): Names of the classes, where the data set has them.
        is_latent_cache (`bool`): Whether the rows hold VAE moments, as `training/cache_latents.py` writes them.
        has_features (`bool`): Whether they hold an encoder's tokens too.
    """

    dataset: Dataset | IterableDataset
    image_column: str | None
    label_column: str | None
    num_classes: int
    id2label: dict[int, str] | None
    is_latent_cache: bool = False
    has_features: bool = False


# Columns of a latent cache, beside the image and the label.
MOMENTS_COLUMN = "moments"  # float16 bytes of (2 c, h, w), in C order
FEATURES_COLUMN = "features"  # bfloat16 bytes of (N, D), in C order
KEY_COLUMN = "key"  # what identifies the sample


def load_source(
    dataset_name: str,
    split: str = "train",
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    streaming: bool = False,
    retry_seconds: float = 300,
    needs_images: bool = True,
) -> Source:
    """
    Opens a data set and checks what can be checked before training.

    Args:
        dataset_name (`str`):
            Hub id, local folder (parquet, imagefolder, webdataset, or `save_to_disk`), or `"digits"` for the embedded
            one.
        split (`str`, *optional*, defaults to `"train"`): Split to read.
        dataset_config_name (`str`, *optional*): Configuration of the Hub data set.
        image_column (`str`, *optional*): Column of images. By default the first of `IMAGE_COLUMNS` that exists.
        label_column (`str`, *optional*):
            Column of labels. By default the first of `LABEL_COLUMNS` that exists; without any the data has no labels.
        num_classes (`int`, *optional*): Number of classes. By default the data set's own, else the largest label + 1.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they come, without downloading the data set first. Labels can then not be looked through
            beforehand: they must be a ClassLabel, or come with `num_classes`.
        retry_seconds (`float`, *optional*, defaults to 300): How long to go on trying while the Hub fails.
        needs_images (`bool`, *optional*, defaults to `True`):
            `False` leaves the images of a latent cache, and their bytes on the Hub, where they are. One that holds an
            encoder's tokens is always read so.

    Returns:
        [`Source`]: The data set and what is known of it.

    Raises:
        ValueError: for a missing column, an empty data set, labels that are no classes.
        PermissionError: for a gated data set that this account may not read; the message says how to get access.
    """
    dataset = retried(retry_seconds, lambda: _load(dataset_name, split, dataset_config_name, streaming))
    if streaming:
        first = retried(retry_seconds, lambda: next(iter(dataset.decode(False).take(1)), None))
    else:
        first = dataset[0] if len(dataset) > 0 else None
    if first is None:
        raise ValueError(f"the data set {dataset_name!r} (split {split!r}) is empty")
    columns = list(first)
    kind = {"is_latent_cache": MOMENTS_COLUMN in columns, "has_features": FEATURES_COLUMN in columns}
    if kind["is_latent_cache"] and (kind["has_features"] or not needs_images):
        image_column = None
        columns = [name for name in columns if name not in IMAGE_COLUMNS]
        if streaming:
            # Named when it is opened, since a stream reads all columns and drops what select_columns leaves out.
            dataset = retried(
                retry_seconds, lambda: _load(dataset_name, split, dataset_config_name, True, columns=columns)
            )
        else:
            dataset = dataset.select_columns(columns)
    else:
        image_column = find_column(columns, image_column, IMAGE_COLUMNS, "image_column")
        if image_column is None:
            raise ValueError(
                f"no image column among {columns}: tried {list(IMAGE_COLUMNS)}; name it with --image_column"
            )
        # Encoded bytes: a stream's shuffle holds many of them, and the key of a sample is their hash.
        if streaming:
            dataset = dataset.decode(False)  # streams of the Hub are decoded in threads, which a cast leaves on
        dataset = dataset.cast_column(image_column, ImageFeature(decode=False))
    if kind["is_latent_cache"] and KEY_COLUMN not in columns:
        raise ValueError(
            f"the latent cache {dataset_name!r} lacks the column {KEY_COLUMN!r}: make it with cache_latents.py"
        )
    label_column = find_column(columns, label_column, LABEL_COLUMNS, "label_column")
    if label_column is None:
        return Source(dataset, image_column, None, 0, None, **kind)
    if streaming:
        num_classes, names = _classes_of_stream(dataset, first, label_column, num_classes)
        return Source(
            dataset, image_column, label_column, num_classes, dict(enumerate(names)) if names else None, **kind
        )

    if dataset.features[label_column].dtype == "string":
        dataset = dataset.class_encode_column(label_column)
    feature = dataset.features[label_column]
    labels = np.asarray(dataset[label_column])
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be class ids or names, column {label_column!r} holds {feature}")
    names = feature.names if isinstance(feature, ClassLabel) else None
    if num_classes is None:
        num_classes = len(names) if names is not None else int(labels.max()) + 1
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(
            f"label {int(labels[row])} in row {row} of {dataset_name!r} is not in [0, {num_classes - 1}] "
            f"(num_classes={num_classes}); {int(outside.sum())} of {len(labels)} rows are outside"
        )
    id2label = dict(enumerate(names[:num_classes])) if names is not None else None
    return Source(dataset, image_column, label_column, num_classes, id2label, **kind)


def _classes_of_stream(
    dataset: IterableDataset, first: dict[str, Any], label_column: str, num_classes: int | None
) -> tuple[int, list[str] | None]:
    names: list[str] | None = getattr((dataset.features or {}).get(label_column), "names", None)
    if names is None and num_classes is None:
        raise ValueError(f"column {label_column!r} is no ClassLabel: a stream needs num_classes")
    if not isinstance(first[label_column], int):
        raise ValueError(f"labels must be class ids, column {label_column!r} holds {first[label_column]!r}")
    return (num_classes if num_classes is not None else len(names or ())), names


def _load(
    dataset_name: str, split: str, dataset_config_name: str | None, streaming: bool, **options: object
) -> Dataset | IterableDataset:
    dataset = None
    if dataset_name == "digits":
        dataset = load_digits_dataset()[split]
    elif os.path.isfile(os.path.join(dataset_name, "dataset_dict.json")):
        dataset = load_from_disk(dataset_name)[split]
    elif os.path.isfile(os.path.join(dataset_name, "state.json")):
        dataset = load_from_disk(dataset_name)
    if dataset is not None:
        return dataset.to_iterable_dataset(num_shards=min(len(dataset), 8)) if streaming else dataset
    try:
        return load_dataset(dataset_name, dataset_config_name, split=split, streaming=streaming, **options)
    except DatasetNotFoundError as error:
        if "gated" not in str(error):
            raise
        raise PermissionError(
            f"{error} Accept the terms there with your account, then `hf auth login` (or set HF_TOKEN) on this machine. "
            "Copies of ImageNet at 256 px that ask for no terms exist too: see the README"
        ) from error
    except pyarrow.ArrowInvalid:
        # The schema is read from the first file, which is broken: only the reader of parquet passes over it.
        return load_dataset(
            dataset_name, dataset_config_name, split=split, streaming=streaming, on_bad_files="warn", **options
        )
    except (EmptyDatasetError, ValueError) as error:
        if isinstance(error, EmptyDatasetError) or "no data" in str(error):
            raise ValueError(f"the data set {dataset_name!r} (split {split!r}) is empty: {error}") from error
        raise


def is_local(dataset_name: str) -> bool:
    """
    Args:
        dataset_name (`str`): See [`load_source`].

    Returns:
        `bool`: Whether reading it needs no Hub.
    """
    return dataset_name == "digits" or os.path.isdir(dataset_name)


def find_column(columns: list[str], wanted: str | None, candidates: tuple[str, ...], option: str) -> str | None:
    """
    Args:
        columns (`list[str]`): Columns of a data set.
        wanted (`str`, *optional*): The one that the user named.
        candidates (`tuple[str, ...]`): Names to look for otherwise, in order.
        option (`str`): Name of the user's option, for the message.

    Returns:
        `str`, *optional*: The column, `None` if none of the candidates exists.

    Raises:
        ValueError: if the named column does not exist.
    """
    if wanted is None:
        return next((name for name in candidates if name in columns), None)
    if wanted not in columns:
        raise ValueError(f"{option}={wanted!r} is no column of the data set; it has {columns}")
    return wanted


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
        random_flip (`bool`): Mirror half of the images.
        class_token_dim (`int`, *optional*): Width of the class token that is noised too; `None` for none.

    Raises:
        ValueError: for `random_flip` on a latent cache: a latent's mirror image is not the mirror image's latent.
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
        self.mode = {1: "L", 3: "RGB"}[channels]
        self.latent_shape = latent_shape
        self.seed = seed
        self.class_dropout_prob = class_dropout_prob
        self.random_flip = random_flip
        self.class_token_dim = class_token_dim
        if random_flip and source.is_latent_cache:
            raise ValueError("random_flip does not work on a latent cache: cache the flipped images too (--flipped)")

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
            image = center_crop(image.convert(self.mode), self.image_size)
            if flip and self.random_flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            pixels = np.asarray(image).reshape(self.image_size, self.image_size, -1).transpose(2, 0, 1)
            sample["pixels"] = torch.from_numpy(pixels.copy())
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
        source = self.maker.source
        for candidate in range(index, index + len(self)):
            row = source.dataset[candidate % len(self)]
            if source.image_column is None:
                image = None
                break
            try:
                image, _ = decode_image(row[source.image_column])
                break
            except IMAGE_ERRORS as error:
                # The next row takes its place, so that batches keep their size and a resumed run its order.
                self.skipped += 1
                name = image_name(row[source.image_column])
                logger.warning(
                    f"skipped row {candidate % len(self)} ({name}), which is no readable image ({error}); "
                    f"{self.skipped} skipped so far"
                )
        else:
            raise ValueError("the data set holds no readable image")
        label = None if source.label_column is None else row[source.label_column]
        return self.maker(
            image, label, epoch, candidate % len(self), row.get(MOMENTS_COLUMN), row.get(FEATURES_COLUMN)
        )


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
