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

import pytest

from erw_hf.files import folder_written_whole, sync_tree, write_record, written_whole


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    write_record(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    temporary = tmp_path / f".record.json.{os.getpid()}.writing"
    assert synced == [str(temporary), str(tmp_path)]  # the file before it gets its name
    with pytest.raises(OSError, match="disk is full"), written_whole(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk is full")
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["record.json"]


def test_two_files_that_differ_in_their_suffix_do_not_share_a_temporary_one(tmp_path):
    with written_whole(tmp_path / "a.json") as first, written_whole(tmp_path / "a.npz") as second:
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a.json").read_text() == "1" and (tmp_path / "a.npz").read_text() == "2"


def test_two_processes_that_write_one_file_do_not_share_a_temporary_one(tmp_path, monkeypatch):
    with written_whole(tmp_path / "a") as first:
        first.write_text("1")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with written_whole(tmp_path / "a") as second:
            second.write_text("2")
        assert (tmp_path / "a").read_text() == "2"
    assert (tmp_path / "a").read_text() == "1" and os.listdir(tmp_path) == ["a"]


def test_a_folder_is_synced_with_all_that_it_holds(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("x")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    sync_tree(tmp_path)
    assert set(synced) == {str(path) for path in (tmp_path, *tmp_path.rglob("*"))}


def test_a_folder_is_whole_or_the_one_before(tmp_path):
    (tmp_path / ".warmup.writing").mkdir()
    (tmp_path / ".warmup.writing" / "torn").touch()
    for number in range(2):
        with folder_written_whole(tmp_path / "warmup") as folder:
            (folder / f"{number}.txt").touch()
            assert not (tmp_path / "warmup" / f"{number}.txt").exists()
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["warmup", f"warmup/{number}.txt"]
    with pytest.raises(OSError, match="full"), folder_written_whole(tmp_path / "warmup") as folder:
        (folder / "2.txt").touch()
        raise OSError("disk full")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["warmup", "warmup/1.txt"]
