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
"""The folder of a run: its owner, what a run writes there, and what happens to that when a run starts anew or goes back."""

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import yaml
from accelerate import Accelerator

from erw_hf.files import sync
from erw_hf.processes import decided_by_main
from erw_hf.trainer.checkpoints import find_damage, holds_run, is_within_streak, named_checkpoints, step_of
from erw_hf.trainer.ema import later_snapshots
from erw_hf.trainer.run_lock import RunLock
from erw_hf.trainer.run_record import measured_alike, read_metrics
from erw_hf.trainer.trackers import TRACKER_FILES, TRACKER_PROJECT


logger = logging.getLogger(__name__)

# What a run writes, besides its checkpoints. Everything else in its folder is the user's, including evaluations.
_WRITTEN = (
    "metrics.jsonl", "evaluations.jsonl", "config.yaml", "environment.json", "warmup_from.json", "push.log",
    "grid.png", "loss_curve.png", "quality_curve.png", "probes.png", "samples/step-*.png",
    "ema_snapshots/step-*-sigma-*.safetensors", "hub/step-*", "hub/.lock", "hub/.writing", ".evaluation-work",
    ".writing-checkpoint-*", ".removing-checkpoint-*", ".*.writing", "passed-over", "rewound-[0-9]*",
    *(
        f"{folder}/{pattern}"
        for folder in ("pipeline", "warmup", "best", "lora")
        for pattern in ("README.md", "*.json", "*.py", "*.safetensors", "*/*.json", "*/*.py", "*/*.safetensors")
    ),
)  # fmt: skip


class RunFolder:
    """The folder that a run writes to: a context manager that all ranks enter before any of them reads what is there.
    The main rank owns it until the end; a second start on it ends before it touches anything."""

    def __init__(self, path: str | os.PathLike[str], accelerator: Accelerator) -> None:
        self.path = Path(path)
        self.accelerator = accelerator
        self._lock = RunLock(self.path)
        self._has_set_aside = False

    def __enter__(self) -> "RunFolder":
        decided_by_main(self.accelerator, self._own)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.accelerator.is_main_process:
            if self._has_set_aside:  # no step was made
                recover(self.path)
            self._lock.release()

    def begin(self, resume_step: int | None, full_step: int, may_replace: bool) -> None:
        """
        Prepares the folder for the first step, after all checks; all ranks call it.

        Args:
            resume_step (`int`, *optional*): Step to resume from; `None` for a new run.
            full_step (`int`): The same, counted from the hand-over.
            may_replace (`bool`): A new run may replace an earlier one.

        Raises:
            ValueError: if the folder cannot be written to, or holds a run that must not be replaced.
        """
        decided_by_main(self.accelerator, lambda: self._begin(resume_step, full_step, may_replace))

    def step_made(self) -> None:
        """Deletes the earlier run once a step of this one is on disk."""
        if self._has_set_aside:
            sync(self.path / "metrics.jsonl")
            recover(self.path)
            self._has_set_aside = False

    def _own(self) -> None:
        if self.path.is_dir():  # otherwise there is nothing to own until `begin`
            self._acquire()
            recover(self.path)

    def _acquire(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as error:
            raise ValueError(f"cannot write to output_dir {self.path}: {error}") from error

    def _begin(self, resume_step: int | None, full_step: int, may_replace: bool) -> None:
        self._acquire()
        if resume_step is not None:
            go_back(self.path, resume_step, full_step)
        elif holds_run(self.path):
            check_vacant(self.path, may_replace)
            self._has_set_aside = True
            set_aside(self.path)
        elif (self.path / "environment.json").is_file():  # left by a start that failed before its first step
            for path in list(written_files(self.path)):
                _remove(path)


def check_vacant(folder: Path, may_replace: bool) -> None:
    """Raises ValueError if a folder holds a run that a new one may not replace."""
    if holds_run(folder) and not may_replace:
        raise ValueError(
            f"{folder} already holds a run: resume it with --resume_from_checkpoint latest, choose another "
            "--output_dir, or delete it with --overwrite_output_dir"
        )


def written_files(folder: Path) -> Iterator[Path]:
    """What a run wrote: files, and folders that belong to it entirely."""
    yield from named_checkpoints(folder)
    patterns = list(_WRITTEN)
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):  # without a config, no tracker was started
        config = yaml.safe_load((folder / "config.yaml").read_text())
        project = config.get("tracker_project_name", TRACKER_PROJECT)  # a key of earlier versions
        patterns += [f"{project}/{name}" for name in TRACKER_FILES]
    for pattern in patterns:
        yield from folder.glob(pattern)


def set_aside(folder: Path) -> None:
    """Moves what a run wrote to `.overwritten`; [`recover`] brings it back if the next run makes no step."""
    unfinished = folder / ".overwriting"
    for path in list(written_files(folder)):
        target = unfinished / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
        _remove_empty(path.parent, folder)
    os.replace(unfinished, folder / ".overwritten")


def recover(folder: Path) -> None:
    """
    Finishes an interrupted overwrite: deletes what was set aside if the new run made a step, otherwise brings it back.
    """
    unfinished, complete, metrics = folder / ".overwriting", folder / ".overwritten", folder / "metrics.jsonl"
    if complete.is_dir():
        if metrics.is_file() and read_metrics(metrics):
            shutil.rmtree(complete)
        else:
            for path in list(written_files(folder)):
                _remove(path)
                _remove_empty(path.parent, folder)
            os.replace(complete, unfinished)
    if unfinished.is_dir():
        for path in [path for path in unfinished.rglob("*") if path.is_symlink() or not path.is_dir()]:
            target = folder / path.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        shutil.rmtree(unfinished)


def go_back(folder: Path, step: int, full_step: int) -> None:
    """Puts a run's folder back to the checkpoint of `step`, `full_step` after the hand-over. Later checkpoints and
    weight averages move to a folder of their own, with a copy of the lines that led to them; lines after the last
    checkpoint are dropped, since their steps are repeated."""
    for pattern in (".writing-checkpoint-*", ".removing-checkpoint-*"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    later = [path for path in named_checkpoints(folder) if step_of(path) > step]
    snapshots = later_snapshots(folder / "ema_snapshots", full_step)
    best = [folder / "best"] if (folder / "best").exists() and _best_step(folder) > step else []
    if not later and not best:
        for path in snapshots:  # of steps that are repeated
            path.unlink()
        return
    if all(find_damage(path) is not None or is_within_streak(path) for path in later):
        aside = folder / "passed-over"  # by "latest", perhaps at each start in a chain of jobs: one copy is enough
    else:
        aside = next(path for i in itertools.count(1) if not (path := folder / f"rewound-{i}").exists())
    aside.mkdir(exist_ok=True)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "evaluations.jsonl"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, aside / name)
    for path in (*later, *snapshots, *best):
        target = aside / path.relative_to(folder)
        _remove(target)
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)
    logger.warning(
        f"going back to step {step}: {', '.join(path.name for path in [*later, *best])} and the lines up to there are in {aside} now. Delete "
        "it, or branch off from there with --resume_from_checkpoint and another --output_dir"
    )


def _best_step(folder: Path) -> int:
    """The step of the lowest FID, whose model is in `best`; -1 without any."""
    measured = measured_alike(folder / "evaluations.jsonl")
    return min(measured, key=lambda record: record["fid"])["step"] if measured else -1


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(parent: Path, folder: Path) -> None:
    while parent != folder:
        try:
            parent.rmdir()
        except OSError:  # not empty
            return
        parent = parent.parent
