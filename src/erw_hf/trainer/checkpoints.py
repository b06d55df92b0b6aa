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
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from erw_hf.trainer.phase import Phase


logger = get_logger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE_FILE = "training_state.pt"


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
    """

    step: int = 0
    images_seen: int = 0
    flops: float = 0.0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    step_batch_size: int = 0


def prepare_output_dir(output_dir: str | os.PathLike[str], resuming: bool, overwrite: bool = False) -> None:
    """
    Makes a run's folder, proves that it can be written, and never mixes two runs in it.

    Args:
        output_dir (`str` or `os.PathLike`): The folder.
        resuming (`bool`): Go on with the run that it holds.
        overwrite (`bool`, *optional*, defaults to `False`): Delete the run that it holds, unless that goes on.

    Raises:
        ValueError: if it holds a run that is neither to go on nor to be deleted, or if it cannot be written.
    """
    folder = Path(output_dir)
    if (folder / "metrics.jsonl").exists() and not resuming:
        if not overwrite:
            raise ValueError(
                f"{folder} holds a run already: continue it with --resume_from_checkpoint latest, choose another "
                "--output_dir, or delete it with --overwrite_output_dir"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to output_dir {folder}: {error}") from error


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
    if checkpoint.resolve().parent != Path(output_dir).resolve() and (Path(output_dir) / "metrics.jsonl").exists():
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


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """
    Args:
        output_dir (`str` or `os.PathLike`): Folder of a run.

    Returns:
        `list[Path]`: Its whole checkpoints, the oldest first.
    """
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    found = [path for path in found if (path / "progress.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def resolve_checkpoint(output_dir: str | os.PathLike[str], value: str | None) -> Path | None:
    """
    Finds the checkpoint to resume from.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.
        value (`str`, *optional*): `"latest"`, a checkpoint's name in `output_dir`, or a path. `None` starts anew.

    Returns:
        `Path`, *optional*: The checkpoint; `None` for a new run, which `"latest"` means where there is none yet.

    Raises:
        ValueError: if another value names no checkpoint.
    """
    if value is None:
        return None
    if value == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            logger.warning(f"no checkpoint in {output_dir}: starting a new run", main_process_only=True)
            return None
        return checkpoints[-1]
    for path in (Path(output_dir) / value, Path(value)):
        if (path / "progress.json").is_file():
            return path
    raise ValueError(
        f"resume_from_checkpoint={value!r} is no checkpoint; {output_dir} has "
        f"{[path.name for path in list_checkpoints(output_dir)] or 'none'}"
    )


def read_progress(checkpoint: Path) -> Progress:
    """
    Args:
        checkpoint (`Path`): A checkpoint.

    Returns:
        [`Progress`]: How far it is.
    """
    progress = Progress(**json.loads((checkpoint / "progress.json").read_text()))
    progress.nonfinite_in_a_row = 0  # whoever goes on may try as often as before
    return progress


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | os.PathLike[str],
    progress: Progress,
    total_limit: int | None,
    phase: Phase,
    data_state: dict[str, Any] | None = None,
) -> None:
    """
    Writes `checkpoint-STEP`. All processes call it. A kill at any moment leaves the earlier checkpoints whole: this one
    is written under another name, renamed when it is complete, and only then are the oldest removed.

    Args:
        accelerator (`Accelerator`): Holds what to save.
        output_dir (`str` or `os.PathLike`): Folder of the run.
        progress ([`Progress`]): How far the run is.
        total_limit (`int`, *optional*): Checkpoints to keep, this one included.
        phase ([`~trainer.phase.Phase`]): The phase that runs.
        data_state (`dict`, *optional*): State of this process's stream of data. accelerate keeps one for all processes.

    Raises:
        RuntimeError: if it cannot be written, on a full disk for instance.
    """
    final = Path(output_dir) / f"checkpoint-{progress.step}"
    temporary = Path(output_dir) / f".writing-{final.name}"
    if accelerator.is_main_process:
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
            (temporary / "progress.json").write_text(json.dumps(asdict(progress)))
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
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                remove_checkpoint(old)
    accelerator.wait_for_everyone()


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
    if path.exists():
        doomed = path.with_name(f".removing-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def remove_later_checkpoints(output_dir: str | os.PathLike[str], step: int) -> None:
    """
    Removes what a run that goes on from an earlier checkpoint leaves behind ("latest" must mean its own), and what kills
    have left half written or half removed.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.
        step (`int`): Last step to keep.
    """
    for pattern in (".writing-checkpoint-*", ".removing-checkpoint-*"):
        for path in Path(output_dir).glob(pattern):
            shutil.rmtree(path)
    for path in list_checkpoints(output_dir):
        if int(path.name.split("-")[1]) > step:
            remove_checkpoint(path)


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
