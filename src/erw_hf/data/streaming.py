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
"""Streaming with exact resume: shard order and blocks of rows are shuffled, and the state says where in them a run is.

`datasets` resumes a stream exactly as long as it has no shuffle buffer, whose content is in no state. So only the order
of shards is its own; rows are shuffled here, in blocks that are read again on resume.
"""

import copy
import hashlib
import itertools
import logging
from collections.abc import Iterator

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torchdata.stateful_dataloader import StatefulDataLoader

from erw_hf.data.samples import IMAGE_ERRORS, MOMENTS_COLUMN, SampleMaker, decode_image


logger = logging.getLogger(__name__)

BLOCK = 1000  # rows shuffled together: 100 MB of ImageNet's JPEG files in each worker, read again at most on resume


class StreamingSamples(torch.utils.data.IterableDataset):
    """
    An endless stream of one process's training samples, epoch after epoch, each in another order.

    Each sample of an epoch comes exactly once over all processes and workers. Its random draws depend on the seed, the
    epoch and the image's own bytes, so neither processes nor workers change them. A file that is no image is skipped,
    counted and named in the log.

    Args:
        maker ([`SampleMaker`]): Makes samples of rows; its source is a stream.
        num_processes (`int`): Number of training processes.
        process_index (`int`): This process.
        block (`int`, *optional*, defaults to 1000): Rows shuffled together.
    """

    def __init__(self, maker: SampleMaker, num_processes: int, process_index: int, block: int = BLOCK) -> None:
        dataset = maker.source.dataset.shuffle(seed=maker.seed, buffer_size=1, max_buffer_input_shards=1)
        self.dataset = split_dataset_by_node(dataset, rank=process_index, world_size=num_processes)
        self.maker = maker
        self.process_index = process_index
        self.block = block
        self.skipped = 0
        self._state: dict = {"epoch": 0, "block": 0, "offset": 0, "upstream": None}

    def state_dict(self) -> dict:
        """Where the stream is; less than a kilobyte."""
        return dict(self._state)

    def load_state_dict(self, state: dict) -> None:
        """Goes there.

        Args:
            state (`dict`): What `state_dict` gave.
        """
        self._state = dict(state)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        worker_id = 0 if worker is None else worker.id
        # The epoch of a `datasets` stream lies in shared memory: without a copy, workers would move each other's.
        dataset = copy.deepcopy(self.dataset)
        state = self._state
        for epoch in itertools.count(state["epoch"]):
            dataset.set_epoch(epoch)  # before the state, which is ignored otherwise
            if state["upstream"] is not None:
                dataset.load_state_dict(state["upstream"])
            rows = iter(dataset)
            for block in itertools.count(state["block"]):
                # Right after loading, `datasets` still reports where its unstarted iterator began: the loaded state holds.
                upstream = state["upstream"]
                if upstream is None and block > 0:
                    upstream = copy.deepcopy(dataset.state_dict())
                buffer = list(itertools.islice(rows, self.block))
                if not buffer:
                    break
                rng = np.random.default_rng([self.maker.seed, epoch, self.process_index, worker_id, block])
                order = rng.permutation(len(buffer))
                for offset in range(state["offset"], len(buffer)):
                    self._state = {"epoch": epoch, "block": block, "offset": offset + 1, "upstream": upstream}
                    sample = self._sample(buffer[order[offset]], epoch)
                    if sample is not None:
                        yield sample
                state = {"offset": 0, "upstream": None}
            state = {"block": 0, "offset": 0, "upstream": None}

    def _sample(self, row: dict, epoch: int) -> dict[str, torch.Tensor] | None:
        source = self.maker.source
        name = row.get("__key__") or row[source.image_column]["path"] or "an image without a name"
        label = None
        if source.label_column is not None:
            label = row[source.label_column]
            if label is None or not 0 <= label < source.num_classes:
                raise ValueError(f"label {label} of {name} is not in [0, {source.num_classes - 1}]")
        try:
            image, encoded = decode_image(row[source.image_column])
        except IMAGE_ERRORS as error:
            self.skipped += 1
            logger.warning(f"skipped {name}, which is no readable image ({error}); {self.skipped} skipped so far")
            return None
        moments = row[MOMENTS_COLUMN] if source.is_latent_cache else None
        return self.maker(image, label, epoch, hashlib.blake2b(encoded, digest_size=16).hexdigest(), moments)


def stream_loader(
    samples: StreamingSamples, batch_size: int, num_workers: int, pin_memory: bool, state: dict | None
) -> StatefulDataLoader:
    """
    A loader whose `state_dict` says exactly which sample comes next, prefetched batches accounted for.

    Args:
        samples ([`StreamingSamples`]): One process's stream.
        batch_size (`int`): Samples of a batch.
        num_workers (`int`): Loader processes. No more than the stream has shards: one without a shard would wait for
            ever.
        pin_memory (`bool`): Put batches where CUDA copies from fastest.
        state (`dict`, *optional*): State of an earlier loader with as many workers.

    Returns:
        `StatefulDataLoader`: The loader.
    """
    num_workers = min(num_workers, samples.dataset.num_shards)
    loader = StatefulDataLoader(samples, batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory)
    if state is not None:
        loader.load_state_dict(state)
    return loader
