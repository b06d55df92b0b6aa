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
"""The loop of the training script and the parts that it is made of, without a run."""

import importlib.util
from dataclasses import fields
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml
from helpers import REPOSITORY, train
from safetensors.torch import load_file

from erw_hf.alignment import nt_xent_alignment_loss, structural_alignment_loss
from erw_hf.objective import Objective
from erw_hf.trainer.checkpoints import Progress
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.quality_monitor import QualityMonitor
from erw_hf.trainer.run_record import read_metrics
from erw_hf.trainer.setup import build_objective
from erw_hf.trainer.step_log import Step, _LateStep


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_erw", REPOSITORY / "training" / "train_erw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seen_by", ["the step before", "the step that draws"])
def test_sigterm_leaves_a_checkpoint_whichever_step_brings_it(script, monkeypatch, seen_by):
    """A step that draws fetches its own losses, and with them a SIGTERM, though no checkpoint is due."""
    config = SimpleNamespace(checkpointing_steps=100, ema_snapshot_steps=0, push_to_hub=False, output_dir="x",
                             checkpoints_total_limit=None)  # fmt: skip
    phase = SimpleNamespace(
        inputs=SimpleNamespace(config=config, accelerator=Mock()), steps=range(1, 10), model=Mock(), ema=None
    )
    log = SimpleNamespace(
        steps=lambda phase: iter([0]),
        add=lambda phase, step: seen_by == "the step before",
        settle=lambda: seen_by == "the step that draws",
    )
    snapshots = Mock(is_due=lambda phase: seen_by == "the step that draws", is_over=lambda phase: False)
    saved = Mock()
    monkeypatch.setattr(script, "train_step", Mock())
    monkeypatch.setattr(script, "save_checkpoint", saved)
    monkeypatch.setattr(script, "logger", Mock())
    assert script.train_phase(phase, Progress(step=1), Mock(), log, snapshots) is False  # was told to stop
    saved.assert_called_once()
    snapshots.take.assert_not_called()


def test_what_a_kill_after_the_checkpoint_left_out_is_made_at_the_resume(tmp_path, tiny_flags, monkeypatch):
    """Also the last measurement of all, which a run is judged by; `best` is never a model that was not measured."""
    values = {4: 1.0, 5: 2.0, 6: None, 7: 3.0}
    monkeypatch.setattr(QualityMonitor, "_reference", lambda self, side: None)
    folder, killed = tmp_path / "run", []
    flags = [
        *tiny_flags, "--max_train_steps=7", "--evaluation_steps=1", "--validation_steps=1", "--patience=9", "--checkpointing_steps=1",
        "--num_inference_steps=1", "--num_validation_images=1", f"--output_dir={folder}", "--resume_from_checkpoint=latest",
    ]  # fmt: skip

    def measure(self, pipe):
        step = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
        if step in (5, 7) and step not in killed:
            killed.append(step)
            raise KeyboardInterrupt
        return {"fid": values[step]} if values[step] else 1 / 0

    monkeypatch.setattr(QualityMonitor, "_measure_images", measure)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(*flags)
    (folder / "samples" / "step-0000007.png").unlink()
    train(*flags)
    assert killed == [5, 7]
    records = read_metrics(folder / "evaluations.jsonl")
    assert [(r["step"], r.get("fid")) for r in records] == [(4, 1.0), (5, 2.0), (6, None), (7, 3.0)]
    assert (folder / "samples" / "step-0000007.png").is_file()
    kept = load_file(folder / "best" / "transformer" / "diffusion_pytorch_model.safetensors")
    last = load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    times = [(folder / name).stat().st_mtime_ns for name in ("best/model_index.json", "checkpoint-7/progress.json")]
    assert times[0] < times[1]


def test_losses_and_flags_come_back_by_name():
    losses = {"loss": torch.tensor(3.0), "velocity": torch.tensor(2.0)}
    step = Step(0.0, 0.0, 0.5, 1e-4, 1.0, losses, torch.tensor(7.0))
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), reduce=lambda values, how: values / 2
    )  # of two processes
    values, _ = _LateStep({}, step, {"stopping": True, "failing": False}, accelerator).fetch()
    assert values == {"loss": 1.5, "velocity": 1.0, "stopping": 0.5, "failing": 0.0, "grad_norm": 7.0}


def test_the_objective_is_made_of_the_keys_of_the_run():
    changed = {
        "path_type": "cosine", "timestep_distribution": "logit_normal", "timestep_logit_mean": 0.1,
        "timestep_logit_std": 2.0, "timestep_shift": 3.0, "contrastive_weight": 0.05, "class_token_weight": 0.03,
        "projector": "conv", "alignment_mask_ratio": 0.25, "alignment_schedule": "stop", "alignment_weight": 0.25,
        "alignment_half_life": 7, "alignment_stop_step": 9,
    }  # fmt: skip
    assert set(changed) == {field.name for field in fields(Objective)} - {
        "align",
        "prediction_type",
    }  # a new field: a new key
    config = TrainingConfig(in_channels=3, encoder="x/y", alignment_loss="structural", **changed)
    objective = build_objective(config)
    assert {name: getattr(objective, name) for name in changed} == changed
    assert objective.align is structural_alignment_loss
    assert (objective.weight_at(8), objective.weight_at(9)) == (0.25, 0.0)
    temperate = build_objective(
        TrainingConfig(in_channels=3, encoder="x/y", alignment_loss="nt_xent", alignment_temperature=0.3)
    ).align
    assert (temperate.func, temperate.keywords) == (nt_xent_alignment_loss, {"temperature": 0.3})
    # Samples are predicted on the linear path alone.
    assert build_objective(TrainingConfig(in_channels=3, prediction_type="sample")).prediction_type == "sample"
    assert build_objective(TrainingConfig(in_channels=3)).weight_at(0) == 0  # nothing to align with


def test_a_run_stops_when_its_patience_is_over_and_keeps_the_best(tmp_path, tiny_flags, monkeypatch):
    values = iter([2.0, 1.0, 1.5, 0.5])
    monkeypatch.setattr(QualityMonitor, "_measure_images", lambda self, pipe: {"fid": next(values)})
    monkeypatch.setattr(QualityMonitor, "_reference", lambda self, side: None)
    folder = tmp_path / "run"
    train(*tiny_flags, "--evaluation_steps=1", "--patience=1", "--checkpointing_steps=100", f"--output_dir={folder}")
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 6  # warmup of 3, then the third measurement
    assert (folder / "checkpoint-6").is_dir()
    assert yaml.safe_load((folder / "config.yaml").read_text())["max_train_steps"] == 6
    best, last = (
        load_file(folder / name / "transformer/diffusion_pytorch_model.safetensors") for name in ("best", "pipeline")
    )
    assert any(not torch.equal(best[name], last[name]) for name in best)
    # The same command again, as a queue gives it, trains no further.
    flags = [*tiny_flags, "--evaluation_steps=1", "--checkpointing_steps=100", f"--output_dir={folder}"]
    train(*flags, "--patience=1", "--resume_from_checkpoint=latest")
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 6
    train(*flags, "--patience=2", "--resume_from_checkpoint=latest")  # more patience, more steps
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 7
    with pytest.raises(SystemExit):
        train(*tiny_flags, "--patience=1", f"--output_dir={tmp_path}/none")
