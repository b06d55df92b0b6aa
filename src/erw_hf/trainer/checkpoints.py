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
"""Checkpoints that are whole or absent, and where a run resumes."""

import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object

from erw_hf.data.identity import data_identity, describe_changes
from erw_hf.data.source import Source
from erw_hf.files import sync, sync_tree
from erw_hf.processes import decided_by_main
from erw_hf.trainer.phase import Phase
from erw_hf.trainer.run_record import read_metrics


logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE_FILE = "training_state.pt"
# What a run writes at the end of a phase, and so after a checkpoint.
_RESULTS = ("pipeline/model_index.json", "warmup/warmup.json", "loss_curve.png")


@dataclass
class Progress:
    """What a run has done so far, the warmup counted.

    Args:
        step (`int`): Steps of both phases.
        images_seen (`int`): Images over all processes, the skipped steps' included.
        flops (`float`): Floating-point operations of training, the encoder's included.
        nonfinite_steps (`int`): Steps skipped for a non-finite gradient.
        nonfinite_in_a_row (`int`): The same since the last good step.
        step_batch_size (`int`): Images of a step, over all processes: what the order of the data rests on.
        data (`dict`, *optional*): [`~data.identity.data_identity`] of the data.
    """

    step: int = 0
    images_seen: int = 0
    flops: float = 0.0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    step_batch_size: int = 0
    data: dict[str, Any] | None = None


def check_checkpoint(checkpoint: Path, output_dir: str | os.PathLike[str], step_batch_size: int) -> Progress:
    """
    A run goes on exactly, or not at all.

    Args:
        checkpoint (`Path`): The checkpoint to go on from.
        output_dir (`str` or `os.PathLike`): Folder of the run that goes on.
        step_batch_size (`int`): Images of a step now.

    Returns:
        [`Progress`]: What the checkpoint's run has done.

    Raises:
        ValueError: if the folder holds another run, or a step had another number of images.
    """
    if checkpoint.resolve().parent != Path(output_dir).resolve() and holds_run(output_dir):
        raise ValueError(
            f"{output_dir} holds another run than {checkpoint}: choose another --output_dir to branch off from it"
        )
    progress = read_progress(checkpoint)
    if progress.step_batch_size not in (0, step_batch_size):
        raise ValueError(
            f"a step of {checkpoint} had {progress.step_batch_size} images, now it would have {step_batch_size}, and the order "
            "of the data would be another: train_batch_size x gradient_accumulation_steps x processes must stay as it was"
        )
    return progress


def step_of(checkpoint: Path) -> int:
    """
    Args:
        checkpoint (`Path`): A folder `checkpoint-STEP`.

    Returns:
        `int`: Its step.
    """
    return int(checkpoint.name.split("-")[1])


def named_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """
    Args:
        output_dir (`str` or `os.PathLike`): Folder of a run.

    Returns:
        `list[Path]`: What is named as a checkpoint, whole or not, the oldest first.
    """
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def check_same_data(progress: Progress, source: Source, dataset_name: str, retry_seconds: float = 300) -> None:
    """
    A run goes on with the data that it began with: class ids and the order of the samples rest on it.

    Args:
        progress ([`Progress`]): Of the checkpoint to go on from, or of a new run. Its `data` is set.
        source ([`~data.source.Source`]): The data now.
        dataset_name (`str`): What it was opened by.
        retry_seconds (`float`, *optional*, defaults to 300): How long to go on trying while the data cannot be asked.

    Raises:
        ValueError: if the checkpoint was trained on other data.
    """
    data = data_identity(source, dataset_name, retry_seconds)
    if progress.data is not None:
        changes = describe_changes(progress.data, data)
        if changes is not None:
            raise ValueError(
                f"{dataset_name} is not the data that the run was trained on until step {progress.step}: {changes}. Point "
                "dataset_name back to that data to resume, or start a new run with the weights of this one: --init_from "
                "with its pipeline, and another --output_dir"
            )
    elif progress.step > 0:
        logger.warning("the checkpoint does not say which data it was trained on: resuming without a comparison")
    progress.data = data


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """
    Args:
        output_dir (`str` or `os.PathLike`): Folder of a run.

    Returns:
        `list[Path]`: Its whole checkpoints, the oldest first.
    """
    return [path for path in named_checkpoints(output_dir) if find_damage(path) is None]


def holds_run(output_dir: str | os.PathLike[str]) -> bool:
    """
    Args:
        output_dir (`str` or `os.PathLike`): A folder.

    Returns:
        `bool`: Whether it holds work of a run: a checkpoint, a step's line, a warmup or a pipeline. A start that failed before
        its first step leaves none.
    """
    folder = Path(output_dir)
    metrics = folder / "metrics.jsonl"
    return bool(
        named_checkpoints(folder)
        or (metrics.is_file() and metrics.stat().st_size > 0)
        or any((folder / name).exists() for name in _RESULTS)
    )


def find_damage(checkpoint: Path) -> str | None:
    """
    Looks for what a power cut or a copy that was cut off leaves, by names, sizes and the first bytes of files.

    Args:
        checkpoint (`Path`): A checkpoint.

    Returns:
        `str`, *optional*: What is missing, shorter than it was written, or zeros; `None` for a whole checkpoint.
    """
    try:
        record = json.loads((checkpoint / "progress.json").read_text())
        int(record["step"])
    except FileNotFoundError:
        return "progress.json is missing"
    except (ValueError, KeyError, TypeError):  # a UnicodeDecodeError is a ValueError
        return "progress.json cannot be read"
    sizes = record.get("files")
    if sizes is None:  # of a checkpoint from before sizes were recorded
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        sizes = dict.fromkeys([_STATE_FILE, *(str(path.relative_to(checkpoint)) for path in files)])
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        actual = path.stat().st_size
        if size not in (None, actual):
            return f"{name} has {actual} bytes of {size}"
        with path.open("rb") as file:
            if size != 0 and not any(file.read(64)):  # no format that is written here begins so
                return f"{name} is empty" if actual == 0 else f"{name} holds zeros"
    return None


def resolve_checkpoint(output_dir: str | os.PathLike[str], value: str | None) -> Path | None:
    """
    Finds the checkpoint to resume from.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.
        value (`str`, *optional*):
            `"latest"`, a checkpoint's name in `output_dir`, or a path. `None` starts anew. `"latest"` passes over, with a
            warning, what is damaged and what was saved within a streak of non-finite steps that no finite one ended.

    Returns:
        `Path`, *optional*: The checkpoint; `None` for a new run, which `"latest"` means where there is none yet.

    Raises:
        ValueError: if another value names no checkpoint or a damaged one, or `"latest"` a run that has lost its own.
    """
    if value is None:
        return None
    if value == "latest":
        return _latest(Path(output_dir))
    for path in (Path(output_dir) / value, Path(value)):
        if (path / "progress.json").is_file():
            damage = find_damage(path)
            if damage is not None:
                raise ValueError(f"resume_from_checkpoint={value!r} is damaged: {damage}. {_others(output_dir)}")
            return path
    raise ValueError(f"resume_from_checkpoint={value!r} is no checkpoint; {_others(output_dir)}")


def _others(output_dir: str | os.PathLike[str]) -> str:
    return f"{output_dir} has {[path.name for path in list_checkpoints(output_dir)] or 'none'}"


def _latest(folder: Path) -> Path | None:
    found = named_checkpoints(folder)
    if not found:
        if _lost_its_checkpoints(folder):
            raise ValueError(
                f"{folder} holds a run without its checkpoints, and `latest` would begin it anew over what is there. To go on, put "
                "one back or name one with --resume_from_checkpoint; to begin anew, choose another --output_dir, or "
                "--overwrite_output_dir in place of --resume_from_checkpoint"
            )
        logger.warning(f"no checkpoint in {folder}: starting a new run")
        return None
    within_streak = None
    for path in reversed(found):
        damage = find_damage(path)
        if damage is not None:
            logger.warning(f"passing over {path}, which is damaged: {damage}")
        elif is_within_streak(path):
            logger.warning(f"passing over {path}, saved within a streak of non-finite steps")
            within_streak = within_streak or path
        else:
            return path
    if within_streak is None:
        raise ValueError(
            f"all checkpoints in {folder} are damaged: {[path.name for path in found]}. To begin anew, choose another "
            "--output_dir, or --overwrite_output_dir in place of --resume_from_checkpoint"
        )
    logger.warning(f"there is no better one: going on from {within_streak}")  # its weights are of before the streak
    return within_streak


def is_within_streak(checkpoint: Path) -> bool:
    """
    Args:
        checkpoint (`Path`): A whole checkpoint.

    Returns:
        `bool`: Whether non-finite steps led up to it, and no finite one followed as far as the run's lines say.
    """
    if not json.loads((checkpoint / "progress.json").read_text()).get("nonfinite_in_a_row"):
        return False
    metrics = checkpoint.parent / "metrics.jsonl"
    return not any(
        record["step"] > step_of(checkpoint) and record.get("grad_norm") is not None and record["loss"] is not None
        for record in (read_metrics(metrics) if metrics.is_file() else [])
    )


def _lost_its_checkpoints(folder: Path) -> bool:
    """A run that was killed before its first checkpoint begins anew; any other had one."""
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    if any((folder / name).exists() for name in _RESULTS):
        return True
    records = read_metrics(metrics) if metrics.is_file() else []
    if not records:
        return False
    try:
        values = yaml.safe_load(config.read_text())
        saves = [values[name] for name in ("checkpointing_steps", "warmup_steps", "max_train_steps") if values[name]]
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        return True  # it says nothing of when it saves
    return bool(records[-1]["step"] > min(saves))  # at that very step it may have been killed while saving


def read_progress(checkpoint: Path) -> Progress:
    """
    Args:
        checkpoint (`Path`): A checkpoint.

    Returns:
        [`Progress`]: How far it is.
    """
    record = json.loads((checkpoint / "progress.json").read_text())
    progress = Progress(**{field.name: record[field.name] for field in fields(Progress) if field.name in record})
    progress.nonfinite_in_a_row = 0  # whoever goes on may try as often as before
    return progress


def agree_on_checkpoint(
    accelerator: Accelerator, output_dir: str | os.PathLike[str], value: str | None
) -> Path | None:
    """
    [`resolve_checkpoint`] by the main process, for all: two that resume from different ones would train on in silence.

    Args:
        accelerator (`Accelerator`): The processes.
        output_dir (`str` or `os.PathLike`): Folder of the run.
        value (`str`, *optional*): What to resume from.

    Returns:
        `Path`, *optional*: The checkpoint.

    Raises:
        ValueError: if it names none, or a process does not see it.
    """
    checkpoint = decided_by_main(accelerator, lambda: resolve_checkpoint(output_dir, value))
    if checkpoint is not None:
        seen = gather_object([(checkpoint / "progress.json").is_file()])
        blind = [process for process, sees in enumerate(seen) if not sees]
        if blind:
            raise ValueError(
                f"the processes {blind} do not see {checkpoint.absolute()}, which the main process resumes from: output_dir has to "
                "be on a disk that all processes share"
            )
    return checkpoint


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | os.PathLike[str],
    progress: Progress,
    total_limit: int | None,
    phase: Phase,
    data_state: dict[str, Any] | None = None,
) -> None:
    """
    Writes `checkpoint-STEP`. All processes call it. A kill or a power cut at any moment leaves the earlier checkpoints
    whole: this one is written under another name, synced to disk and renamed when it is complete.

    Args:
        accelerator (`Accelerator`): Holds what to save.
        output_dir (`str` or `os.PathLike`): Folder of the run.
        progress ([`Progress`]): How far the run is.
        total_limit (`int`, *optional*):
            Newest checkpoints to keep, this one included. Beside them stays the newest that is known to be good: a finite
            step came after it. This one may turn out not to be, so that a limit of 1 keeps two.
        phase ([`~trainer.phase.Phase`]): The phase that runs.
        data_state (`dict`, *optional*): State of this process's stream of data. accelerate keeps one for all processes.

    Raises:
        RuntimeError: if it cannot be written, on a full disk for instance.
    """
    final = Path(output_dir) / f"checkpoint-{progress.step}"
    temporary = Path(output_dir) / f".writing-{final.name}"
    if accelerator.is_main_process:
        _rotate(output_dir, progress, total_limit)  # so that never more than one is there beside those to keep
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary))
        training_state = phase.state_dict()  # of all processes together, whose weights may be sharded
        if data_state is not None:
            torch.save({"processes": accelerator.num_processes, **data_state}, temporary / _data_file(accelerator))
        if accelerator.is_main_process:
            torch.save(training_state, temporary / _STATE_FILE)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = [path for path in temporary.rglob("*") if path.is_file()]
            sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
            (temporary / "progress.json").write_text(json.dumps({**asdict(progress), "files": sizes}))
        sync_tree(temporary)  # by all: each host has its own files in memory
        if accelerator.is_main_process and (Path(output_dir) / "metrics.jsonl").exists():
            sync(Path(output_dir) / "metrics.jsonl")  # the lines up to here
    except Exception as error:  # OSError, and what safetensors and torch make of one
        shutil.rmtree(temporary, ignore_errors=True)
        raise RuntimeError(
            f"{final} could not be written ({error}); the whole ones are "
            f"{[path.name for path in list_checkpoints(output_dir)] or 'none'}. Make room (one more than "
            "checkpoints_total_limit must fit), then go on with --resume_from_checkpoint latest"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        remove_checkpoint(final)
        os.replace(temporary, final)
        sync(output_dir)
        _rotate(output_dir, progress, total_limit)
    accelerator.wait_for_everyone()


def _rotate(output_dir: str | os.PathLike[str], progress: Progress, total_limit: int | None) -> None:
    if total_limit is None:
        return
    checkpoints = list_checkpoints(output_dir)
    last_finite_step = progress.step - progress.nonfinite_in_a_row
    good = [path for path in checkpoints if step_of(path) < last_finite_step]
    for path in checkpoints[: -max(total_limit, 1)]:
        if path not in good[-1:]:
            remove_checkpoint(path)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, phase: Phase) -> None:
    """
    Puts everything that was prepared, and the phase, where a checkpoint was.

    Args:
        accelerator (`Accelerator`): Holds what to load.
        checkpoint (`Path`): A checkpoint.
        phase ([`~trainer.phase.Phase`]): The phase that the checkpoint is of.
    """
    accelerator.load_state(str(checkpoint))
    phase.load_state_dict(torch.load(checkpoint / _STATE_FILE, map_location="cpu", weights_only=True))


def remove_checkpoint(path: Path) -> None:
    """
    Removes a checkpoint, under another name first: a kill in between leaves none that looks whole.

    Args:
        path (`Path`): The checkpoint; it need not exist.
    """
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        doomed = path.with_name(f".removing-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def load_data_state(accelerator: Accelerator, checkpoint: Path, num_workers: int) -> dict[str, Any]:
    """
    Args:
        accelerator (`Accelerator`): Says which process this is.
        checkpoint (`Path`): A checkpoint of a run that streams.
        num_workers (`int`): Loader processes of each training process.

    Returns:
        `dict`: What [`~trainer.batches.Batches.state_dict`] gave on this process.

    Raises:
        ValueError: if the run had another number of processes or workers, whose states cannot be divided anew.
    """
    any_file = next(iter(sorted(checkpoint.glob("data_rank*.pt"))), None)
    if any_file is None:
        raise ValueError(f"{checkpoint} is of a run that did not stream: set streaming as it was")
    state = torch.load(any_file, weights_only=True)
    if (state["processes"], state["workers"]) != (accelerator.num_processes, num_workers):
        raise ValueError(
            f"{checkpoint} streamed with {state['processes']} processes and dataloader_num_workers={state['workers']}, "
            f"this run has {accelerator.num_processes} and {num_workers}. A stream goes on exactly only with as many: "
            "resume with those"
        )
    return torch.load(checkpoint / _data_file(accelerator), weights_only=True)


def _data_file(accelerator: Accelerator) -> str:
    return f"data_rank{accelerator.process_index:05d}.pt"
