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
"""What of a record may leave this machine: of a path of its own the name alone. Hub ids stay."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from erw_hf.trainer.run_record import split_names


def public_value(value: object, local: Collection[str] = ()) -> object:
    """
    What may leave this machine of a record: of each path of its own the name alone. Hub ids stay.

    Args:
        value (`object`): A value of JSON or YAML. A string may name several, separated by commas.
        local (`Collection[str]`, *optional*, defaults to `()`):
            Names that are known to be of local folders, whatever they look like.

    Returns:
        `object`: The same, made public.
    """
    if isinstance(value, Mapping):
        return {key: public_value(entry, local) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_value(entry, local) for entry in value]
    if not isinstance(value, str):
        return value
    return ",".join(Path(p.strip()).name if _is_path(p.strip(), local) else p for p in value.split(","))


def is_hub_id(name: str) -> bool:
    """
    Args:
        name (`str`): What a key of a run names.

    Returns:
        `bool`: Whether it is an id of the Hub, `owner/name`, and no folder of this machine.
    """
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not _is_path(name)


def public_name(path_or_id: object) -> str:
    """
    Args:
        path_or_id (`object`): What a key of a run names, perhaps several.

    Returns:
        `str`: A Hub id as it is; of a folder its name alone, which is what means something elsewhere.
    """
    return ", ".join(part if is_hub_id(part) else Path(part).name for part in split_names(str(path_or_id)))


def _is_path(name: str, local: Collection[str] = ()) -> bool:
    if "/" not in name or "://" in name:
        return False
    # Three names and two slashes, as in outputs/mine/pipeline, are too many for an id.
    deep = re.fullmatch(r"[\w.-]+(/[\w.-]+){2,}/?", name) is not None
    return name.startswith(("/", "~", ".")) or name.endswith(".npz") or deep or name in local or os.path.exists(name)
