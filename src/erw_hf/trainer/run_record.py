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
"""A run's record of itself: `metrics.jsonl` and `environment.json`, and the cost computed from them.

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


def measured_alike(path: Path) -> list[dict[str, Any]]:
    """The measurements of FID in a run's `evaluations.jsonl` that were made as the last one: fewer samples, for instance, would
    read as a worse model."""
    measured = [record for record in read_metrics(path) if record.get("fid") is not None] if path.is_file() else []
    keys = ("samples", "inference_steps", "reference")
    return [record for record in measured if all(record.get(key) == measured[-1].get(key) for key in keys)]


def split_names(names: str) -> list[str]:
    """The names in a text that separates them by commas, such as `encoder`."""
    return [name.strip() for name in names.split(",") if name.strip()]


class MetricsFile:
    """`metrics.jsonl`: one JSON line per optimizer step, without gaps or duplicates however often the run is killed.
    Lines up to `resume_step` stay byte for byte; later ones, and (with a warning) lines that a power cut made
    unreadable, are removed."""

    def __init__(self, path: str | os.PathLike[str], resume_step: int) -> None:
        self.path = Path(path)
        keep_until(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: dict[str, object]) -> None:
        """Appends one step's record and flushes it. JSON lacks NaN: a non-finite value becomes null."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def keep_until(path: Path, step: int) -> None:
    """Removes the lines after a step, and with a warning those that cannot be read. The others stay byte for byte."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept = b"".join(line + b"\n" for line, record in _readable(before, path) if record["step"] <= step)
    if before.startswith(kept):
        os.truncate(path, len(kept))
    else:
        with written_whole(path) as temporary:
            temporary.write_bytes(kept)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`. Unreadable lines, as after a power cut, are skipped with a warning."""
    return [record for _, record in _readable(Path(path).read_bytes(), Path(path))]


def _readable(text: bytes, path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The readable lines with rising steps, and their content."""
    *lines, torn = text.split(b"\n")
    unreadable, last_step = torn.strip(b"\0") != torn, -1
    for line in lines:
        line = line.strip(b"\0")  # blocks of the file that had not reached the disk
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
        logger.warning(f"{path}: skipped unreadable lines, as a power cut leaves them")


def training_cost(metrics: Path, environment: dict[str, Any] | None, warmup_steps: int = 0) -> dict[str, Any]:
    """`steps`, and `rows` for a table: what a run has cost, the warmup counted, from its own `metrics.jsonl` and
    `environment.json`. A run that branched off counts the steps of the first run, but not their time, which is
    unknown; `warmup_steps` if its lines lack the warmup."""
    seconds, own_images, full_step_flops, warmup = 0.0, 0.0, None, None
    waited, used, peak_memory = 0.0, 0.0, 0.0
    losses: list[float | None] = []
    before: dict[str, Any] = {"step": 0, "phase": None, "images_seen": 0, "flops": 0.0}
    for record in read_metrics(metrics):
        # All steps have the same number of images, so a line is enough without the one before it.
        step_images = record["images_seen"] / record["step"]
        step_seconds = step_images / record["images_per_second"]
        own_images += step_images
        seconds += step_seconds
        waited += step_seconds * record["data_wait"]
        used += step_seconds * (record.get("mfu") or 0)
        peak_memory = max(peak_memory, record.get("peak_memory_gib") or 0)
        if record["phase"] == "full" and full_step_flops is None and record["step"] == before["step"] + 1:
            full_step_flops = record["flops"] - before["flops"]
        if record["phase"] == "warmup" or warmup is None:
            warmup = record["step"] if record["phase"] == "warmup" else min(warmup_steps, record["step"] - 1)
        losses = [*losses[-99:], record["loss"]] if record["phase"] == before["phase"] else [record["loss"]]
        before = record
    steps, images, flops = before["step"], before["images_seen"], before["flops"]
    warmup = warmup or 0
    full = steps - warmup
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
        rows.append(("hours in steps", f"{seconds / 3600:.2f} ({own_images / seconds:.0f} images per second)"))
        rows.append(("waiting for data", f"{waited / seconds:.1%} of that"))
    if used:
        rows.append(("MFU", f"{used / seconds:.1%} of the GPUs' dense bf16 peak"))
    if peak_memory:
        rows.append(("peak memory", f"{peak_memory:.1f} GiB on the main rank"))
    if environment is not None:
        processes = environment["processes"]
        rows.append(("hardware", f"{processes} x {environment['hardware']}"))
        if environment["device"] != "cpu":
            rows.append(("GPU-hours", f"{seconds / 3600 * processes:.2f}"))
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())))
    return {"steps": steps, "rows": rows}


def describe_environment(device_type: str, processes: int, mixed_precision: str, local: list[str]) -> dict[str, Any]:
    """
    Precision, ranks, hardware and versions: what a run's numbers need beside them. `local` names models and data of
    this machine.
    """
    # Imported here, so that reading a record does not import torch.
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
