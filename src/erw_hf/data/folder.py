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
"""Reading a folder of image files: which folders are splits, which are classes, what is taken and what is ignored.

Names decide as little as possible: top folders are classes. They are splits only if all of them are named like splits and
hold class folders (or a metadata file). If two readings are possible, the folder is refused.
"""

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image


logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "cls", "labels", "class")

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
LABEL_WORDS = {"label", "labels", "class", "classes", "cls", "category", "categories", "target", "classname"}
_ROWS = (".parquet", ".arrow", ".tar", ".tgz", ".gz", ".zip")  # files that hold many images
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Images that Pillow does not read without a plug-in.
_UNREADABLE = (".heic", ".heif", ".jxl", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2")
# Files that systems and programs leave behind, besides hidden ones.
_LITTER = {"__macosx", "__pycache__", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"}


def nfc(name: str) -> str:
    """The name with composed characters (NFC): macOS writes "é" as two."""
    return unicodedata.normalize("NFC", name)


def say(to: logging.Logger, message: str, level: int = logging.WARNING) -> None:
    """Logs once what all ranks find alike."""
    if os.environ.get("RANK", "0") == "0":
        to.log(level, message)


def find_label_column(columns: Iterable[str], wanted: str | None, class_columns: Iterable[str] = ()) -> str | None:
    """
    The column of labels that the user named or that looks like one, `class_columns` among them; `None` if none does.

    Raises:
        ValueError: if the named column does not exist, or if columns look like labels but none has a usual name.
    """
    columns = list(columns)
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"label_column={wanted!r} is not a column of the dataset; it has {columns}")
        return wanted
    typed = set(class_columns)
    alike = [name for name in columns if name in typed or LABEL_WORDS & set(re.split(r"[\W_]+", name.lower()))]
    usual = [name for name in LABEL_COLUMNS if name in columns]
    if alike and not usual:
        raise ValueError(
            f"no column is named like {list(LABEL_COLUMNS)}, but {alike} may hold labels: name one with "
            f"--label_column {alike[0]}, or train without labels with --num_classes 0"
        )
    others = [name for name in alike if name not in usual[:1]]
    if others:
        say(logger, f"labels are read from the column {usual[0]!r}, not from {others}; --label_column names another")
    return usual[0] if usual else None


@cache
def image_extensions() -> frozenset[str]:
    """Extensions of the images that Pillow reads, in lower case, with the dot."""
    Image.init()
    readable = {name for name, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset(readable - {".h5", ".hdf", ".mpg", ".mpeg"})  # listed by Pillow, but it cannot decode them


def read_image_folder(
    folder: str, label_column: str | None = None, num_classes: int | None = None
) -> dict[str, Dataset] | None:
    """
    Reads which images a folder holds and their classes, and logs it.

    Args:
        label_column (`str`, *optional*): Column of `metadata.csv` (`.jsonl`, `.parquet`) that holds the labels.
        num_classes (`int`, *optional*): How many are wanted. With 0 missing labels are fine; with 1 the only folder of images
            is a class, which otherwise it is not.

    Returns:
        `dict[str, datasets.Dataset]`, *optional*: The rows of each split, in the order of the paths or of the
        metadata: `image` (undecoded paths), and `label` if there are classes. `None` for a folder with other files
        than images, or with a `README.md` that says how to read it.

    Raises:
        ValueError: for an ambiguous folder, for labels on disk that are not found, or for images of kinds that Pillow
            does not read; with what to do.
        OSError: for folders that cannot be read.
    """
    listing = _list(folder)
    rows = [name for name in listing.others if name.endswith(_ROWS) and Path(name).name not in _METADATA]
    if not listing.images:
        unread = _count_extensions(name for name in listing.others if name.lower().endswith(_UNREADABLE))
        if unread and not rows:
            raise ValueError(f"{folder} holds no image that Pillow reads, but {unread}: convert them to PNG or JPEG")
        return None
    if len(rows) > len(listing.images) or _describes_itself(folder):
        return None
    reader = _Reader(folder, listing, label_column)
    if any(name.endswith(("_file_name", "_file_names")) for name in reader.columns):
        return None  # several images per row, which the reader of `datasets` handles
    return reader.splits(num_classes)


class _Listing:
    """Files below a folder, as sorted paths relative to it with forward slashes."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.others: list[str] = []
        self.hidden: list[str] = []  # images that start with a dot or lie below such a folder
        self.empty: list[str] = []  # folders


def _list(folder: str) -> _Listing:
    def fail(error: OSError) -> None:
        raise error

    listing, extensions = _Listing(), image_extensions()
    for path, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        here = os.path.relpath(path, folder).replace(os.sep, "/")
        prefix = "" if here == "." else f"{here}/"
        if any(os.path.realpath(path).startswith(os.path.realpath(os.path.join(path, f)) + os.sep) for f in folders):
            raise ValueError(f"{path} holds a link to a folder above it: remove the link")
        if not folders and not files and prefix:
            listing.empty.append(here)
        hidden = prefix != "" and any(_is_litter(part) for part in here.split("/"))
        for name in files:
            is_image = os.path.splitext(name)[1].lower() in extensions
            if hidden or _is_litter(name):
                if is_image and not name.startswith("._"):  # macOS keeps attributes of files there
                    listing.hidden.append(prefix + name)
            else:
                (listing.images if is_image else listing.others).append(prefix + name)
    for names in (listing.images, listing.others, listing.hidden, listing.empty):
        names.sort()
    for name in listing.images:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{os.fsencode(name)!r} in {folder} is not a name in UTF-8: rename it") from None
    return listing


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _describes_itself(folder: str) -> bool:
    """Whether the card's front matter names the files of each split; `datasets` then follows it."""
    card = Path(folder) / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL) if card.is_file() else None
    return front is not None and re.search(r"^configs:", front[1], re.MULTILINE) is not None


def _count_extensions(names: Iterable[str]) -> str:
    counts = Counter(os.path.splitext(name)[1].lower() or "without extension" for name in names)
    return ", ".join(f"{count} {extension}" for extension, count in counts.most_common(6))


def _shown(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _branches(paths: list[str], prefix: str) -> tuple[list[str], dict[str, list[str]]]:
    """The paths directly in a folder, and those in each of its folders."""
    own: list[str] = []
    below: dict[str, list[str]] = {}
    for path in paths:
        top, separator, _ = path[len(prefix) :].partition("/")
        (below.setdefault(top, []) if separator else own).append(path)
    return own, below


def _is_few(own: list[str], below: dict[str, list[str]]) -> bool:
    """Whether images beside folders are strays, such as a cover: at most three, or one in a hundred."""
    nested = sum(len(paths) for paths in below.values())
    return len(own) < nested and len(own) <= max(3, nested // 100)


def _split_name(name: str) -> str | None:
    """`train2017`, `Val`, `test_images` are names of splits; `test_tube` is not."""
    words = re.findall(r"[a-z]+", name.lower())
    plain = len(words) == 1 or (len(words) == 2 and words[1] in ("set", "images", "imgs", "data", "split"))
    return _SPLITS.get(words[0]) if plain and re.fullmatch(r"[\W_\da-zA-Z]+", name) else None


class _Reader:
    """One reading of one folder: its splits, then the classes of each."""

    def __init__(self, folder: str, listing: _Listing, label_column: str | None) -> None:
        self.folder = folder
        self.listing = listing
        self.tables = [name for name in listing.others if Path(name).name in _METADATA]
        self.metadata = _read_metadata(folder, listing.images, self.tables)
        self.columns = sorted({column for _, row in self.metadata for column in row})
        self.notes: list[str] = []
        self.label_column = None
        if label_column in self.columns or set(LABEL_COLUMNS) & set(self.columns):
            self.label_column = find_label_column(self.columns, label_column if label_column in self.columns else None)

    def splits(self, num_classes: int | None) -> dict[str, Dataset]:
        self.num_classes = num_classes
        parts = self._find_splits(self.listing.images, "")
        classes: list[str] = []  # the same in all splits
        notes = self.notes
        for _ in range(2):  # a split's only folder is a class if another split has it too
            self.notes = list(notes)
            named = {split: self._label(paths, prefix, classes) for split, (paths, prefix) in parts.items()}
            labels = [label for rows in named.values() for _, label in rows]
            if self.label_column is None or all(isinstance(label, str) and label for label in labels):
                classes = sorted({str(label) for label in labels if label is not None})
        if self.label_column is None and num_classes != 0 and not classes:
            self._refuse_lost_labels()
        datasets = {split: self._rows(rows, classes) for split, rows in named.items()}
        self._say(datasets, classes)
        # The name of the folder itself may also be the split's.
        own = {prefix.rstrip("/").rpartition("/")[2]: datasets[split] for split, (_, prefix) in parts.items()}
        return datasets | {name: dataset for name, dataset in own.items() if _split_name(name) is not None}

    def _find_splits(self, paths: list[str], prefix: str) -> dict[str, tuple[list[str], str]]:
        own, below = _branches(paths, prefix)
        where = os.path.join(self.folder, prefix)
        named = {name: split for name in below if (split := _split_name(name)) is not None}
        if below and _is_few(own, below):
            parents = [name for name in named if _holds_folders(below[name], f"{prefix}{name}/")]
            described = [name for name in named if any(p.startswith(f"{prefix}{name}/") for p, _ in self.metadata)]
            first = os.path.join(where, next(iter(parents or named), ""))
            if len(named) == len(below):
                if not parents and not described and len(below) > 1:
                    raise ValueError(
                        f"the folders {_shown(below)} of {where} may be classes or splits without classes: name one, "
                        f"{first}, to read it without classes, or rename them if they are classes"
                    )
                self._leave(own, "beside the splits")
                unique = len(set(named.values())) == len(named)
                return {
                    (named[name] if unique else name): (below[name], f"{prefix}{name}/") for name in named
                }  # two names for one split, such as `dev` and `val`, stay apart
            if parents:
                raise ValueError(
                    f"{where} holds {_shown(below)}, and {_shown(parents)} holds folders itself: a split, or a class? "
                    f"Name {first} as the dataset if it is a split; if it is a class, rename it"
                )
            if len(below) > 1 and all(_holds_folders(below[name], f"{prefix}{name}/") for name in below):
                if all(_SPLITS.keys() & set(re.findall(r"[a-z]+", name.lower())) for name in below):
                    raise ValueError(
                        f"the folders {_shown(below)} of {where} may be classes or splits: name one, "
                        f"{os.path.join(where, next(iter(below)))}, if they are splits, rename them if they are classes"
                    )
            top = next(iter(below))
            if len(below) == 1 and (_holds_folders(below[top], f"{prefix}{top}/") or self.num_classes != 1):
                self._leave(own, f"beside the folder {prefix}{top}")
                self._note_only_folder(below[top], f"{prefix}{top}")
                return self._find_splits(below[top], f"{prefix}{top}/")
        return {"train": (paths, prefix)}

    def _label(self, paths: list[str], prefix: str, classes: list[str]) -> list[tuple[str, object]]:
        """The images to take, in order, and the label of each; `None` without labels."""
        if self.label_column is not None:
            labels = ((path, row[self.label_column]) for path, row in self._described(paths))
            return [(path, nfc(label).strip() if isinstance(label, str) else label) for path, label in labels]
        own, below = _branches(paths, prefix)
        where = os.path.join(self.folder, prefix)
        self._refuse_labels_by_path()
        if not _is_few(own, below) and self.metadata:
            return [(path, None) for path, _ in self._described(paths)]
        if not below:
            return [(path, None) for path in paths]
        if not _is_few(own, below):
            raise ValueError(
                f"{where} holds {len(own)} images itself and {len(paths) - len(own)} in the folders {_shown(below)}: put "
                "each image into the folder of its class, or move the folders away to train without classes"
            )
        top = next(iter(below))
        if len(below) == 1 and nfc(top) not in classes and self.num_classes != 1:
            self._leave(own, f"beside the folder {prefix}{top}")
            self._note_only_folder(below[top], f"{prefix}{top}")
            return self._label(below[top], f"{prefix}{top}/", classes)
        self._refuse_lost_folders(below, prefix)
        self._refuse_two_levels(below, prefix)
        self._leave(own, "outside of the class folders")
        nested = sum(path.count("/", len(prefix)) > 1 for path in paths)
        if nested:
            self.notes.append(f"{nested} in nested folders belong to the class above")
        return [(path, nfc(top)) for top, members in below.items() for path in members]

    def _note_only_folder(self, paths: list[str], folder: str) -> None:
        if self.num_classes != 0 and not _holds_folders(paths, f"{folder}/"):
            self.notes.append(f"{folder} is not a class, since it is the only folder (--num_classes 1 makes it one)")

    def _described(self, paths: list[str]) -> list[tuple[str, dict[str, Any]]]:
        """The images that the metadata names, in its order."""
        wanted, named = set(paths), {path for path, _ in self.metadata}
        self._leave([path for path in paths if path not in named], "that the metadata does not name")
        return [(path, row) for path, row in self.metadata if path in wanted]

    def _leave(self, paths: list[str], reason: str) -> None:
        if paths:
            self.notes.append(f"left {len(paths)} {reason} ({_shown(paths, 3)})")

    def _refuse_two_levels(self, below: dict[str, list[str]], prefix: str) -> None:
        """
        Refuses two levels of folders with the same names below (indoor, outdoor): either level may be the classes.
        """
        inner = []
        for top, paths in below.items():
            own, folders = _branches(paths, f"{prefix}{top}/")
            if not folders or not _is_few(own, folders):
                return
            inner.append(folders)
        counts = Counter(name for folders in inner for name in folders)
        shared = sum(count for count in counts.values() if count > 1)
        if 2 * shared < counts.total():
            where, first = os.path.join(self.folder, prefix), os.path.join(self.folder, prefix, next(iter(below)))
            raise ValueError(
                f"{where} holds folders of folders: are {_shown(below, 4)} the classes, or {_shown(counts, 4)}? For the "
                f"first, move the images one folder up; for the second, move those folders one up, or name one "
                f"part, {first}, as the dataset"
            )

    def _refuse_lost_folders(self, below: dict[str, list[str]], prefix: str) -> None:
        """Refuses a class whose pictures are all of an unreadable kind: it would be missing."""
        others = [name for name in self.listing.others if name.startswith(prefix)]
        for top, names in _branches(others, prefix)[1].items():
            unread = _count_extensions(name for name in names if name.lower().endswith(_UNREADABLE))
            if top not in below and unread:
                raise ValueError(
                    f"{os.path.join(self.folder, prefix, top)} holds no image that Pillow reads, but {unread}: convert "
                    "them to PNG or JPEG, or move the folder away"
                )

    def _refuse_labels_by_path(self) -> None:
        """Refuses StyleGAN's and EDM's layout: folders of a thousand images each, with labels in `dataset.json`."""
        if "dataset.json" not in self.listing.others:
            return
        with open(os.path.join(self.folder, "dataset.json"), errors="replace") as file:
            if re.search(r'"labels":\s*\[', file.read(10_000)):
                raise ValueError(
                    f"dataset.json in {self.folder} holds labels, which are not read: write them to metadata.csv, with the "
                    "columns file_name and label, or move it away"
                )

    def _refuse_lost_labels(self) -> None:
        """Refuses to ignore tables that look like labels."""
        find_label_column(self.columns, None)
        for name in self.listing.others:
            if name in self.tables or not name.lower().endswith((".csv", ".tsv", ".json", ".jsonl", ".txt")):
                continue
            words = Path(name).stem.lower()
            if not name.lower().endswith(".txt"):  # .txt may be a caption
                with open(os.path.join(self.folder, name), errors="replace") as file:
                    words += " " + file.readline(10_000).lower()
            if LABEL_WORDS & set(re.split(r"[\W_]+", words)):
                raise ValueError(
                    f"{self.folder} has no class folders, and {name} seems to hold labels: name it metadata.csv (or "
                    ".jsonl), with the columns file_name and label, or move it away to train without classes"
                )

    def _rows(self, rows: list[tuple[str, object]], classes: list[str]) -> Dataset:
        folder = os.path.abspath(self.folder)
        images, labels = [os.path.join(folder, path) for path, _ in rows], [label for _, label in rows]
        dataset = Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()}))
        if self.label_column is not None and not classes:  # numbers, or labels that are refused as in any other table
            return dataset.add_column(self.label_column, labels)
        if all(label is None for label in labels):
            return dataset
        index = {name: number for number, name in enumerate(classes)}
        numbers = [index[str(label)] for label in labels]
        return dataset.add_column(self.label_column or "label", numbers, feature=ClassLabel(names=classes))

    def _say(self, datasets: dict[str, Dataset], classes: list[str]) -> None:
        sizes = ", ".join(
            f"{len(dataset)} in {split}{' (without classes)' if classes and len(dataset.features) == 1 else ''}"
            for split, dataset in datasets.items()
        )
        what = f"classes by folder: {_shown(classes)}" if classes else "no classes"
        if self.label_column is not None:
            what = f"labels from the column {self.label_column!r} of {_shown(self.tables, 2)}"
        elif self.tables:
            self.notes.append(f"the columns {self.columns} of {_shown(self.tables, 2)} are not used")
        others = _count_extensions(
            name for name in self.listing.others if name not in self.tables and not name.lower().endswith(_UNREADABLE)
        )
        unread = _count_extensions(name for name in self.listing.others if name.lower().endswith(_UNREADABLE))
        notes = [
            *self.notes,
            *([f"ignored {unread}, which Pillow does not read: convert them to PNG or JPEG"] if unread else []),
            *([f"left the files {others}"] if others else []),
            *([f"left {len(self.listing.hidden)} hidden ({self.listing.hidden[0]})"] if self.listing.hidden else []),
            *([f"empty folders: {_shown(self.listing.empty, 4)}"] if self.listing.empty else []),
        ]
        level = logging.WARNING if notes or not classes else logging.INFO
        say(logger, f"images of {self.folder}: {'; '.join([sizes, what, *notes])}", level)


def _holds_folders(paths: list[str], prefix: str) -> bool:
    own, below = _branches(paths, prefix)
    return bool(below) and _is_few(own, below)


def _read_metadata(folder: str, images: list[str], tables: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The image that each row of the metadata files names, and the row's other columns."""
    known = {nfc(path): path for path in images} if tables else {}
    rows: list[tuple[str, dict[str, Any]]] = []
    for name in tables:
        path = os.path.join(folder, name)
        try:
            table = _read_table(path)
        except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if any(name.endswith(("_file_name", "_file_names")) for name in table.column_names):
            return [("", dict.fromkeys(table.column_names))]
        if "file_name" not in table.column_names:
            raise ValueError(f"{path} needs a column file_name, it has {table.column_names}")
        parent = os.path.dirname(name)
        for number, row in enumerate(table.to_pylist()):
            file_name = row.pop("file_name")
            relative = os.path.normpath(os.path.join(parent, str(file_name).replace("\\", "/"))).replace(os.sep, "/")
            if file_name is None or nfc(relative) not in known:
                raise ValueError(f"row {number} of {path} names {file_name!r}, which is not an image in this folder")
            rows.append((known[nfc(relative)], row))
    # A column is of names if it is in one of the tables.
    named = {column for _, row in rows for column, value in row.items() if isinstance(value, str)}
    return [
        (path, {column: str(v) if column in named and type(v) is int else v for column, v in row.items()})
        for path, row in rows
    ]


def _read_table(path: str) -> pyarrow.Table:
    if path.endswith(".parquet"):
        return pyarrow.parquet.read_table(path)
    # One block, since a row must not be longer than one; pyarrow counts its bytes in 32 bits.
    whole = min(max(1 << 20, os.path.getsize(path) + 1), (1 << 31) - 1)
    if path.endswith(".jsonl"):
        return pyarrow.json.read_json(path, pyarrow.json.ReadOptions(block_size=whole))
    options = pyarrow.csv.ReadOptions(block_size=whole)
    table = pyarrow.csv.read_csv(path, options)
    text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(table.column_names, pyarrow.string()))
    # A date, `true` and `007` are names, and only numbers as Python writes them are ids.
    for index, written in enumerate(pyarrow.csv.read_csv(path, options, convert_options=text).columns):
        kind, values = table.schema.types[index], table.column(index)
        is_name = pyarrow.types.is_temporal(kind) or pyarrow.types.is_boolean(kind)
        if pyarrow.types.is_integer(kind):
            same = pyarrow.compute.equal(values.cast(pyarrow.string()), pyarrow.compute.utf8_trim_whitespace(written))
            is_name = not pyarrow.compute.all(same).as_py()
        if is_name:
            table = table.set_column(index, table.column_names[index], written)
    return table
