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
"""What keeps the device busy: copies beside a step, values fetched late; and how much of its memory is used."""

import functools
import resource
import sys
import time

import torch


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """
    Copies on a stream of its own, beside the step that the device is still busy with.

    Args:
        batch (`dict[str, torch.Tensor]`): On the CPU, pinned if the device is a GPU.
        device (`torch.device`): Where the step will run.

    Returns:
        `dict[str, torch.Tensor]`: The same there.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.cuda.stream(_copy_stream(device)):
        copies = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    current = torch.cuda.current_stream()
    current.wait_stream(_copy_stream(device))
    for tensor in copies.values():
        tensor.record_stream(current)  # whose memory is not given out again before the step is done with it
    return copies


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class LateValues:
    """
    Numbers on their way from the device to the host, which goes on with its work meanwhile. `arrived` is when they were
    there, on `time.perf_counter`'s clock.

    Args:
        values (`torch.Tensor` of shape `(N,)`): The numbers, where they were computed.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.arrived = time.perf_counter()
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._copied = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def fetch(self) -> list[float]:
        """
        Waits for them, if they are not there yet.

        Returns:
            `list[float]`: The numbers.
        """
        if self._copied is not None:
            self._copied.synchronize()
            self.arrived = time.perf_counter()
        return self._values.tolist()


def peak_memory(device: torch.device) -> int:
    """
    Args:
        device (`torch.device`): Where a run computes.

    Returns:
        `int`: Most bytes that were in use so far: of the GPU by tensors, or of this process on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
