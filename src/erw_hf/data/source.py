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
"""Opening a data set: which columns it has, which classes, and whether it is a latent cache."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, IterableDataset, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetNotFoundError

from erw_hf.data.digits import load_digits_dataset
from erw_hf.data.retrying import retried


IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
LABEL_COLUMNS = ("label", "cls", "labels", "class")
# Columns of a latent cache, beside the image and the label.
MOMENTS_COLUMN = "moments"  # float16 bytes of (2 c, h, w), in C order
FEATURES_COLUMN = "features"  # bfloat16 bytes of (N, D), in C order
KEY_COLUMN = "key"  # what identifies the sample


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
    load = partial(_load, dataset_name, split, dataset_config_name, streaming)
    dataset = retried(retry_seconds, load)
    if streaming:
        first = retried(retry_seconds, lambda: next(iter(dataset.decode(False).take(1)), None))
    else:
        first = dict.fromkeys(dataset.column_names) if len(dataset) > 0 else None  # its image may be broken
    if first is None:
        raise ValueError(f"the data set {dataset_name!r} (split {split!r}) is empty")
    columns = list(first)
    is_latent_cache, has_features = MOMENTS_COLUMN in columns, FEATURES_COLUMN in columns
    if is_latent_cache and (has_features or not needs_images):
        image_column = None
        columns = [name for name in columns if name not in IMAGE_COLUMNS]
        if streaming:
            # Named when it is opened, since a stream reads all columns and drops what select_columns leaves out.
            dataset = retried(retry_seconds, partial(load, columns=columns))
        else:
            dataset = dataset.select_columns(columns)
    else:
        image_column = _find_image_column(columns, image_column)
        # Encoded bytes: a stream's shuffle holds many of them, and the key of a sample is their hash.
        if streaming:
            dataset = dataset.decode(False)  # streams of the Hub are decoded in threads, which a cast leaves on
        dataset = dataset.cast_column(image_column, ImageFeature(decode=False))
    if is_latent_cache and KEY_COLUMN not in columns:
        raise ValueError(
            f"the latent cache {dataset_name!r} lacks the column {KEY_COLUMN!r}: make it with cache_latents.py"
        )

    names = None
    label_column = find_column(columns, label_column, LABEL_COLUMNS, "label_column")
    if not streaming and not is_latent_cache:
        # Reading a row decodes all of its columns, other images too.
        dataset = dataset.select_columns([name for name in (image_column, label_column) if name is not None])
    if label_column is None:
        num_classes = 0
    elif streaming:
        num_classes, names = _classes_of_stream(dataset, first, label_column, num_classes)
    else:
        if dataset.features[label_column].dtype == "string":
            dataset = dataset.class_encode_column(label_column)
        num_classes, names = _classes_of_rows(dataset, dataset_name, label_column, num_classes)
    id2label = dict(enumerate(names)) if names else None
    return Source(dataset, image_column, label_column, num_classes, id2label, is_latent_cache, has_features)


def _find_image_column(columns: list[str], wanted: str | None) -> str:
    found = find_column(columns, wanted, IMAGE_COLUMNS, "image_column")
    if found is None:
        raise ValueError(f"no image column among {columns}: tried {list(IMAGE_COLUMNS)}; name it with --image_column")
    return found


def _classes_of_rows(
    dataset: Dataset, dataset_name: str, label_column: str, num_classes: int | None
) -> tuple[int, list[str] | None]:
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
    return num_classes, names[:num_classes] if names is not None else None


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


def check_cache_files(cache: Path) -> None:
    """
    Args:
        cache (`Path`): A folder that `training/cache_latents.py` writes.

    Raises:
        ValueError: if it is not done.
    """
    files = sorted((cache / "data").glob("train-*.parquet"))
    if not files or len(files) != int(files[0].stem.split("-of-")[1]):
        raise ValueError(f"{cache} lacks files: run cache_latents.py again to finish it")
