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
"""Logging a step: its line of `metrics.jsonl`, its values for the trackers, its numbers on the progress bar."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from erw_hf.trainer.batches import Batches
from erw_hf.trainer.checkpoints import Progress
from erw_hf.trainer.device import LateValues, peak_memory
from erw_hf.trainer.flops import peak_flops
from erw_hf.trainer.phase import Phase
from erw_hf.trainer.run_folder import RunFolder
from erw_hf.trainer.run_record import MetricsFile
from erw_hf.trainer.setup import Inputs, nonfinite_inputs
from erw_hf.trainer.trackers import start_trackers


@dataclass
class Step:
    """
    An optimizer step that the host has launched.

    Args:
        started (`float`): When the host began it, on `time.perf_counter`'s clock.
        waited (`float`): Seconds that this process waited for data.
        weight (`float`): lambda.
        learning_rate (`float`): Learning rate.
        flops (`float`): Floating-point operations, over all processes.
        losses (`dict[str, torch.Tensor]`): This process's losses by name, on the device.
        grad_norm (`torch.Tensor` of shape `()`): Norm of the gradient, the same on all processes.
    """

    started: float
    waited: float
    weight: float
    learning_rate: float
    flops: float
    losses: dict[str, torch.Tensor]
    grad_norm: torch.Tensor


class StepLog:
    """Logs a step while the next one runs, so that the host never waits for the device.

    Reasons to end a run travel with the losses in one reduction: SIGTERM to any rank, missing data on any rank, and
    a gradient that stays non-finite."""

    def __init__(
        self,
        inputs: Inputs,
        folder: RunFolder,
        progress: Progress,
        batches: Batches,
        stop_requested: Callable[[], bool],
    ) -> None:
        config, accelerator = inputs.config, inputs.accelerator
        self.inputs, self.folder, self.progress = inputs, folder, progress
        self.batches, self.stop_requested = batches, stop_requested
        self._file = None
        if accelerator.is_main_process:
            self._file = MetricsFile(Path(config.output_dir) / "metrics.jsonl", resume_step=progress.step)
        start_trackers(config, accelerator, progress.step)
        self._late: _LateStep | None = None
        self._last_arrival = 0.0  # when the device finished the last logged step

    def steps(self, phase: Phase) -> Iterable[int]:
        """The steps that are left of a phase, with a bar on the main process."""
        self._bar = tqdm(
            range(self.progress.step, phase.steps.stop),
            desc=f"{phase.name:6}",
            initial=self.progress.step - phase.steps.start,
            total=len(phase.steps),
            disable=not self.inputs.accelerator.is_main_process,
            unit="step",
        )
        return self._bar

    def add(self, phase: Phase, step: Step) -> bool:
        """
        Writes the step before this one, counts this one, and sends its losses on their way. Returns whether SIGTERM came to any
        process by the step before.
        """
        stopping = self.settle()
        progress, accelerator = self.progress, self.inputs.accelerator
        progress.step += 1
        progress.step_batch_size = self.inputs.step_batch_size
        progress.images_seen += self.inputs.step_batch_size
        progress.flops += step.flops
        record = {
            "step": progress.step,
            "phase": phase.name,
            "lambda": step.weight,
            "learning_rate": step.learning_rate,
            "images_seen": progress.images_seen,
            "flops": progress.flops,
            "peak_memory_gib": peak_memory(accelerator.device) / 2**30,
        }
        flags = {"stopping": self.stop_requested(), "failing": self.batches.error is not None}
        self._late = _LateStep(record, step, flags, accelerator)
        return stopping

    def settle(self) -> bool:
        """
        Fetches the losses of the step that was added last, unless that was done, counts it if it was skipped, and writes its
        line. Returns whether SIGTERM came to any process by then.

        Raises:
            RuntimeError: on all processes, if one lacks data or too many steps in a row had a non-finite gradient.
        """
        if self._late is None:
            return False
        config, accelerator, progress = self.inputs.config, self.inputs.accelerator, self.progress
        late, self._late = self._late, None
        values, arrived = late.fetch()
        # The device began this step when the host did, or when it finished the previous one.
        seconds = arrived - max(late.step.started, self._last_arrival)
        self._last_arrival = arrived
        if values["failing"]:
            self.batches.check(late.record["step"])
        finite = math.isfinite(values["grad_norm"])
        progress.nonfinite_steps += not finite
        progress.nonfinite_in_a_row = 0 if finite else progress.nonfinite_in_a_row + 1
        losses = {name: values[name] for name in late.step.losses}
        peak = peak_flops(accelerator.device)
        record = late.record | {
            "images_per_second": self.inputs.step_batch_size / seconds,
            "data_wait": late.step.waited / seconds,
            "mfu": None if peak is None else late.step.flops / seconds / (peak * accelerator.num_processes),
            **losses,
            "grad_norm": values["grad_norm"],
            "nonfinite_steps": progress.nonfinite_steps,
        }
        if self._file is not None:
            self._file.write(record)
            self.folder.step_made()
        accelerator.log({k: v for k, v in record.items() if k not in ("step", "phase")}, step=record["step"])
        shown = {name: f"{loss:.4f}" for name, loss in losses.items()}
        self._bar.set_postfix({"img/s": f"{record['images_per_second']:.0f}", **shown}, refresh=False)
        if progress.nonfinite_in_a_row >= config.max_nonfinite_steps:
            raise RuntimeError(
                f"{progress.nonfinite_in_a_row} steps in a row had a non-finite gradient and were skipped. {self._why()}"
            )
        return values["stopping"] > 0

    def _why(self) -> str:
        """Tells broken inputs from a training that diverged. All processes call it."""
        mine = nonfinite_inputs(self.inputs, self.batches.last or {})
        if broken := sorted(set(gather_object(mine))):
            return (
                f"Their inputs are broken: {', '.join(broken)} hold NaN or infinity. A lower learning_rate does not help; "
                "use another model or precision"
            )
        return (
            "Their latents and tokens are finite, so the training diverged: resume from the last checkpoint in "
            f"{self.inputs.config.output_dir} with a lower learning_rate"
        )


class _LateStep:
    """A step whose losses and flags are averaged over all processes, in one reduction, and on their way to the host."""

    def __init__(self, record: dict[str, Any], step: Step, flags: dict[str, bool], accelerator: Accelerator) -> None:
        self.record, self.step = record, step
        self._names = [*step.losses, *flags, "grad_norm"]
        bits = [torch.full((), float(flag), device=accelerator.device) for flag in flags.values()]
        means = accelerator.reduce(torch.stack([*step.losses.values(), *bits]), "mean")
        self._values = LateValues(torch.cat([means, step.grad_norm.reshape(1).float()]))

    def fetch(self) -> tuple[dict[str, float], float]:
        """The values by name, and when they were there."""
        values = dict(zip(self._names, self._values.fetch(), strict=True))
        return values, self._values.arrived
