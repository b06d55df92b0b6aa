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
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from erw_hf.trainer.checkpoints import (
    Progress,
    list_checkpoints,
    load_data_state,
    read_progress,
    resolve_checkpoint,
    save_checkpoint,
)


def processes(count):
    """What checkpoints ask of the accelerator of each process; the processes are threads here."""
    barrier = threading.Barrier(count, timeout=30)
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


def save(process, folder, step, total_limit=None, data_state=None):
    progress, nothing = Progress(step=step, images_seen=4 * step), SimpleNamespace(state_dict=dict)
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
    assert names(tmp_path) == ["checkpoint-102"]


def test_each_process_gets_its_own_stream_back(tmp_path):
    both = processes(2)
    states = [{"workers": 2, "stream": {"position": process.process_index}} for process in both]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda process, state: save(process, tmp_path, 5, data_state=state), both, states))
    (checkpoint,) = list_checkpoints(tmp_path)
    for process in both:
        assert load_data_state(process, checkpoint, 2)["stream"] == {"position": process.process_index}
    with pytest.raises(ValueError, match="streamed with 2 processes and dataloader_num_workers=2"):
        load_data_state(both[1], checkpoint, 1)
