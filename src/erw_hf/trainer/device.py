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
"""The compute device: which one, its precision, what is compiled and which attention for it, copies beside a step, peak memory."""

import functools
import os
import resource
import sys
import time

import torch
from accelerate.utils import parse_flag_from_env
from torch._functorch import config as functorch_config

from erw_hf.transformer_erw import ERWTransformer2DModel


def found_device() -> torch.device:
    """Where a run started here would compute, as accelerate chooses it."""
    accelerator = None if parse_flag_from_env("ACCELERATE_USE_CPU") else torch.accelerator.current_accelerator(True)
    return torch.device("cpu") if accelerator is None else accelerator


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies matrices in bf16 itself, which makes a step 1.4 times as fast or more."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def choose_precision(setting: str) -> tuple[str, str]:
    """
    The precision, `"no"`, `"fp16"` or `"bf16"`, and why; decided once, from the key, the launcher and the device.

    `"auto"` is what `accelerate launch` says; else bf16 where the device computes it itself (GPUs since Ampere, CPUs
    with AMX or AVX-512 BF16); fp16 on older GPUs, whose bf16 is emulated and slower than float32, while fp16 has tensor cores and is
    what ERW's paper trained in; else float32.

    Raises:
        ValueError: if the key and `accelerate launch` name two precisions.
    """
    # "no" is what accelerate launch says where it was told nothing, so it says nothing.
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launcher not in ("no", "fp16", "bf16"):
        raise ValueError(
            f"accelerate launch sets mixed_precision {launcher}, but the trainer supports only no, fp16 and bf16"
        )
    if launcher != "no" and setting not in ("auto", launcher):
        raise ValueError(
            f"mixed_precision is {setting}, but accelerate launch (--mixed_precision or its config file) sets {launcher}: "
            "make them the same, or leave the key mixed_precision at auto"
        )
    on_gpu = found_device().type == "cuda"
    emulated = on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
    slow = "; this GPU emulates bf16, which is slower than float32: fp16 is its fast one" if emulated else ""
    if found_device().type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        slow = "; this CPU has no bf16, so matrix products take 40 times as long as in float32, or more"
    if launcher != "no":
        return launcher, "set by accelerate launch" + (slow if launcher == "bf16" else "")
    if setting != "auto":
        return setting, "set by mixed_precision" + (slow if setting == "bf16" else "")
    if on_gpu:
        return ("fp16", "auto: this GPU only emulates bf16") if emulated else ("bf16", "auto: on a GPU that has it")
    if found_device().type == "cpu" and cpu_has_bf16():
        return "bf16", "auto: on a CPU that has it"
    return "no", "auto: this device is not faster in bf16"


def compile_blocks(transformer: ERWTransformer2DModel, device_type: str, memory_budget: float = 1.0) -> None:
    """Compiles the blocks in place, to keep that share of their activations; one compilation serves them all."""
    functorch_config.activation_memory_budget = memory_budget  # read when the first batch comes
    # Without this Inductor's tanh, of GELU, takes a CPU three times as long as its exponential does.
    options = {"cpp.use_decompose_tanh": True} if device_type == "cpu" else None
    transformer.compile_repeated_blocks(fullgraph=True, options=options)


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copies a batch, pinned if the device is a GPU, on a stream of its own, beside the step that the device is still
    busy with."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.cuda.stream(_copy_stream(device)):
        copies = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    current = torch.cuda.current_stream()
    current.wait_stream(_copy_stream(device))
    for tensor in copies.values():
        tensor.record_stream(current)  # keeps their memory until the step is done with it
    return copies


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class LateValues:
    """Numbers, `(N,)`, on their way from the device to the host, which keeps working meanwhile. `arrived` is when they
    were there, on `time.perf_counter`'s clock."""

    def __init__(self, values: torch.Tensor) -> None:
        self.arrived = time.perf_counter()
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._copied = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def fetch(self) -> list[float]:
        """Waits for the numbers, if they are not there yet."""
        if self._copied is not None:
            self._copied.synchronize()
            self.arrived = time.perf_counter()
        return self._values.tolist()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of a GPU by tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
