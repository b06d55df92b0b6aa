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
"""Streaming with exact resume: shard order and blocks of rows are shuffled, and a small state holds the position.

`datasets` resumes a stream exactly unless it has a shuffle buffer, whose content its state does not include. So `datasets`
shuffles only the order of shards; rows are shuffled here, in blocks that are read again on resume.
"""

import copy
import hashlib
import itertools
import logging
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from erw_hf.data.cache import FEATURES_COLUMN, KEY_COLUMN, MOMENTS_COLUMN
from erw_hf.data.decoding import BadImageError, decode_image, image_name, read_file
from erw_hf.data.retrying import Backoff, retried
from erw_hf.data.samples import IN_A_ROW, SampleMaker, outlive_signals


logger = logging.getLogger(__name__)

BLOCK = (
    1000  # rows shuffled together: 100 MB of ImageNet's JPEG files per worker, and at most what a resume reads again
)

# Errors of readers for a truncated or damaged file. pyarrow also raises a plain OSError without errno.
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, pyarrow.ArrowInvalid, EOFError)


def is_broken_shard(error: Exception) -> bool:
    """Whether an error in reading a shard is the fault of its file, so that a retry would not help."""
    return isinstance(error, _BROKEN) or (type(error) is OSError and error.errno is None)


class RowReader:
    """
    The rows of one epoch of a stream, despite network failures and broken shards.

    Failures are retried with back-off. A truncated shard is counted, named and abandoned where it breaks, and reading
    continues with the next one. Neither changes the order of the other rows, so such a run also resumes exactly.

    Args:
        dataset (`datasets.IterableDataset`): The stream; its epoch is set.
        state (`dict`, *optional*): Where to begin, from `state_dict`; `None` begins the epoch.
        retry_seconds (`float`): How long to retry while no row comes.
        stride (`int`, *optional*, defaults to 1): Return only every `stride`-th row, from `first`.
        image_column (`str`, *optional*): Column of undecoded images; if they are paths, the files are read.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        state: dict[str, Any] | None,
        retry_seconds: float,
        stride: int = 1,
        first: int = 0,
        image_column: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.retry_seconds = retry_seconds
        self.stride = stride
        self.first = first
        self.image_column = image_column
        self.broken_shards = 0
        self._row = 0 if state is None else state["row"]
        self._loaded: dict[str, Any] | None = None  # the loaded state, until the first row
        self._restart(None if state is None else state["upstream"])

    def _restart(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.dataset.load_state_dict(state)
        self._loaded = state
        self._rows = iter(self.dataset)

    def _upstream(self) -> dict[str, Any]:
        # Before its first row, a loaded stream of `datasets` reports the wrong position, so the loaded state is kept.
        return copy.deepcopy(self.dataset.state_dict()) if self._loaded is None else self._loaded

    def state_dict(self) -> dict[str, Any]:
        """The position of the next row."""
        return {"upstream": self._upstream(), "row": self._row}

    def read(self, count: int) -> list[dict[str, Any]]:
        """Up to `count` rows; fewer at the end of the epoch, none after it. Raises ConnectionError if no row came for
        `retry_seconds`."""
        rows: list[dict[str, Any]] = []
        backoff = Backoff(self.retry_seconds, listed=True)
        while True:
            try:
                while len(rows) < count:
                    row = next(self._rows)
                    self._loaded = None
                    mine = self._row % self.stride == self.first
                    self._row += 1
                    backoff.succeeded()
                    if mine:
                        rows.append(self._with_content(row))
                return rows
            except StopIteration:
                return rows
            except Exception as error:
                if is_broken_shard(error):
                    self._skip_shard(error)
                else:
                    backoff.failed(error)
                    self._restart(self._upstream())

    def _with_content(self, row: dict[str, Any]) -> dict[str, Any]:
        """Replaces the path of an image by the file's content here, where network failures are retried."""
        if self.image_column is None or not (image := row[self.image_column]) or image["bytes"] is not None:
            return row
        try:
            content = retried(self.retry_seconds, lambda: read_file(image["path"]), listed=True)
        except BadImageError:
            content = b""  # will be skipped and named
        return row | {self.image_column: {"bytes": content, "path": image["path"]}}

    def _skip_shard(self, error: Exception) -> None:
        broken = copy.deepcopy(_innermost(self._upstream()))  # before a fresh state is made, which resets it
        examples = self.dataset._prepare_ex_iterable_for_iteration()
        fresh = {"examples_iterable": examples._init_state_dict(), "epoch": self.dataset.epoch}
        # Shuffled and cast streams are wrapped around the one that knows the shards.
        while not hasattr(examples, "kwargs"):
            examples = examples.ex_iterable
        worker = torch.utils.data.get_worker_info()
        if worker is not None:  # how `datasets` assigns shards to workers
            examples = examples.shard_data_sources(worker.num_workers, worker.id, contiguous=False)
        files = next(value for value in examples.kwargs.values() if isinstance(value, list))
        self.broken_shards += 1
        logger.warning(
            f"skipped the rest of the broken shard {files[broken['shard_idx']]} after {broken['shard_example_idx']} of its examples "
            f"({type(error).__name__}: {error}); {self.broken_shards} broken so far in this epoch"
        )
        _innermost(fresh)["shard_idx"] = broken["shard_idx"] + 1
        self._restart(fresh)


def _innermost(state: dict[str, Any]) -> dict[str, Any]:
    while "shard_idx" not in state:
        state = state["examples_iterable"]
    return state


class StreamingSamples(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """An endless stream of one rank's training samples, epoch after epoch, each in another order; `block` rows are
    shuffled together.

    Each sample comes exactly once per epoch over all ranks and workers. Its random draws depend on the seed, the
    epoch and the image's own bytes, so the numbers of ranks and workers do not change them. A file that is not a
    readable image is skipped, counted and named in the log."""

    def __init__(
        self,
        maker: SampleMaker,
        num_processes: int,
        process_index: int,
        block: int = BLOCK,
        retry_seconds: float = 300,
    ) -> None:
        dataset = maker.source.dataset
        # Each rank takes its share of the shards or, if there are too few, all of them and every N-th row.
        self.stride = 1 if dataset.num_shards >= num_processes else num_processes
        if self.stride == 1 and num_processes > 1:
            dataset = dataset.shard(num_processes, process_index, contiguous=False)
        self.dataset = dataset.shuffle(seed=maker.seed, buffer_size=1, max_buffer_input_shards=1)
        self.maker = maker
        self.process_index = process_index
        self.block = block
        self.retry_seconds = retry_seconds
        self.skipped = 0
        self._state: dict[str, Any] = {"epoch": 0, "block": 0, "offset": 0, "reader": None}

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream; less than a kilobyte."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves the stream to a position that `state_dict` gave."""
        self._state = dict(state)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        worker_id = 0 if worker is None else worker.id
        # `datasets` keeps the epoch in shared memory: without a copy, workers would change each other's.
        dataset = copy.deepcopy(self.dataset)
        image_column = self.maker.source.image_column
        first = self.process_index if self.stride > 1 else 0
        state = self._state
        for epoch in itertools.count(state["epoch"]):
            dataset.set_epoch(epoch)  # must precede loading the state, which is ignored otherwise
            reader = RowReader(dataset, state["reader"], self.retry_seconds, self.stride, first, image_column)
            whole_epoch, samples, in_a_row = state["block"] == state["offset"] == 0, 0, 0
            for block in itertools.count(state["block"]):
                position = reader.state_dict() if block > 0 else None
                buffer = reader.read(self.block)
                if not buffer:
                    break
                if epoch == block == worker_id == self.process_index == 0:
                    self._warn_if_sorted(buffer)
                rng = np.random.default_rng([self.maker.seed, epoch, self.process_index, worker_id, block])
                order = rng.permutation(len(buffer))
                for offset in range(state["offset"], len(buffer)):
                    self._state = {"epoch": epoch, "block": block, "offset": offset + 1, "reader": position}
                    try:
                        sample = self._sample(buffer[order[offset]], epoch)
                    except BadImageError as error:
                        self.skipped += 1
                        in_a_row += 1
                        logger.warning(f"skipped {error}; {self.skipped} skipped so far")
                        if in_a_row == IN_A_ROW:
                            raise ValueError(
                                f"process {self.process_index}, worker {worker_id}: none of {IN_A_ROW} images in a row is "
                                f"readable: column {image_column!r} holds something else, or its files are damaged; the "
                                f"last one: {error}"
                            ) from error
                        continue
                    samples, in_a_row = samples + 1, 0
                    yield sample
                state = {"offset": 0}
            if whole_epoch and samples == 0:
                raise ValueError(
                    f"process {self.process_index}, worker {worker_id}: its share of the data holds no readable image"
                )
            state = {"block": 0, "offset": 0, "reader": None}

    def _warn_if_sorted(self, rows: list[dict[str, Any]]) -> None:
        """Batches of one class or two at a time train badly and nothing fails, so data in such an order is named."""
        source = self.maker.source
        if source.label_column is None or source.num_classes == 1 or len(rows) < self.block:
            return
        found = len({row[source.label_column] for row in rows})
        if found == 1 or 4 * found <= min(source.num_classes, len(rows)):
            logger.warning(
                f"the first {len(rows)} images of the stream belong to {found} of {source.num_classes} classes: it seems sorted "
                f"by class, and a stream mixes only {self.block} rows at a time. Train without streaming, or shuffle the "
                "dataset once and stream the copy"
            )

    def _sample(self, row: dict[str, Any], epoch: int) -> dict[str, torch.Tensor]:
        source = self.maker.source
        key: Any = row.get("__key__") or row.get(KEY_COLUMN)
        name = key or image_name(row.get(source.image_column or ""))  # a latent cache without images has keys
        label = None
        if source.label_column is not None:
            label = row[source.label_column]
            if not isinstance(label, int) or not 0 <= label < source.num_classes:
                raise ValueError(f"label {label!r} of {name} is not in [0, {source.num_classes - 1}]")
        if source.image_column is None:
            return self.maker(None, label, epoch, key, row[MOMENTS_COLUMN], row.get(FEATURES_COLUMN))
        try:
            image, encoded = decode_image(row[source.image_column], self.retry_seconds)
        except BadImageError as error:
            raise BadImageError(f"sample {key}: {error}" if key else str(error)) from error
        if source.is_latent_cache:  # the same draws whether its images are read or not
            return self.maker(image, label, epoch, key, row[MOMENTS_COLUMN])
        return self.maker(image, label, epoch, hashlib.blake2b(encoded, digest_size=16).hexdigest())


def stream_loader(
    samples: StreamingSamples, batch_size: int, num_workers: int, pin_memory: bool, state: dict[str, Any] | None
) -> StatefulDataLoader:
    """A loader whose `state_dict` says exactly which sample comes next, prefetched batches included. `num_workers` is
    reduced to the number of shards, since a worker without a shard would wait for ever; `state` is of a loader with
    the same number of workers."""
    num_workers = min(num_workers, samples.dataset.num_shards)
    loader = StatefulDataLoader(
        samples,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=outlive_signals,
    )
    if state is not None:
        loader.load_state_dict(state)
    return loader
