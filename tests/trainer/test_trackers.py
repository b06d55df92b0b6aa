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
"""Trackers get losses and pictures; their failures end no run."""

import logging
import shutil

import numpy as np
import pytest
from helpers import train

from erw_hf.trainer.run_record import read_metrics
from erw_hf.trainer.trackers import ForgivingTracker


class Broken:
    name = "wandb"
    calls = 0

    def log(self, values, step):
        self.calls += 1
        raise ConnectionError("no answer")

    finish = log


def test_a_tracker_that_raises_is_told_once_and_tried_again(caplog):
    tracker = Broken()
    forgiving = ForgivingTracker(tracker)
    for step in range(3):
        forgiving.log({"loss": 1.0}, step=step)
    forgiving.finish({}, step=3)
    assert tracker.calls == 4 and forgiving.name == "wandb" and not hasattr(forgiving, "log_images")
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "the tracker wandb failed, the run continues" in warning.message and "no answer" in warning.message


def test_tensorboard_gets_losses_and_pictures(tmp_path, tiny_flags):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(*tiny_flags, "--report_to=tensorboard", "--validation_steps=5", f"--output_dir={tmp_path}/run")
    # The tracker's hyper-parameters get a file of their own, deeper down.
    events = min((tmp_path / "run" / "erw").rglob("events.out.tfevents.*"), key=lambda path: len(path.parts))
    log = EventAccumulator(str(events.parent)).Reload()
    recorded = [(event.step, event.value) for event in log.Scalars("loss")]
    np.testing.assert_allclose(
        [value for _, value in recorded],
        [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")],
        rtol=1e-6,
    )
    assert [event.step for event in log.Images("samples")] == [5]


def test_a_tracker_that_is_not_installed_raises(tmp_path, tiny_flags):
    with pytest.raises(ValueError, match="report_to='comet_ml' is not installed"):
        train(*tiny_flags, "--report_to=comet_ml", f"--output_dir={tmp_path}/run")


def test_a_tracker_that_does_not_start_ends_no_run(tmp_path, tiny_flags, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    def start(self):
        raise RuntimeError("Run initialization has timed out after 90.0 sec")

    monkeypatch.setattr(TensorBoardTracker, "start", start)
    train(
        *tiny_flags,
        "--report_to=tensorboard",
        "--max_train_steps=1",
        "--warmup_steps=0",
        f"--output_dir={tmp_path}/run",
    )
    assert "the tracker tensorboard did not start, the run continues without it" in caplog.text
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def test_tensorboard_shows_a_step_once_after_a_kill(tmp_path, tiny_flags):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*tiny_flags, "--report_to=tensorboard", "--checkpointing_steps=2", f"--output_dir={tmp_path}/run"]
    train(*flags, "--max_train_steps=5")
    shutil.rmtree(tmp_path / "run/checkpoint-5")  # as if it had been killed after step 5 was logged
    train(*flags, "--max_train_steps=6", "--resume_from_checkpoint=latest")
    log = EventAccumulator(str(tmp_path / "run" / "erw")).Reload()
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_raises_ends_no_run(tmp_path, tiny_flags, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    def log(self, values, step=None, **kwargs):
        raise ConnectionError("no answer")

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    monkeypatch.setattr(TensorBoardTracker, "log_images", log)
    train(*tiny_flags, "--report_to=tensorboard", "--validation_steps=5", f"--output_dir={tmp_path}/run")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 7 and (tmp_path / "run" / "pipeline").is_dir()
    assert caplog.text.count("the tracker tensorboard failed") == 1
