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
"""What a number was measured with: versions, hardware, file hashes."""

import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch
from accelerate import Accelerator


PACKAGES = (
    "erw-hf", "torch", "diffusers", "transformers", "accelerate", "datasets", "numpy", "scikit-learn", "torch-fidelity",
    "timm", "pillow",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that the numbers depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware(accelerator: Accelerator) -> dict[str, object]:
    """What an evaluation runs on."""
    device = accelerator.device
    return {
        "device": device_name(device),
        "device_type": device.type,
        "processes": accelerator.num_processes,
        "cpu_threads_per_process": torch.get_num_threads(),
        "cpu_cores": os.cpu_count(),
        "mixed_precision": accelerator.mixed_precision,
        "float32_matmul_precision": _matmul_precision(),
    }


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch's newer name
        return str(torch.backends.cuda.matmul.fp32_precision)


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 of a model's tensors (names, types, shapes and values), whatever its file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def device_name(device: str | torch.device) -> str:
    """Model of the GPU, or of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
