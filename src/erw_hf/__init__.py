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
"""erw-hf: Embedded Representation Warmup (arXiv 2504.10188) for diffusers.

The names below are imported when they are first used, so that `import erw_hf` is quick and needs no training packages.
"""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

if TYPE_CHECKING:
    from erw_hf.encoders import RepresentationEncoder as RepresentationEncoder
    from erw_hf.pipeline_erw import ERWPipeline as ERWPipeline
    from erw_hf.scheduling_erw import FlowMatchEulerMaruyamaScheduler as FlowMatchEulerMaruyamaScheduler
    from erw_hf.scheduling_erw import FlowMatchHeunScheduler as FlowMatchHeunScheduler
    from erw_hf.transformer_erw import ERWTransformer2DModel as ERWTransformer2DModel

_PUBLIC = {
    "ERWPipeline": "erw_hf.pipeline_erw",
    "ERWTransformer2DModel": "erw_hf.transformer_erw",
    "FlowMatchEulerMaruyamaScheduler": "erw_hf.scheduling_erw",
    "FlowMatchHeunScheduler": "erw_hf.scheduling_erw",
    "RepresentationEncoder": "erw_hf.encoders",
}
# The classes a pipeline folder may name, and where they live when this package is installed (read by ERWPipeline).
_DIFFUSERS_COMPONENTS = {
    name: module for name, module in _PUBLIC.items() if module.endswith(("transformer_erw", "scheduling_erw"))
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'erw_hf' has no attribute {name!r}")
    if name == "ERWPipeline":
        # diffusers >= 0.42 resolves the components of a pipeline among the modules that are imported already.
        for module in _DIFFUSERS_COMPONENTS.values():
            importlib.import_module(module)
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
