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
"""Opening a dataset from any source (the digits, a local folder, `save_to_disk`, the Hub): its columns, its classes, whether it is
a latent cache."""

import errno
import io
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets import Image as ImageFeature
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import (
    DataFilesNotFoundError,
    DatasetGenerationError,
    DatasetNotFoundError,
    SplitsVerificationError,
)
from datasets.utils.file_utils import xopen
from huggingface_hub import HfApi
from PIL import Image, UnidentifiedImageError

from erw_hf.data.cache import FEATURES_COLUMN, KEY_COLUMN, MOMENTS_COLUMN
from erw_hf.data.decoding import BadImageError, decode_image, prepare_image, to_pixels
from erw_hf.data.digits import load_digits_dataset
from erw_hf.data.folder import LABEL_WORDS, find_label_column, image_extensions, nfc, read_image_folder, say
from erw_hf.data.retrying import retried
from erw_hf.names import alike, resolve_name


logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
LOOKED_AT = 1000  # rows at most; one of them must begin like an image


@dataclass(frozen=True)
class Source:
    """
    A dataset that has been checked: its columns exist and its labels are classes.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): The rows.
        image_column (`str`, *optional*): Column of images; `None` for a latent cache that is read without them.
        label_column (`str`, *optional*): Column of class ids; `None` for data without labels.
        num_classes (`int`): Number of classes; 0 without labels.
        id2label (`dict[int, str]`, *optional*): Names of the classes, if the dataset has them.
        is_latent_cache (`bool`): Whether the rows hold VAE moments, as `training/cache_latents.py` writes them.
        has_features (`bool`): Whether they also hold an encoder's tokens.
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
    Opens a dataset and checks what can be checked before training.

    Args:
        dataset_name (`str`):
            Hub id, local folder (parquet, imagefolder, webdataset, or `save_to_disk`), or `"digits"` for the embedded
            one.
        split (`str`, *optional*, defaults to `"train"`): Split to read.
        dataset_config_name (`str`, *optional*): Configuration of the Hub dataset.
        image_column (`str`, *optional*): Column of images. By default the first of `IMAGE_COLUMNS` that exists.
        label_column (`str`, *optional*):
            Column of labels. By default the one that [`~data.folder.find_label_column`] finds.
        num_classes (`int`, *optional*):
            Number of classes. By default the dataset's own, else the largest label + 1; 0 reads it without labels, 1 makes
            the only folder of images a class.
        streaming (`bool`, *optional*, defaults to `False`):
            Read row by row, without downloading first. A stream cannot be searched for its classes, so its labels must
            be a ClassLabel, or `num_classes` must be given.
        retry_seconds (`float`, *optional*, defaults to 300): How long to retry while the Hub fails.
        needs_images (`bool`, *optional*, defaults to `True`):
            `False` does not read (or download) the images of a latent cache. A cache with an encoder's tokens is always
            read without images.

    Returns:
        [`Source`]: The dataset and its properties.

    Raises:
        ValueError: for a missing column or split, an empty dataset, labels that are not classes, no readable image, or an
            ambiguous folder.
        FileNotFoundError: for a folder that does not exist.
        PermissionError: for a gated dataset that this account may not read; the message says how to get access.
    """
    dataset_name = resolve_dataset_name(dataset_name)
    load = partial(_load, dataset_name, dataset_config_name, streaming, label_column, num_classes, split=split)
    try:
        dataset, first = retried(retry_seconds, partial(_open, load))
    except (DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        if "BatchSize" not in f"{error} {error.__cause__}":
            raise
        # A parquet file without rows: by default the reader's batch size is the number of rows of the first group.
        load = partial(load, batch_size=1000)
        dataset, first = retried(retry_seconds, partial(_open, load))
    if first is None:
        raise ValueError(f"the dataset {dataset_name!r} (split {split!r}) is empty")
    columns = list(first)
    is_latent_cache, has_features = MOMENTS_COLUMN in columns, FEATURES_COLUMN in columns
    if is_latent_cache and (has_features or not needs_images):
        image_column = None
        columns = [name for name in columns if name not in IMAGE_COLUMNS]
        if streaming:
            # Passed when opening, since after select_columns a stream still reads all columns.
            dataset = retried(retry_seconds, partial(load, columns=columns))
        else:
            dataset = dataset.select_columns(columns)
    else:
        image_column, features = _find_image_column(columns, image_column), dataset.features or {}
        # Undecoded: a stream's shuffle holds many images, and the key of a sample is the hash of its bytes.
        if streaming:
            dataset = dataset.decode(
                False
            )  # also stops the threads that decode a stream from the Hub; a cast does not
        try:
            dataset = dataset.cast_column(image_column, ImageFeature(decode=False))
            retried(retry_seconds, partial(_check_images, dataset, image_column, dataset_name))
        except (TypeError, NotImplementedError, pyarrow.ArrowInvalid) as error:
            raise ValueError(
                f"the column {image_column!r} of {dataset_name!r} holds {features.get(image_column)}, not images: name "
                "the column of images with --image_column"
            ) from error
    if is_latent_cache and KEY_COLUMN not in columns:
        raise ValueError(
            f"the latent cache {dataset_name!r} lacks the column {KEY_COLUMN!r}: make it with cache_latents.py"
        )

    names = None
    label_column = _find_label_column(dataset.features, columns, label_column, num_classes)
    if not streaming and not is_latent_cache:
        # Reading a row decodes all of its columns, so drop other images.
        dataset = dataset.select_columns([name for name in (image_column, label_column) if name is not None])
    if label_column is None:
        if num_classes:
            raise ValueError(
                f"num_classes is {num_classes}, but {dataset_name!r} has no classes: put the images into one folder per class, name "
                "the column of labels with --label_column, or omit num_classes"
            )
        num_classes = 0
    elif streaming:
        num_classes, names = _classes_of_stream(dataset, first, label_column, num_classes)
    else:
        dataset = _encode_names(dataset, dataset_name, label_column, partial(load, split=None))
        num_classes, names = _classes_of_rows(dataset, dataset_name, label_column, num_classes)
    if dataset.info.builder_name == "imagefolder" and not os.path.isdir(dataset_name):
        retried(
            retry_seconds, partial(_say_what_the_hub_leaves, dataset_name, dataset_config_name, split, num_classes)
        )
    id2label = {number: nfc(name) for number, name in enumerate(names)} if names else None
    return Source(dataset, image_column, label_column, num_classes, id2label, is_latent_cache, has_features)


def read_images(source: Source, size: int, channels: int) -> tuple[torch.Tensor, torch.Tensor | None, list[str]]:
    """All images in memory, (N, C, size, size) uint8, with their classes, (N,), if there are any, and their files' paths.
    What cannot be decoded is logged and left out, as in training. Raises ValueError if nothing can."""
    if source.image_column is None:
        raise ValueError("a latent cache without images has none to read: name a dataset of images")
    pixels, labels, paths = [], [], []
    for row in source.dataset:
        encoded = row[source.image_column]
        try:
            image = decode_image(encoded)[0]
        except BadImageError as error:
            logger.warning(f"skipped: {error}")
            continue
        pixels.append(to_pixels(prepare_image(image, size, channels)))
        labels.append(0 if source.label_column is None else row[source.label_column])
        paths.append(encoded["path"] or "")
    if not pixels:
        raise ValueError("none of the images could be read")
    return torch.stack(pixels), None if source.label_column is None else torch.tensor(labels), paths


def _find_image_column(columns: list[str], wanted: str | None) -> str:
    found = find_column(columns, wanted, IMAGE_COLUMNS, "image_column")
    if found is None:
        raise ValueError(f"no image column among {columns}: tried {list(IMAGE_COLUMNS)}; name it with --image_column")
    return found


def _find_label_column(
    features: Features | None, columns: list[str], wanted: str | None, num_classes: int | None
) -> str | None:
    if num_classes == 0:
        return None
    found = find_label_column(columns, wanted, class_columns(features))
    if found is not None or MOMENTS_COLUMN in columns:
        return found
    for name, feature in (features or {}).items():
        if isinstance(feature, dict) and LABEL_WORDS & set(feature):
            raise ValueError(
                f"the column {name!r} holds {sorted(feature)}: labels inside another column are not read. Store them in "
                "their own column (in a webdataset, a file .cls), or train without labels with --num_classes 0"
            )
    others = [name for name in columns if name not in IMAGE_COLUMNS and not name.startswith("__")]
    if others:
        say(
            logger,
            f"reading without labels: none of the columns {others} looks like labels; set --label_column if one of them is",
        )
    return None


def _check_images(dataset: Dataset | IterableDataset, image_column: str, dataset_name: str) -> None:
    """Refuses data whose rows would all be skipped: of up to 1000 rows, at least one must begin like an image."""
    rows: Iterable[tuple[int, dict[str, Any]]]
    if isinstance(dataset, IterableDataset):
        rows = enumerate(dataset.take(LOOKED_AT))
    else:
        chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), LOOKED_AT)).astype(int).tolist()
        missing = dataset.data.column(image_column).null_count
        if "__key__" in dataset.column_names and 100 * missing > len(dataset):
            raise ValueError(
                f"{missing} of {len(dataset)} samples of {dataset_name!r} hold no .{image_column}: in all tars of a webdataset the "
                "files of the images must have the same extension"
            )
        images = dataset.select_columns([image_column])
        rows = ((number, images[number]) for number in chosen)
    first, count = "", 0
    for number, row in rows:
        reason = _why_unreadable(row[image_column])
        if reason is None:
            return
        first, count = first or f"row {number} {reason}", count + 1
    raise ValueError(
        f"none of {count} rows of {dataset_name!r} holds a readable image in the column {image_column!r}: {first}"
    )


def _why_unreadable(encoded: dict[str, Any] | None) -> str | None:
    """Why a value of an undecoded image column cannot be an image, judged by its first bytes; `None` if it can."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        return "holds none"
    # What JPEG, PNG, GIF, WebP and BMP files, and data URIs, begin with in Base64.
    head = bytes(encoded["bytes"][:11]) if encoded["bytes"] is not None else encoded["path"][:11].encode()
    if head.startswith((b"/9j/", b"iVBORw0KGgo", b"R0lGOD", b"UklGR", b"Qk", b"data:image/")) and (
        encoded["bytes"] is not None or not os.path.exists(encoded["path"])
    ):
        return "holds text in Base64: store the decoded bytes"
    try:
        with io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else xopen(encoded["path"], "rb") as file:
            Image.open(file)
    except FileNotFoundError:
        return f"names {encoded['path']!r}, which does not exist (paths are relative to {os.getcwd()})"
    except Exception as error:  # plug-ins of Pillow raise anything
        if isinstance(error, OSError) and error.errno not in (None, errno.ENAMETOOLONG):
            raise
        known = (
            f"{type(error).__name__}: {error}" if not isinstance(error, UnidentifiedImageError) else "unknown format"
        )
        return f"({encoded['path'] or 'an image without a name'}) is not an image ({known})"
    return None


def _encode_names(
    dataset: Dataset, dataset_name: str, label_column: str, load_splits: Callable[[], Mapping[str, Dataset]]
) -> Dataset:
    """Checks that every row has one label; names become a ClassLabel of those of all splits, in the order of their composed
    characters."""
    labels = dataset[label_column][:]
    missing = [
        row
        for row, label in enumerate(labels)
        if label is None or label != label or (isinstance(label, str) and not label.strip())
    ]
    if missing:
        raise ValueError(
            f"row {missing[0]} of {dataset_name!r} has no label: the column {label_column!r} holds "
            f"{labels[missing[0]]!r}; {len(missing)} of {len(labels)} rows have none"
        )
    several = next((row for row, label in enumerate(labels) if isinstance(label, (list, dict))), None)
    if several is not None:
        raise ValueError(
            f"row {several} of {dataset_name!r} holds {labels[several]!r} in the column {label_column!r}: a label is one "
            "class id or name"
        )
    if not isinstance(labels[0], str):
        return dataset
    labels = [nfc(label).strip() for label in labels]
    others = [part[label_column][:] for part in load_splits().values() if label_column in part.column_names]
    found = {nfc(label).strip() for part in (labels, *others) for label in part if isinstance(label, str)}
    names = sorted(found - {""})
    index = {name: number for number, name in enumerate(names)}
    encoded = dataset.remove_columns(label_column)
    return encoded.add_column(label_column, [index[label] for label in labels], feature=ClassLabel(names=names))


def _classes_of_rows(
    dataset: Dataset, dataset_name: str, label_column: str, num_classes: int | None
) -> tuple[int, list[str] | None]:
    feature = dataset.features[label_column]
    labels = np.asarray(dataset[label_column])
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be class ids or names, column {label_column!r} holds {feature} (row 0: {dataset[0][label_column]!r})"
        )
    names = feature.names if isinstance(feature, ClassLabel) else None
    if names is not None:
        names = first_classes(names, num_classes)
        num_classes = len(names)
    elif num_classes is None:
        num_classes = int(labels.max()) + 1
        empty = np.setdiff1d(np.arange(num_classes), labels)
        if empty.size:
            hint = "do its labels count from 1?" if empty.tolist() == [0] else "are its labels ids of something else?"
            say(
                logger,
                f"{empty.size} of {num_classes} classes have no image in {dataset_name}, the first is {empty[0]}: {hint}",
            )
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(
            f"label {int(labels[row])} in row {row} of {dataset_name!r} is not in [0, {num_classes - 1}] "
            f"(num_classes={num_classes}); {int(outside.sum())} of {len(labels)} rows are outside"
        )
    return num_classes, names


def _classes_of_stream(
    dataset: IterableDataset, first: dict[str, Any], label_column: str, num_classes: int | None
) -> tuple[int, list[str] | None]:
    names: list[str] | None = getattr((dataset.features or {}).get(label_column), "names", None)
    if names is None and num_classes is None:
        raise ValueError(f"column {label_column!r} is not a ClassLabel: for a stream, set num_classes")
    if not isinstance(first[label_column], int) or isinstance(first[label_column], bool):
        raise ValueError(
            f"labels of a stream must be class ids, row 0 holds {first[label_column]!r} in the column {label_column!r}; "
            "names can be read only without --streaming"
        )
    if names is None:
        return num_classes, None  # type: ignore[return-value]
    names = first_classes(names, num_classes)
    return len(names), names


def first_classes(names: list[str], num_classes: int | None) -> list[str]:
    """
    Classes of a dataset that names them: all, or the first `num_classes`. With more, an adapter's or a fine-tuned model's new classes
    would take ids, and so names, of the model that it starts from.

    Args:
        names (`list[str]`): Of the dataset's classes.
        num_classes (`int`, *optional*): What the run asks for.

    Raises:
        ValueError: for more classes than names.
    """
    if num_classes is not None and num_classes > len(names):
        raise ValueError(
            f"num_classes={num_classes}, but the dataset names {len(names)} classes ({', '.join(names[:3])} ...): omit num_classes "
            "(of the recipe, or --num_classes null)"
        )
    return names[:num_classes]


def _open(load: Callable[[], Dataset | IterableDataset]) -> tuple[Dataset | IterableDataset, dict[str, Any] | None]:
    """The dataset and its first row (of a stream) or its columns without values; `None` if it is empty."""
    dataset = load()
    if isinstance(dataset, IterableDataset):
        return dataset, next(iter(dataset.decode(False).take(1)), None)
    return dataset, dict.fromkeys(dataset.column_names) if len(dataset) > 0 else None  # its image may be broken


def _load(
    dataset_name: str,
    dataset_config_name: str | None,
    streaming: bool,
    label_column: str | None,
    num_classes: int | None,
    split: str | None,
    **options: object,
) -> Any:
    """The rows of a split; all splits, by name, for `None`."""
    splits: Mapping[str, Dataset] | None = None
    shards = 8
    if dataset_name == "digits":
        splits = load_digits_dataset()
    elif os.path.isfile(os.path.join(dataset_name, "dataset_dict.json")):
        splits = load_from_disk(dataset_name)
    elif os.path.isfile(os.path.join(dataset_name, "state.json")):
        dataset = load_from_disk(dataset_name)
        splits = {"train": dataset, str(dataset.split or "train"): dataset}  # it has one split, whatever its name
    elif dataset_config_name is None and os.path.isdir(dataset_name):
        splits, shards = read_image_folder(dataset_name, label_column, num_classes), 1
    if splits is not None:
        if split is None:
            return splits
        dataset = _take_split(splits, split, dataset_name)
        if not streaming:
            return dataset
        # A stream mixes its rows in blocks, and folders come a class at a time.
        return dataset.shuffle(seed=0, keep_in_memory=True).to_iterable_dataset(num_shards=min(len(dataset), shards))
    try:
        dataset = load_dataset(dataset_name, dataset_config_name, split=split, streaming=streaming, **options)
    except DatasetNotFoundError as error:
        if "gated" not in str(error):
            raise FileNotFoundError(
                f"{dataset_name!r} is neither a dataset on the Hub that this account can read nor a folder in "
                f"{os.getcwd()}{alike(dataset_name)}: {error}"
            ) from error
        raise PermissionError(
            f"{error} Accept the terms there with your account, then `hf auth login` (or set HF_TOKEN) on this machine. "
            "Copies of ImageNet at 256 px that ask for no terms exist too: see the README"
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" in str(error):
            raise ValueError(
                f"{dataset_name!r} is a script, which `datasets` no longer runs: look for the same data as parquet, on the Hub "
                'often in the branch "refs/convert/parquet"'
            ) from error
        raise
    except ConnectionError as error:
        if "OfflineModeIsEnabled" in str(error):
            raise FileNotFoundError(
                f"{dataset_name!r} is neither a folder in {os.getcwd()}{alike(dataset_name)} nor in the cache, and "
                "HF_HUB_OFFLINE is set"
            ) from error
        if alike(dataset_name):
            raise FileNotFoundError(
                f"there is no folder {dataset_name!r} in {os.getcwd()}{alike(dataset_name)}; the Hub, which may have "
                f"a dataset of this name, does not answer ({error})"
            ) from error
        raise
    except pyarrow.ArrowInvalid:
        # The schema comes from the first file, which is broken; only the parquet reader skips such a file.
        dataset = load_dataset(
            dataset_name, dataset_config_name, split=split, streaming=streaming, on_bad_files="warn", **options
        )
    except SplitsVerificationError as error:
        raise ValueError(
            f"the README.md of {dataset_name!r} counts other rows than its files hold; remove `dataset_info` from it: {error}"
        ) from error
    except (EmptyDatasetError, DataFilesNotFoundError, ValueError) as error:
        if os.path.isdir(dataset_name) and set(dataset_name) & set("[]*?"):
            raise ValueError(
                f"`datasets` takes [, ], * and ? in the path {dataset_name!r} for a pattern: rename the folder"
            ) from error
        if isinstance(error, FileNotFoundError) or "no data" in str(error):
            raise ValueError(f"the dataset {dataset_name!r} (split {split!r}) is empty: {error}") from error
        if "Unknown split" in str(error) or "Bad split" in str(error):
            raise ValueError(f"the dataset {dataset_name!r} has no split {split!r}: {error}") from error
        raise
    if dataset_config_name is None and os.path.isdir(dataset_name):
        _say_what_no_split_has(dataset_name)
    return dataset


def _take_split(splits: Mapping[str, Dataset], split: str, dataset_name: str) -> Dataset:
    """The rows of a split, or of an expression of `datasets` such as `train[:10%]` or `train+test`."""
    if split in splits:  # a name may hold what an expression cannot, such as a hyphen
        return splits[split]
    check_split({name: len(rows) for name, rows in splits.items()}, split, dataset_name)
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    taken = [
        rows if part.to - part.from_ == len(rows) else rows.select(range(part.from_, part.to))
        for part in parts
        for rows in (splits[part.splitname],)
    ]
    return taken[0] if len(taken) == 1 else concatenate_datasets(taken)


def check_split(rows: Mapping[str, int], split: str, dataset_name: str) -> None:
    """Raises ValueError if `split` is not among the splits in `rows`, which maps their names to numbers of rows."""
    try:
        ReadInstruction.from_spec(split).to_absolute(dict(rows))
    except (ValueError, AssertionError) as error:
        raise ValueError(f"the dataset {dataset_name!r} has no split {split!r}, but {' and '.join(rows)}") from error


def _say_what_no_split_has(folder: str) -> None:
    """Warns about files in no split: `datasets` makes splits from file names and does not read the others."""
    files = load_dataset_builder(folder).config.data_files or {}
    used = {os.path.realpath(path) for paths in files.values() for path in paths if "://" not in path}
    kinds = {os.path.splitext(path)[1] for path in used}
    there = [path for path in Path(folder).rglob("*") if path.suffix in kinds and path.is_file()]
    left = sorted(str(path.relative_to(folder)) for path in there if os.path.realpath(path) not in used)
    if left and used:
        say(
            logger,
            f"{len(left)} files of {folder} are in no split and are not read ({', '.join(left[:3])}): the splits "
            f"{', '.join(map(str, files))} consist of the files with their names. Rename all files alike for one split, or list the splits in README.md",
        )


def _say_what_the_hub_leaves(name: str, config_name: str | None, split: str, num_classes: int | None) -> None:
    """`datasets` reads a folder of images on the Hub by its own rules, by which pictures and classes can get lost."""
    used = load_dataset_builder(name, config_name).config.data_files or {}
    paths = {split: [str(url).partition("@")[2].partition("/")[2] for url in urls] for split, urls in used.items()}
    taken = {path for members in paths.values() for path in members}
    images = [path for path in HfApi().list_repo_files(name, repo_type="dataset") if _is_image(path)]
    left = [path for path in images if path not in taken]
    folders = sorted({os.path.dirname(path) for path in paths.get(split, ()) if _is_image(path)})
    advice = (
        f"To have its top folders read as classes: hf download {name} --repo-type dataset --local-dir FOLDER, and name that "
        "folder"
    )
    if left:
        say(
            logger,
            f"{len(left)} of {len(images)} images of {name} are in no split and are not read ({', '.join(left[:3])}): the splits "
            f"{', '.join(map(str, paths))} were made of those that are named so. {advice}",
        )
    if not num_classes and len(folders) > 1:
        say(
            logger,
            f"the images of {name} lie in {len(folders)} folders ({', '.join(folders[:4])}), read without classes. {advice}",
        )


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in image_extensions()


def resolve_dataset_name(dataset_name: str) -> str:
    """
    The name with `~` and environment variables expanded.

    Raises:
        ValueError: if it is a file.
        FileNotFoundError: if it can only be a local folder and does not exist.
    """
    name = resolve_name(dataset_name, "dataset_name")
    if name == "digits" and os.path.isdir(name):
        raise ValueError(
            "dataset_name=digits is the embedded dataset, and here is a folder digits, too: write ./digits for the folder, or "
            "start elsewhere"
        )
    if name == "digits" or os.path.isdir(name):
        return name
    if os.path.isfile(name):
        folder = os.path.dirname(name) or "."
        if name.lower().endswith((".zip", ".tgz", ".tar.gz", ".7z", ".rar")):
            advice = "unpack it, and name the folder"
        elif name.lower().endswith((".parquet", ".arrow", ".csv", ".json", ".jsonl", ".tar")):
            advice = f"name its folder, {folder}, or move it to a folder of its own"
        else:
            advice = "name a folder of images, of parquet files or of tars, a Hub id, or digits"
        raise ValueError(f"dataset_name={dataset_name!r} is a file: {advice}")
    return name


def is_local(dataset_name: str) -> bool:
    """
    Whether the data is read without the Hub.

    Raises:
        ValueError: if it is a file.
        FileNotFoundError: if it can only be a local folder and does not exist.
    """
    name = resolve_dataset_name(dataset_name)
    return name == "digits" or os.path.isdir(name)


def class_columns(features: Features | None) -> list[str]:
    """The columns whose type holds classes."""
    return [name for name, feature in (features or {}).items() if isinstance(feature, ClassLabel)]


def find_column(columns: list[str], wanted: str | None, candidates: tuple[str, ...], option: str) -> str | None:
    """
    The column that the user named, or the first of `candidates` that exists, or `None`.

    Raises:
        ValueError: if the named column does not exist; `option` names it in the message.
    """
    if wanted is None:
        return next((name for name in candidates if name in columns), None)
    if wanted not in columns:
        raise ValueError(f"{option}={wanted!r} is not a column of the dataset; it has {columns}")
    return wanted
