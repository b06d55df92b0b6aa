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
"""diffusers' own tester mixins, from a checkout of diffusers that DIFFUSERS_SOURCE names. The wheel does not hold them.

git clone --depth 1 -b v0.42.1 https://github.com/huggingface/diffusers
DIFFUSERS_SOURCE=$PWD/diffusers make test
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest


SOURCE = os.environ.get("DIFFUSERS_SOURCE")

MARKS = (
    "big_accelerator lora ip_adapter training attention memory cpu_offload group_offload compile single_file "
    "quantization bitsandbytes quanto torchao gguf modelopt sdnq context_parallel tensor_parallel slow nightly cache "
    "autoround nunchaku nunchaku_lite"
)


def pytest_configure(config: pytest.Config) -> None:
    for mark in MARKS.split():
        config.addinivalue_line("markers", f"{mark}: of diffusers' tests")


if SOURCE:
    # Under a name of its own: `tests` is ours. Its relative imports work all the same.
    package = Path(SOURCE) / "tests"
    spec = importlib.util.spec_from_file_location(
        "diffusers_tests", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["diffusers_tests"] = module
    spec.loader.exec_module(module)
