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
"""Making records public: local paths are reduced to their last name, Hub ids stay."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from erw_hf.trainer.run_record import split_names


def public_value(value: object, local: Collection[str] = ()) -> object:
    """A JSON or YAML value with each local path reduced to its last name. A string may hold several names, separated
    by commas; those in `local` are local folders, whatever they look like."""
    if isinstance(value, Mapping):
        return {key: public_value(entry, local) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_value(entry, local) for entry in value]
    if not isinstance(value, str):
        return value
    return ",".join(_reduced(part, local) for part in value.split(","))


def _reduced(part: str, local: Collection[str]) -> str:
    name, equals, path = part.rpartition("=")  # NAME=PATH, as of evaluate.py's --representations
    return name + equals + (Path(path.strip()).name if _is_path(path.strip(), local) else path)


def is_hub_id(name: str) -> bool:
    """Whether a name is a Hub id, `owner/name`, and not a folder of this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not _is_path(name)


def public_name(path_or_id: object) -> str:
    """A Hub id as it is; for a folder its last name. `path_or_id` may hold several."""
    return ", ".join(part if is_hub_id(part) else Path(part).name for part in split_names(str(path_or_id)))


def _is_path(name: str, local: Collection[str] = ()) -> bool:
    if name.startswith("file://"):
        return True
    if "/" not in name or "://" in name:
        return False
    # Three names and two slashes, as in outputs/mine/pipeline, are too many for an id.
    deep = re.fullmatch(r"[\w.-]+(/[\w.-]+){2,}/?", name) is not None
    return name.startswith(("/", "~", ".")) or name.endswith(".npz") or deep or name in local or os.path.exists(name)
