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
"""The record of an evaluation: what it was made with, and whether it comes out again."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def file_hash(path: str | os.PathLike[str]) -> str:
    """
    Args:
        path (`str` or `os.PathLike`): A file.

    Returns:
        `str`: Its SHA-256.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(path: str | os.PathLike[str], record: dict[str, object]) -> None:
    """
    Args:
        path (`str` or `os.PathLike`): The file, whole or absent.
        record (`dict[str, object]`): The record.
    """
    temporary = Path(path).with_suffix(".writing")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, path)


def compare_records(before: dict[str, Any], now: dict[str, Any], tolerance: float = 1e-6) -> tuple[bool, str]:
    """
    Compares an evaluation with its repetition.

    Args:
        before (`dict`): The record.
        now (`dict`): The record of the repetition.
        tolerance (`float`, *optional*, defaults to 1e-6): Relative difference that still counts as the same.

    Returns:
        `tuple[bool, str]`: Whether all metrics are the same, and a table of them, with what else is different.
    """
    lines, same = [f"{'metric':22}{'record':>18}{'now':>18}{'difference':>14}"], True
    for name, old in before["metrics"].items():
        new = now["metrics"].get(name)
        if new is None:
            lines.append(f"{name:22}{old:18.10g}{'missing':>18}")
            same = False
            continue
        difference = abs(new - old) / max(abs(old), 1e-12)
        same &= difference <= tolerance
        lines.append(f"{name:22}{old:18.10g}{new:18.10g}{difference:14.1e}")
    for part in ("model", "reference", "extractor", "versions", "hardware"):
        old, new = before.get(part) or {}, now.get(part) or {}
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                lines.append(f"{part}.{key} was {old.get(key)}, is {new.get(key)}")
    return bool(same), "\n".join(lines)
