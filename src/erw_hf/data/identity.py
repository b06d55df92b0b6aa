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
"""Recognising the data that a run or a cache was begun with, from its rows or files, without reading pixels.

For data that is not streamed: each row's label, and its image's name and length, in order. For a stream: the names and sizes
of its files, on the Hub the hash of their content. So a copy elsewhere or a new card counts as the same data.
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
from huggingface_hub import HfFileSystem

from erw_hf.data.cache import KEY_COLUMN, cache_record
from erw_hf.data.retrying import retried
from erw_hf.data.source import Source


def data_identity(source: Source, dataset_name: str, retry_seconds: float = 300) -> dict[str, Any]:
    """Identifies the data of a run: `rows` (`None` for a stream), `classes` (names in order, or their number),
    `columns`, `fingerprint`; it survives JSON. Raises FileNotFoundError if images do not exist."""
    dataset, classes = source.dataset, list((source.id2label or {}).values())
    if dataset_name == "digits":
        parts: Iterator[bytes] = iter(())  # encoded anew at each start, depending on Pillow's version
    elif isinstance(dataset, datasets.Dataset):
        parts = _rows(source, dataset, retry_seconds)
    else:
        parts = _files(source, dataset, retry_seconds)
    digest = hashlib.blake2b(digest_size=16)
    if (
        source.is_latent_cache
        and os.path.isdir(dataset_name)
        and (made := cache_record(dataset_name).get("vae_sha256"))
    ):
        digest.update(_line(made))  # its rows are the same whatever encoded them
    for part in parts:
        digest.update(part)
    return {
        "rows": len(dataset) if isinstance(dataset, datasets.Dataset) else None,
        "classes": [unicodedata.normalize("NFC", name) for name in classes] or source.num_classes,
        "columns": [source.image_column, source.label_column],
        "fingerprint": digest.hexdigest(),
    }


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What differs between two [`data_identity`] records, in words; `None` if it is the same data."""
    changes = [
        f"{name} were {_shown(before[name])} and are {_shown(now[name])}"
        for name in ("classes", "rows", "columns")
        if before[name] != now[name]
    ]
    if not changes and before["fingerprint"] != now["fingerprint"]:
        changes = ["names, sizes or order of its files or rows have changed"]
    return "; ".join(changes) or None


def _shown(value: object) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} ({', '.join(map(repr, value[:8]))}, ...)"
    return str(value)


def _line(*fields: object) -> bytes:
    return (unicodedata.normalize("NFC", repr(fields)) + "\n").encode(errors="surrogateescape")


def _rows(source: Source, dataset: datasets.Dataset, retry_seconds: float) -> Iterator[bytes]:
    if source.is_latent_cache:
        names = [KEY_COLUMN]
    else:
        names = [name for name in (source.image_column,) if name is not None]
    names += [name for name in (source.label_column,) if name is not None]
    table = dataset.select_columns(names).with_format("arrow")
    root = _common_folder(path for batch in table.iter(10_000) for path, _ in _images(source, batch) if path)
    missing = []
    for batch in table.iter(10_000):
        if source.label_column is not None:
            yield _line(batch[source.label_column].to_pylist())
        if source.is_latent_cache:
            yield _line(batch[KEY_COLUMN].to_pylist())
        for path, length in _images(source, batch):
            if length is None and path is not None:  # a file of its own
                size = _size(path, retry_seconds)
                if size is None and "://" not in path:
                    missing.append(path)
                yield _line(path.removeprefix(root), size)
            else:
                yield _line(os.path.basename(path or ""), length)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images do not exist, the first is {missing[0]}"
            + (": a link to a file that is gone" if os.path.islink(missing[0]) else "")
        )


def _images(source: Source, batch: pyarrow.Table) -> Iterator[tuple[str | None, int | None]]:
    """The path of each image, and the length of its content if that is in the row."""
    if source.is_latent_cache or source.image_column is None:
        return iter(())
    images = batch[source.image_column]
    if not pyarrow.types.is_struct(images.type):  # paths alone
        return zip(images.to_pylist(), [None] * len(images), strict=True)
    paths = pyarrow.compute.struct_field(images, "path").to_pylist()
    lengths = pyarrow.compute.binary_length(pyarrow.compute.struct_field(images, "bytes")).to_pylist()
    return zip(paths, lengths, strict=True)


def _files(source: Source, dataset: datasets.IterableDataset, retry_seconds: float) -> Iterator[bytes]:
    examples = dataset._ex_iterable
    while hasattr(
        examples, "ex_iterable"
    ):  # shuffled, cast and selected streams are wrapped around the one with files
        examples = examples.ex_iterable
    found = list(_leaves(examples.kwargs))
    for shard in found:
        if isinstance(shard, datasets.Dataset):
            yield from _rows(source, shard, retry_seconds)
    # An image in an archive is `zip://NAME::ARCHIVE`.
    paths = [str(leaf) for leaf in found if isinstance(leaf, str)]
    root = _common_folder(path.split("::")[-1] for path in paths if "://" not in path.split("::")[-1])
    for path in paths:
        inner, file = path.rpartition("::")[::2]
        if file.startswith("hf://"):  # hf://datasets/ID@REVISION/FILE: another revision may hold the same file
            yield _line(inner, re.sub("@[^/]*", "", file, count=1), _hash_on_hub(file, retry_seconds))
        elif "://" in file:
            yield _line(inner, file)
        else:
            yield _line(inner, file.removeprefix(root), _size(file, retry_seconds))


def _leaves(value: object) -> Iterator[object]:
    """Strings and datasets in lists."""
    if isinstance(value, Mapping):
        for inner in value.values():
            if isinstance(inner, (list, tuple)):
                yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, (str, datasets.Dataset)):
        yield value


def _common_folder(paths: Iterator[str]) -> str:
    shared: str | None = None
    for path in paths:
        shared = path if shared is None else os.path.commonprefix([shared, path])
    return os.path.dirname(shared or "") + "/" if shared else ""


def _hash_on_hub(file: str, retry_seconds: float) -> str:
    def blob_id() -> str:
        return str(HfFileSystem().info(file)["blob_id"])  # of the listing that `datasets` made

    return retried(retry_seconds, blob_id)


def _size(path: str, retry_seconds: float) -> int | None:
    def size() -> int | None:
        try:
            return os.stat(path).st_size
        except FileNotFoundError:  # the row names a file that never existed
            return None

    return retried(retry_seconds, size, listed=True)
