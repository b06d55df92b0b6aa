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
import json
import shutil
from types import SimpleNamespace

import pytest
import yaml

from erw_hf.trainer import run_folder
from erw_hf.trainer.run_folder import RunFolder, check_vacant, go_back, recover, set_aside


MAIN = SimpleNamespace(is_main_process=True)

WRITTEN = [
    "config.yaml", "environment.json", "metrics.jsonl", "evaluations.jsonl", "grid.png", "loss_curve.png", "probes.png",
    "quality_curve.png", "push.log", "warmup_from.json", "samples/step-0000005.png", "checkpoint-2/progress.json",
    "checkpoint-2/model.safetensors", "checkpoint-10/progress.json", ".writing-checkpoint-12/model.safetensors",
    "pipeline/model_index.json", "pipeline/pipeline_erw.py", "pipeline/README.md",
    "pipeline/transformer/diffusion_pytorch_model.safetensors", "pipeline/vae/config.json",
    "warmup/warmup.json", "warmup/projectors.safetensors", "warmup/transformer/config.json",
    "best/transformer/diffusion_pytorch_model.safetensors", "lora/pytorch_lora_weights.safetensors", "lora/README.md",
    "ema_snapshots/step-0000002-sigma-0.050.safetensors", "hub/step-4/model_index.json", "hub/.lock",
    "rewound-1/checkpoint-8/progress.json", "passed-over/checkpoint-6/progress.json",
    "mine/events.out.tfevents.1.host", "mine/1700000000.5/hparams.yml", "mine/1700000000.5/events.out.tfevents.2.host",
]  # fmt: skip
OWN = [
    "notes.md", "checkpoint-2-best/model.safetensors", "checkpoint-best/x", "samples/favourite.png", "evaluation.json",
    "evaluation/images.npz", "reference-0123abcd.npz", "pipeline/thoughts.txt", "best/seed-3.png", "other-run/metrics.jsonl",
    "other-run/checkpoint-2/progress.json", "other-run/mine/events.out.tfevents.1.host", "tensorboard/events.out.tfevents.1",
    "data/cat/1.png", "metrics.csv", ".gitignore", "hub/notes",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A finished run, and what its user keeps beside it."""
    folder = tmp_path / "run"
    for name in (*WRITTEN, *OWN):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"old {name}")
    (folder / "config.yaml").write_text(yaml.safe_dump({"tracker_project_name": "mine"}))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def start(folder, resume_step=None, overwrite=True):
    """A start up to its first step."""
    folder.begin(resume_step, 0, may_replace=overwrite)
    (folder.path / "config.yaml").write_text("seed: 0")
    (folder.path / "environment.json").write_text("{}")
    (folder.path / "warmup_from.json").write_text("{}")
    (folder.path / "metrics.jsonl").write_text("")
    (folder.path / "erw").mkdir()
    (folder.path / "erw" / "events.out.tfevents.3.host").write_text("")


def make_step(folder):
    (folder.path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    folder.step_made()


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else_once_a_step_is_made(folder):
    before = contents(folder)
    with RunFolder(folder, MAIN) as owner:
        start(owner)
        assert not (folder / "checkpoint-2").exists() and contents(folder / ".overwritten") == {
            name: before[name] for name in WRITTEN
        }
        make_step(owner)
        assert not (folder / ".overwritten").exists()
    new = {"config.yaml", "environment.json", "warmup_from.json", "metrics.jsonl", "erw/events.out.tfevents.3.host"}
    assert set(contents(folder)) == {*OWN, *new}
    assert all(contents(folder)[name] == before[name] for name in OWN)


def test_a_start_that_fails_before_its_first_step_gives_the_earlier_run_back(folder):
    before = contents(folder)
    with pytest.raises(RuntimeError), RunFolder(folder, MAIN) as owner:
        start(owner)
        raise RuntimeError("out of memory")
    assert contents(folder) == before


@pytest.mark.parametrize("killed_after", [*range(0, 40, 4), None])
def test_a_kill_while_overwriting_loses_nothing(folder, monkeypatch, killed_after):
    """After so many moves, on the way there or back; a second kill on the way back."""
    before, moves, move = contents(folder), [], shutil.move

    def killed_move(*arguments):
        if len(moves) == killed_after:
            raise KeyboardInterrupt
        moves.append(arguments)
        return move(*arguments)

    monkeypatch.setattr(run_folder.shutil, "move", killed_move)
    try:
        set_aside(folder)
        (folder / "metrics.jsonl").write_text("")
        (folder / "environment.json").write_text("{}")
    except KeyboardInterrupt:
        moves.clear()
    try:
        recover(folder)
    except KeyboardInterrupt:
        monkeypatch.setattr(run_folder.shutil, "move", move)
        recover(folder)
    assert contents(folder) == before


def test_a_kill_after_the_first_step_does_not_bring_the_earlier_run_back(folder):
    set_aside(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with RunFolder(folder, MAIN):
        assert not (folder / ".overwritten").exists() and not (folder / "checkpoint-2").exists()


@pytest.mark.parametrize(
    ("name", "content", "held"),
    [
        ("metrics.jsonl", "", False),
        ("metrics.jsonl", '{"step": 1}\n', True),
        ("config.yaml", "seed: 1", False),
        ("environment.json", "{}", False),
        ("checkpoint-2/progress.json", "", True),
        ("pipeline/model_index.json", "{}", True),
        ("warmup/warmup.json", "{}", True),
        ("evaluations.jsonl", "", False),
        ("mine.txt", "x", False),
    ],
)
def test_what_was_not_begun_is_not_held(tmp_path, name, content, held):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    if held:
        with pytest.raises(ValueError, match="already holds a run"):
            check_vacant(tmp_path, may_replace=False)
    else:
        check_vacant(tmp_path, may_replace=False)
    check_vacant(tmp_path, may_replace=True)


def test_a_failed_start_leaves_nothing_to_the_next_one(tmp_path):
    with pytest.raises(RuntimeError), RunFolder(tmp_path / "run", MAIN) as owner:
        start(owner, overwrite=False)
        raise RuntimeError("no such encoder")
    (tmp_path / "run" / "notes.md").write_text("mine")
    with RunFolder(tmp_path / "run", MAIN) as owner:
        owner.begin(None, 0, may_replace=False)
        assert {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()} == {".lock", "notes.md"}


def test_going_back_moves_later_checkpoints_aside_with_their_lines(tmp_path, caplog):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "training_state.pt").write_text("weights")
        (tmp_path / f"checkpoint-{step}" / "progress.json").write_text(json.dumps({"step": step}))
    (tmp_path / ".writing-checkpoint-8").mkdir()
    (tmp_path / "ema_snapshots").mkdir()
    for step in (1, 3):
        (tmp_path / "ema_snapshots" / f"step-000000{step}-sigma-0.050.safetensors").touch()
    lines = "".join(json.dumps({"step": step, "loss": 1.0, "grad_norm": 1.0}) + "\n" for step in range(1, 8))
    (tmp_path / "metrics.jsonl").write_text(lines)
    measured = [{"step": 2, "fid": 9.0}, {"step": 4, "fid": 1.0}, {"step": 6, "fid": 5.0}]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in measured))
    (tmp_path / "best").mkdir()  # the model of step 4
    go_back(tmp_path, 6, 4)
    assert (
        not caplog.text and not (tmp_path / "rewound-1").exists() and not (tmp_path / ".writing-checkpoint-8").exists()
    )
    go_back(tmp_path, 2, 1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert "checkpoint-4, checkpoint-6, best" in caplog.text and str(tmp_path / "rewound-1") in caplog.text
    assert sorted(path.name for path in (tmp_path / "rewound-1").glob("*")) == [
        "best", "checkpoint-4", "checkpoint-6", "ema_snapshots", "evaluations.jsonl", "metrics.jsonl",
    ]  # fmt: skip
    assert (tmp_path / "rewound-1" / "metrics.jsonl").read_text() == lines
    assert [path.name for path in (tmp_path / "ema_snapshots").iterdir()] == ["step-0000001-sigma-0.050.safetensors"]
    shutil.copytree(tmp_path / "rewound-1" / "checkpoint-4", tmp_path / "checkpoint-4")
    go_back(tmp_path, 2, 1)
    assert (tmp_path / "rewound-2" / "checkpoint-4").is_dir()
    # A kill after the best measurement, whose step is repeated: its model is no longer that of a line.
    (tmp_path / "best").mkdir()
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in measured))
    go_back(tmp_path, 2, 1)
    assert (tmp_path / "passed-over" / "best").is_dir() and not (tmp_path / "best").exists()
    # What "latest" passes over at each start of a chain of jobs is kept once.
    for _ in range(3):
        (tmp_path / "checkpoint-4").mkdir()
        go_back(tmp_path, 2, 1)
    assert [path.name for path in (tmp_path / "passed-over").glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (tmp_path / "rewound-3").exists()


def test_a_folder_is_owned_from_the_start_where_it_is_there_and_from_its_making_where_not(tmp_path):
    with RunFolder(tmp_path, MAIN):
        assert (tmp_path / ".lock").is_file()
    assert not (tmp_path / ".lock").exists()
    with RunFolder(tmp_path / "new", MAIN) as owner:
        assert not (tmp_path / "new").exists()  # nothing was checked yet
        owner.begin(None, 0, may_replace=False)
        assert (tmp_path / "new" / ".lock").is_file()
    with RunFolder(tmp_path / "other", SimpleNamespace(is_main_process=False)) as owner:
        owner.begin(None, 0, may_replace=False)
    assert not (tmp_path / "other").exists()
