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
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import yaml

from erw_hf.trainer import checkpoints
from erw_hf.trainer.checkpoints import (
    Progress,
    agree_on_checkpoint,
    list_checkpoints,
    load_data_state,
    read_progress,
    resolve_checkpoint,
    save_checkpoint,
)


def processes(count):
    """What checkpoints ask of the accelerator of each process; the processes are threads here."""
    barrier = threading.Barrier(count, timeout=1800)
    return [
        SimpleNamespace(
            process_index=rank,
            num_processes=count,
            is_main_process=rank == 0,
            wait_for_everyone=barrier.wait,
            save_state=lambda folder: None,
        )
        for rank in range(count)
    ]


def save(process, folder, step, total_limit=None, data_state=None, nonfinite_in_a_row=0):
    progress = Progress(step=step, images_seen=4 * step, nonfinite_in_a_row=nonfinite_in_a_row)
    nothing = SimpleNamespace(state_dict=dict)
    save_checkpoint(process, folder, progress, total_limit, nothing, data_state)


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_the_latest_is_the_one_of_the_most_steps_and_the_oldest_go(tmp_path):
    (process,) = processes(1)
    for step in (8, 9, 10, 100):
        save(process, tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()  # not a whole one
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert resolve_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert read_progress(tmp_path / "checkpoint-9") == Progress(step=9, images_seen=36)
    save(process, tmp_path, 101, total_limit=3)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-101"]
    save(process, tmp_path, 102, total_limit=1)
    assert names(tmp_path) == ["checkpoint-101", "checkpoint-102"]  # 101 is known to be good, 102 is not yet


def test_each_process_gets_its_own_stream_back(tmp_path):
    both = processes(2)
    states = [{"workers": 2, "batch": 8, "stream": {"position": process.process_index}} for process in both]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda process, state: save(process, tmp_path, 5, data_state=state), both, states))
    (checkpoint,) = list_checkpoints(tmp_path)
    for process in both:
        assert load_data_state(process, checkpoint, 2, 8)["stream"] == {"position": process.process_index}
    with pytest.raises(ValueError, match="streamed with 2 processes and dataloader_num_workers=2"):
        load_data_state(both[1], checkpoint, 1, 8)
    with pytest.raises(ValueError, match="streamed with train_batch_size=8, this run has 4"):
        load_data_state(both[1], checkpoint, 2, 4)


@pytest.mark.parametrize("limit", [-1, 0, 1, 2, 3])
def test_no_rotation_removes_the_last_good_checkpoint(tmp_path, limit):
    (process,) = processes(1)
    for step in (2, 4):
        save(process, tmp_path, step, limit)
    for step in range(5, 12):  # step 5 and all later ones are not finite: what 4 holds is in doubt, 2 is good
        save(process, tmp_path, step, limit, nonfinite_in_a_row=step - 4)
    assert "checkpoint-2" in names(tmp_path) and len(names(tmp_path)) == max(limit, 1) + 1
    save(process, tmp_path, 12, limit)  # a finite step: all before it were good
    kept = list(range(13 - max(limit, 2), 13))
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_no_more_than_one_checkpoint_beside_those_to_keep_is_ever_there(tmp_path):
    (process,) = processes(1)
    process.save_state = lambda folder: counts.append(len(names(tmp_path)))
    counts = []
    for step in range(1, 8):
        save(process, tmp_path, step, total_limit=1)
    assert max(counts) == 1


def metrics_of(folder, losses):
    lines = [{"step": i, "loss": loss, "grad_norm": loss} for i, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_latest_passes_over_what_was_saved_within_a_streak(tmp_path, caplog):
    (process,) = processes(1)
    save(process, tmp_path, 2, nonfinite_in_a_row=1)
    assert resolve_checkpoint(tmp_path, "latest").name == "checkpoint-2"  # its weights are of before the streak
    assert "no better one" in caplog.text
    save(process, tmp_path, 4)
    save(process, tmp_path, 6, nonfinite_in_a_row=2)
    metrics_of(tmp_path, [1.0, None, 1.0, 1.0, None, None])
    caplog.clear()
    assert resolve_checkpoint(tmp_path, "latest").name == "checkpoint-4"
    assert "passing over" in caplog.text and "checkpoint-6" in caplog.text
    assert resolve_checkpoint(tmp_path, "checkpoint-6").name == "checkpoint-6"  # by its name it goes
    metrics_of(tmp_path, [1.0, None, 1.0, 1.0, None, None, 1.0])  # a finite step ended the streak
    assert resolve_checkpoint(tmp_path, "latest").name == "checkpoint-6"


def empty(path):
    path.write_bytes(b"")


DAMAGES = {
    "an empty progress": lambda folder: empty(folder / "progress.json"),
    "zeros for progress": lambda folder: (folder / "progress.json").write_bytes(b"\0" * 60),
    "no progress": lambda folder: (folder / "progress.json").unlink(),
    "no step": lambda folder: (folder / "progress.json").write_text("{}"),
    "another thing": lambda folder: (folder / "progress.json").write_text("[]"),
    "an empty state": lambda folder: empty(folder / "training_state.pt"),
    "no state": lambda folder: (folder / "training_state.pt").unlink(),
    "a shorter state": lambda folder: os.truncate(folder / "training_state.pt", 100),
    "zeros": lambda folder: (folder / "training_state.pt").write_bytes(
        b"\0" * (folder / "training_state.pt").stat().st_size
    ),
    "an empty model": lambda folder: empty(folder / "model" / "shard"),
    "an empty folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize(
    ("damage", "with_sizes"),
    [(damage, sizes) for damage in DAMAGES for sizes in (True, False) if sizes or damage != "a shorter state"],
)
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(tmp_path, caplog, damage, with_sizes):
    (process,) = processes(1)
    process.save_state = lambda folder: [os.mkdir(f"{folder}/model"), _write(f"{folder}/model/shard")]
    for step in (2, 4, 6):
        save(process, tmp_path, step)
        if not with_sizes:  # as before sizes were recorded
            path = tmp_path / f"checkpoint-{step}" / "progress.json"
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "files"}))
    assert resolve_checkpoint(tmp_path, "latest").name == "checkpoint-6" and not caplog.text
    DAMAGES[damage](tmp_path / "checkpoint-6")
    assert resolve_checkpoint(tmp_path, "latest").name == "checkpoint-4"
    assert "checkpoint-6, which is damaged" in caplog.text
    with pytest.raises(ValueError, match="is damaged|is not a checkpoint"):
        resolve_checkpoint(tmp_path, "checkpoint-6")
    save(process, tmp_path, 8, total_limit=2)  # it does not count as one to keep
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    for step in (4, 8):
        empty(tmp_path / f"checkpoint-{step}" / "progress.json")
    with pytest.raises(ValueError, match="all checkpoints in .* are damaged"):
        resolve_checkpoint(tmp_path, "latest")


def _write(path):
    with open(path, "w") as file:
        file.write("weights")


def test_a_checkpoint_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    (process,) = processes(1)
    events = []
    monkeypatch.setattr(checkpoints, "sync_tree", lambda path: events.append(("synced", path.name)))
    monkeypatch.setattr(checkpoints, "sync", lambda path: events.append(("synced", path.name)))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("named", b.name)), replace(a, b)))
    save(process, tmp_path, 2)
    assert events == [("synced", ".writing-checkpoint-2"), ("named", "checkpoint-2"), ("synced", tmp_path.name)]


@pytest.mark.parametrize(
    ("steps", "config", "results", "refused"),
    [
        (7, {"checkpointing_steps": 2}, [], True),
        (3, {"checkpointing_steps": 2}, [], True),
        (2, {"checkpointing_steps": 2}, [], False),  # killed while it saved its first
        (1, {"checkpointing_steps": 2}, [], False),
        (2, {"checkpointing_steps": 2}, ["pipeline/model_index.json"], True),
        (4, {"checkpointing_steps": 100, "warmup_steps": 3}, [], True),  # the hand-over saves
        (3, {"checkpointing_steps": 100, "warmup_steps": 3}, ["warmup/warmup.json"], True),
        (3, {"checkpointing_steps": 100, "warmup_steps": 3}, [], False),
        (10, {"checkpointing_steps": 100, "max_train_steps": 10}, ["loss_curve.png"], True),
        (5, None, [], True),
        (0, {"checkpointing_steps": 2}, [], False),
    ],
)
def test_latest_begins_no_run_anew_that_has_lost_its_checkpoints(tmp_path, steps, config, results, refused):
    metrics_of(tmp_path, [1.0] * steps)
    if config is not None:
        config = {"warmup_steps": 0, "max_train_steps": 1000} | config
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for name in results:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if refused:
        with pytest.raises(ValueError, match="holds a run whose checkpoints are missing"):
            resolve_checkpoint(tmp_path, "latest")
    else:
        assert resolve_checkpoint(tmp_path, "latest") is None


def test_all_processes_resume_what_the_main_one_chose(tmp_path, monkeypatch):
    """Each sees its own disk; the exchange between them is replaced."""
    (main,) = processes(1)
    for step in (2, 4):
        save(main, tmp_path, step)
    other = SimpleNamespace(is_main_process=False)
    chosen = tmp_path / "checkpoint-2"  # the other process would take 4
    monkeypatch.setattr("erw_hf.processes.broadcast_object_list", lambda objects: [chosen, False])
    monkeypatch.setattr(checkpoints, "gather_object", lambda objects: [*objects, True])
    assert agree_on_checkpoint(other, tmp_path, "latest") == chosen
    monkeypatch.setattr(checkpoints, "gather_object", lambda objects: [*objects, False])
    with pytest.raises(ValueError, match=r"the ranks \[1\] do not see .*checkpoint-2"):
        agree_on_checkpoint(other, tmp_path, "latest")
    monkeypatch.setattr("erw_hf.processes.broadcast_object_list", lambda objects: [None, True])
    with pytest.raises(SystemExit):  # the main process says why
        agree_on_checkpoint(other, tmp_path, "latest")
