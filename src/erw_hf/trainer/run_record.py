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
"""What a run writes about itself: `metrics.jsonl` and `environment.json`, and what it cost by them.

The fields of a line come from `trainer.step_log`.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from erw_hf.files import written_whole


logger = logging.getLogger(__name__)

STATED_PACKAGES = ("torch", "diffusers", "accelerate", "erw-hf")  # whose versions a card names
# Keys of a run that name a thing by its Hub id or its path; the path means nothing elsewhere.


def split_names(names: str) -> list[str]:
    """
    Args:
        names (`str`): One name, or several separated by commas, as `encoder` takes them.

    Returns:
        `list[str]`: The names.
    """
    return [name.strip() for name in names.split(",") if name.strip()]


class MetricsFile:
    """
    `metrics.jsonl`: one JSON line for each optimizer step, without gap or double however often the run is killed.

    Args:
        path (`str` or `os.PathLike`): The file.
        resume_step (`int`):
            Last step to keep. Lines up to it stay byte for byte; later ones go, and with a warning what a power cut has made
            unreadable.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int) -> None:
        self.path = Path(path)
        self._keep_until(resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        before = self.path.read_bytes()
        kept = b"".join(line + b"\n" for line, record in _readable(before, self.path) if record["step"] <= step)
        if before.startswith(kept):
            os.truncate(self.path, len(kept))
        else:
            with written_whole(self.path) as temporary:
                temporary.write_bytes(kept)

    def write(self, record: dict[str, object]) -> None:
        """
        Appends one step's record and flushes it. JSON has no NaN: a non-finite value becomes null.

        Args:
            record (`dict[str, object]`): The record.
        """
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """
    Args:
        path (`str` or `os.PathLike`): A `metrics.jsonl`.

    Returns:
        `list[dict]`: Its records. What cannot be read, as after a power cut, is left out with a warning.
    """
    return [record for _, record in _readable(Path(path).read_bytes(), Path(path))]


def _readable(text: bytes, path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of a record of steps, which rise, and what each says."""
    *lines, torn = text.split(b"\n")
    unreadable, last_step = torn.strip(b"\0") != torn, -1
    for line in lines:
        line = line.strip(b"\0")  # blocks of a file that were not on disk yet
        try:
            record = json.loads(line)
            rises = record["step"] > last_step
        except (ValueError, TypeError, KeyError):
            rises = False
        if rises:
            last_step = record["step"]
            yield line, record
        else:
            unreadable = True
    if unreadable:
        logger.warning(f"{path}: unreadable lines, as a power cut leaves them, are left out")


def training_cost(metrics: Path, environment: dict[str, Any] | None) -> dict[str, Any]:
    """
    What a run has cost, the warmup counted, from its own record.

    Args:
        metrics (`Path`): `metrics.jsonl`.
        environment (`dict`, *optional*): `environment.json`, hardware and versions.

    Returns:
        `dict[str, Any]`: `steps`, and `rows` for a table.
    """
    warmup = full = 0
    seconds, images, flops, full_step_flops = 0.0, 0, 0.0, None
    waited, used, peak_memory = 0.0, 0.0, 0.0
    losses: list[float] = []
    last_phase = None
    with metrics.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            step_seconds = (record["images_seen"] - images) / record["images_per_second"]
            seconds += step_seconds
            waited += step_seconds * record["data_wait"]
            used += step_seconds * (record.get("mfu") or 0)
            peak_memory = max(peak_memory, record.get("peak_memory_gib") or 0)
            if record["phase"] == "full" and full_step_flops is None:
                full_step_flops = record["flops"] - flops
            images, flops = record["images_seen"], record["flops"]
            warmup += record["phase"] == "warmup"
            full += record["phase"] == "full"
            if record["phase"] != last_phase:
                losses, last_phase = [], record["phase"]
            losses = [*losses[-99:], record["loss"]]
    rows: list[tuple[str, object]] = [
        ("steps", f"{warmup} warmup + {full} full"),
        ("images seen", f"{images:,}".replace(",", " ")),
        ("FLOPs", f"{flops:.3e}"),
    ]
    if full_step_flops:
        rows.append(("full-step equivalents", f"{flops / full_step_flops:.0f}"))
    finite = [loss for loss in losses if loss is not None]
    if finite:
        rows.append((f"loss, mean of the last {len(losses)} steps", f"{sum(finite) / len(finite):.4f}"))
    if seconds:
        rows.append(("hours in steps", f"{seconds / 3600:.2f} ({images / seconds:.0f} images a second)"))
        rows.append(("waiting for data", f"{waited / seconds:.1%} of that"))
    if used:
        rows.append(("MFU", f"{used / seconds:.1%} of the GPUs' dense bf16 peak"))
    if peak_memory:
        rows.append(("peak memory", f"{peak_memory:.1f} GiB for the main process"))
    if environment is not None:
        processes = environment["processes"]
        rows.append(("hardware", f"{processes} x {environment['hardware']}"))
        if environment["device"] != "cpu":
            rows.append(("GPU-hours", f"{seconds / 3600 * processes:.2f}"))
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())))
    return {"steps": warmup + full, "rows": rows}


def describe_environment(device_type: str, processes: int, mixed_precision: str, local: list[str]) -> dict[str, Any]:
    """
    What a run's figures need beside them.

    Args:
        device_type (`str`): `"cuda"`, `"cpu"` or another one.
        processes (`int`): Number of training processes.
        mixed_precision (`str`): Precision as applied: `"no"`, `"fp16"` or `"bf16"`.
        local (`list[str]`): Models and data of this machine, see [`~trainer.config.local_names`].

    Returns:
        `dict[str, Any]`: These, with `hardware` of one process and `versions`.
    """
    # Here: it imports torch, which whoever only reads a record does without.
    from erw_hf.provenance import device_name, versions

    hardware = device_name(device_type) + ("" if device_type == "cuda" else f", {os.cpu_count()} cores")
    installed = versions()
    return {
        "device": device_type,
        "processes": processes,
        "mixed_precision": mixed_precision,
        "hardware": hardware,
        "versions": {name: installed[name] for name in STATED_PACKAGES if installed[name] is not None},
        "local": local,
    }
