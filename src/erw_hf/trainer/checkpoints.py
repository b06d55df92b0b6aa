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
"""Saving and finding checkpoints: each is complete or not there, and a run resumes exactly or not at all."""

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
# What a run writes at the end of a phase, so after a checkpoint.
_RESULTS = ("pipeline/model_index.json", "warmup/warmup.json", "loss_curve.png")


@dataclass
class Progress:
    """
    What a run has done so far, the warmup counted.

    Args:
        step (`int`): Steps of both phases.
        images_seen (`int`): Images over all ranks, skipped steps included.
        flops (`float`): Floating-point operations of training, the encoder included.
        nonfinite_steps (`int`): Steps skipped for a non-finite gradient.
        nonfinite_in_a_row (`int`): The same since the last good step.
        step_batch_size (`int`): Images per step over all ranks; the order of the data depends on it.
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
    The [`Progress`] of a checkpoint. Raises ValueError if `output_dir` holds another run, or the number of images per
    step has changed: a run resumes exactly or not at all.
    """
    if checkpoint.resolve().parent != Path(output_dir).resolve() and holds_run(output_dir):
        raise ValueError(
            f"{output_dir} holds a run other than that of {checkpoint}: to branch off, choose another --output_dir"
        )
    progress = read_progress(checkpoint)
    if progress.step_batch_size not in (0, step_batch_size):
        raise ValueError(
            f"a step of {checkpoint} had {progress.step_batch_size} images, now it would have {step_batch_size}, which "
            "would change the order of the data: keep train_batch_size x gradient_accumulation_steps x processes as it was"
        )
    return progress


def step_of(checkpoint: Path) -> int:
    """The step of a folder `checkpoint-STEP`."""
    return int(checkpoint.name.split("-")[1])


def named_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """All folders named like a checkpoint, complete or not, the oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def check_same_data(progress: Progress, source: Source, dataset_name: str, retry_seconds: float = 300) -> None:
    """Raises ValueError if a checkpoint was trained on other data, on which class ids and the order of samples depend;
    sets `progress.data`."""
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
        logger.warning("the checkpoint does not record its data: resuming without comparing it")
    progress.data = data


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    return [path for path in named_checkpoints(output_dir) if find_damage(path) is None]


def holds_run(output_dir: str | os.PathLike[str]) -> bool:
    """
    Whether a folder holds work of a run: a checkpoint, a step's line, a warmup or a pipeline. A start that failed
    before its first step leaves none.
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
    What is missing, truncated or zeros in a checkpoint, after a power cut or an interrupted copy, judged by names,
    sizes and first bytes; `None` if it is complete.
    """
    try:
        record = json.loads((checkpoint / "progress.json").read_text())
        int(record["step"])
    except FileNotFoundError:
        return "progress.json is missing"
    except (ValueError, KeyError, TypeError):  # a UnicodeDecodeError is a ValueError
        return "progress.json cannot be read"
    sizes = record.get("files")
    if sizes is None:  # a checkpoint from before sizes were recorded
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
            if size != 0 and not any(file.read(64)):  # no format written here begins with zeros
                return f"{name} is empty" if actual == 0 else f"{name} holds zeros"
    return None


def resolve_checkpoint(output_dir: str | os.PathLike[str], value: str | None) -> Path | None:
    """
    The checkpoint to resume from, `None` for a new run.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the run.
        value (`str`, *optional*):
            A checkpoint's name in `output_dir`, a path, or `"latest"`, which passes over, with a warning, damaged
            checkpoints and those saved during a streak of non-finite steps that no finite step ended.

    Raises:
        ValueError: if it names no checkpoint or a damaged one, or if `"latest"` meets a run whose checkpoints have
            gone.
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
    raise ValueError(f"resume_from_checkpoint={value!r} is not a checkpoint; {_others(output_dir)}")


def _others(output_dir: str | os.PathLike[str]) -> str:
    return f"{output_dir} has {[path.name for path in list_checkpoints(output_dir)] or 'none'}"


def _latest(folder: Path) -> Path | None:
    found = named_checkpoints(folder)
    if not found:
        if _lost_its_checkpoints(folder):
            raise ValueError(
                f"{folder} holds a run whose checkpoints are missing, and `latest` would restart it over its results. To resume, put "
                "one back or name one with --resume_from_checkpoint; to start a new run, choose another --output_dir, or "
                "--overwrite_output_dir instead of --resume_from_checkpoint"
            )
        logger.warning(f"no checkpoint in {folder}: starting a new run")
        return None
    within_streak = None
    for path in reversed(found):
        damage = find_damage(path)
        if damage is not None:
            logger.warning(f"passing over {path}, which is damaged: {damage}")
        elif is_within_streak(path):
            logger.warning(f"passing over {path}, saved during a streak of non-finite steps")
            within_streak = within_streak or path
        else:
            return path
    if within_streak is None:
        raise ValueError(
            f"all checkpoints in {folder} are damaged: {[path.name for path in found]}. To start a new run, choose another "
            "--output_dir, or --overwrite_output_dir instead of --resume_from_checkpoint"
        )
    logger.warning(
        f"there is no better one: resuming from {within_streak}"
    )  # its weights are those from before the streak
    return within_streak


def is_within_streak(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved after non-finite steps, with no finite step after it in the run's lines."""
    if not json.loads((checkpoint / "progress.json").read_text()).get("nonfinite_in_a_row"):
        return False
    metrics = checkpoint.parent / "metrics.jsonl"
    return not any(
        record["step"] > step_of(checkpoint) and record.get("grad_norm") is not None and record["loss"] is not None
        for record in (read_metrics(metrics) if metrics.is_file() else [])
    )


def _lost_its_checkpoints(folder: Path) -> bool:
    """Whether a run must have had a checkpoint; one killed before its first may start again."""
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
        return True  # it does not say when it saves
    return bool(records[-1]["step"] > min(saves))  # at that very step it may have been killed during the save


def read_progress(checkpoint: Path) -> Progress:
    """The [`Progress`] of a checkpoint."""
    record = json.loads((checkpoint / "progress.json").read_text())
    progress = Progress(**{field.name: record[field.name] for field in fields(Progress) if field.name in record})
    progress.nonfinite_in_a_row = 0  # a resumed run may try as often as before
    return progress


def agree_on_checkpoint(
    accelerator: Accelerator, output_dir: str | os.PathLike[str], value: str | None
) -> Path | None:
    """
    [`resolve_checkpoint`] on the main rank, for all: ranks that resumed from different ones would train on silently.
    Raises ValueError if it finds none, or if a rank does not see it.
    """
    checkpoint = decided_by_main(accelerator, lambda: resolve_checkpoint(output_dir, value))
    if checkpoint is not None:
        seen = gather_object([(checkpoint / "progress.json").is_file()])
        blind = [process for process, sees in enumerate(seen) if not sees]
        if blind:
            raise ValueError(
                f"the ranks {blind} do not see {checkpoint.absolute()}, which the main rank resumes from: output_dir has to "
                "be on a disk that all ranks share"
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
    Writes `checkpoint-STEP`; all ranks call it. A kill or a power cut at any moment leaves the earlier checkpoints
    intact: this one is written under another name, synced to disk and renamed when it is complete.

    Args:
        total_limit (`int`, *optional*):
            Newest checkpoints to keep, this one included. The newest one known to be good (a finite step followed it)
            also stays, so a limit of 1 keeps two.
        data_state (`dict`, *optional*): State of this rank's stream; accelerate would keep one for all ranks.

    Raises:
        RuntimeError: if it cannot be written, for instance on a full disk.
    """
    final = Path(output_dir) / f"checkpoint-{progress.step}"
    temporary = Path(output_dir) / f".writing-{final.name}"
    if accelerator.is_main_process:
        _rotate(output_dir, progress, total_limit)  # first, so that at most one is there besides those to keep
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        if accelerator.is_main_process:
            temporary.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        training_state = phase.state_dict()  # called on all ranks, since weights may be sharded
        if data_state is not None:
            torch.save({"processes": accelerator.num_processes, **data_state}, temporary / _data_file(accelerator))
        if accelerator.is_main_process:
            torch.save(training_state, temporary / _STATE_FILE)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = [path for path in temporary.rglob("*") if path.is_file()]
            sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
            (temporary / "progress.json").write_text(json.dumps({**asdict(progress), "files": sizes}))
        sync_tree(temporary)  # on all ranks: each host has its own files in memory
        if accelerator.is_main_process and (Path(output_dir) / "metrics.jsonl").exists():
            sync(Path(output_dir) / "metrics.jsonl")  # the lines up to here
    except Exception as error:  # OSError, or what safetensors and torch make of it
        shutil.rmtree(temporary, ignore_errors=True)
        raise RuntimeError(
            f"{final} could not be written ({error}); complete ones: "
            f"{[path.name for path in list_checkpoints(output_dir)] or 'none'}. Make room (one more than "
            "checkpoints_total_limit must fit), then resume with --resume_from_checkpoint latest"
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
    """Restores everything that was prepared, and the phase, from a checkpoint."""
    accelerator.load_state(str(checkpoint))
    accelerator.step = 0  # micro-batches since the last step: another number of them may make up a step now
    phase.load_state_dict(torch.load(checkpoint / _STATE_FILE, map_location="cpu", weights_only=True))


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, if it exists, under another name first, so that a kill leaves no half checkpoint."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        doomed = path.with_name(f".removing-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def load_data_state(accelerator: Accelerator, checkpoint: Path, num_workers: int, batch_size: int) -> dict[str, Any]:
    """
    This rank's [`~trainer.batches.Batches.state_dict`]. Raises ValueError if the run had another number of ranks or
    workers, since their states cannot be redistributed, or other batches, which several workers make in turn.
    """
    any_file = next(iter(sorted(checkpoint.glob("data_rank*.pt"))), None)
    if any_file is None:
        raise ValueError(f"{checkpoint} belongs to a run without streaming: set streaming as it was")
    state = torch.load(any_file, weights_only=True)
    if (state["processes"], state["workers"]) != (accelerator.num_processes, num_workers):
        raise ValueError(
            f"{checkpoint} streamed with {state['processes']} processes and dataloader_num_workers={state['workers']}, "
            f"this run has {accelerator.num_processes} and {num_workers}. A stream resumes exactly only with the same "
            "numbers: use those"
        )
    before = state.get("batch", batch_size)  # older checkpoints lack it
    if num_workers > 1 and before != batch_size:
        raise ValueError(
            f"{checkpoint} streamed with train_batch_size={before}, this run has {batch_size}: several loader workers make batches "
            "in turn, so a stream resumes exactly only with the same size"
        )
    return torch.load(checkpoint / _data_file(accelerator), weights_only=True)


def _data_file(accelerator: Accelerator) -> str:
    return f"data_rank{accelerator.process_index:05d}.pt"
