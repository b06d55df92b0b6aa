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
"""The samples that a run reads, batch by batch, and the position in them."""

import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from erw_hf.alignment import hidden_count
from erw_hf.data.samples import SampleMaker, StepSampler, TrainingSamples, outlive_signals
from erw_hf.data.streaming import StreamingSamples, stream_loader
from erw_hf.trainer.setup import Inputs


logger = logging.getLogger(__name__)

Samples = dict[str, torch.Tensor]


class Batches:
    """This rank's samples in both phases. Without streaming, the step alone decides what is read; a stream has a state
    that checkpoints keep and full training continues."""

    def __init__(self, inputs: Inputs) -> None:
        config = inputs.config
        self.inputs = inputs
        self.maker = SampleMaker(
            inputs.source,
            image_size=inputs.image_size,
            channels=inputs.image_channels,
            latent_shape=(config.in_channels, config.sample_size, config.sample_size),
            seed=config.seed,
            class_dropout_prob=config.class_dropout_prob,
            random_flip=config.random_flip,
            random_crop=config.random_crop,
            class_token_dim=inputs.model_config["class_token_dim"],
            num_tokens=config.token_grid**2,
            num_hidden=hidden_count(config.token_grid**2, config.alignment_mask_ratio),
        )
        self.waited = 0.0  # seconds spent waiting for data
        self.error: str | None = None  # why there is no next batch
        self._stream: StatefulDataLoader | None = None
        self._stream_state: dict[str, Any] | None = None
        self._batches: Iterator[Samples] = iter(())
        self.last: Samples | None = None  # the batch read last

    def start(self, steps: range) -> None:
        """Reads the first batch of a phase's remaining steps; a failure ends the run before a step."""
        self._batches = iter(self._loader(steps))
        if steps:
            first = self.next()
            self.check(steps.start + 1)
            assert first is not None
            self._batches = itertools.chain([first], self._batches)

    def next(self) -> Samples | None:
        """The next batch, as [`~data.samples.SampleMaker`] makes its samples. After a failure it returns the last
        batch again, so that no other rank waits for ever for this one's share of the step; [`check`] then ends the
        run on all ranks, and nothing from that step is kept."""
        started = time.perf_counter()
        if self.error is None:
            try:
                self.last = next(self._batches)
            except Exception as error:
                logger.debug("reading failed", exc_info=True)
                self.error = f"{type(error).__name__}: {error}"
        self.waited += time.perf_counter() - started
        return self.last

    def check(self, step: int) -> None:
        """
        Raises RuntimeError on all ranks, before a step (counted from 1), if any of them lacks data. All ranks call it.
        """
        errors = gather_object([(self.inputs.accelerator.process_index, self.error)])
        for process, error in errors:
            if error is not None:
                raise RuntimeError(
                    f"rank {process} of {len(errors)} could not read its data, so all stop before step {step}: "
                    f"{error}\nResume from the last checkpoint with --resume_from_checkpoint latest"
                )

    def state_dict(self) -> dict[str, Any] | None:
        """The position of a stream; `None` without streaming."""
        if self._stream is None:
            return None
        self._stream_state = self._stream.state_dict()
        config = self.inputs.config
        return {
            "workers": config.dataloader_num_workers,
            "batch": config.train_batch_size,
            "stream": self._stream_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream_state = state["stream"]

    def _loader(self, steps: range) -> DataLoader[Any]:
        config, accelerator = self.inputs.config, self.inputs.accelerator
        workers, pin_memory = config.dataloader_num_workers, accelerator.device.type == "cuda"
        if config.streaming:
            samples = StreamingSamples(
                self.maker,
                accelerator.num_processes,
                accelerator.process_index,
                retry_seconds=config.stream_retry_seconds,
            )
            self._stream = stream_loader(samples, config.train_batch_size, workers, pin_memory, self._stream_state)
            return self._stream
        sampler = StepSampler(
            num_samples=len(self.inputs.source.dataset),
            batch_size=config.train_batch_size,
            accumulation_steps=config.gradient_accumulation_steps,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            start_step=steps.start,
            end_step=steps.stop,
            seed=config.seed,
        )
        return DataLoader(
            TrainingSamples(self.maker, config.stream_retry_seconds),
            batch_sampler=sampler,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=outlive_signals,
        )
