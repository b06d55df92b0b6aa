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
import subprocess
import sys
import time

import pytest
from helpers import HANGS

from erw_hf.trainer import run_lock
from erw_hf.trainer.run_lock import RunLock


HOLD = """
import multiprocessing, os, sys, time
from pathlib import Path
from erw_hf.trainer import run_lock
run_lock.HEARTBEAT_SECONDS = 3600.0
run_lock.RunLock(Path(sys.argv[1])).acquire()
child = os.fork()  # as a loader worker, which outlives a kill by some seconds
if child == 0:
    os.close(1)
    time.sleep(3600)
print(child, flush=True)
time.sleep(3600)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that owns the folder, and a child of it."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(child, 9)


def test_a_folder_has_one_owner_and_a_killed_one_is_none(tmp_path, owner, monkeypatch):
    before = (tmp_path / ".lock").read_bytes()
    with pytest.raises(ValueError, match=f"process {owner.pid} on {json.loads(before)['host']} writes to it"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / ".lock").read_bytes() == before
    owner.kill()
    owner.wait()  # its child lives
    monkeypatch.setattr(run_lock.time, "sleep", lambda s: pytest.fail("waited"))
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert os.listdir(tmp_path) == []


def without_locks(descriptor, operation):
    raise OSError(run_lock.errno.ENOLCK, "No locks available")


def test_without_locks_the_process_and_its_heartbeat_count(tmp_path, owner, monkeypatch):
    monkeypatch.setattr(run_lock.fcntl, "lockf", without_locks)
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    lock = RunLock(tmp_path)
    lock.acquire()  # the owner's heart beats every hour: it looks dead
    lock.release()


@pytest.mark.parametrize("has_locks", [True, False])
@pytest.mark.parametrize("beats", [True, False])
def test_an_owner_on_another_host_is_known_by_its_heartbeat(tmp_path, monkeypatch, has_locks, beats):
    if not has_locks:
        monkeypatch.setattr(run_lock.fcntl, "lockf", without_locks)
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 200.0 if beats else 0.05)
    (tmp_path / ".lock").write_text(json.dumps({"host": "node7", "namespace": 1, "pid": 7}))
    if beats:
        pause = time.sleep
        monkeypatch.setattr(run_lock.time, "sleep", lambda s: (pause(0.02), os.utime(tmp_path / ".lock")))
        with pytest.raises(ValueError, match="process 7 on node7 writes to it"):
            RunLock(tmp_path).acquire()
    else:
        lock = RunLock(tmp_path)
        lock.acquire()
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        lock.release()


def test_a_clock_that_is_hours_off_takes_no_live_run_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.fcntl, "lockf", without_locks)
    (tmp_path / ".lock").write_text(json.dumps({"host": "node7", "namespace": 1, "pid": 7}))
    pause, now = time.sleep, time.time
    monkeypatch.setattr(run_lock.time, "time", lambda: now() + 7200)
    monkeypatch.setattr(run_lock.time, "sleep", lambda s: (pause(0.02), os.utime(tmp_path / ".lock")))
    with pytest.raises(ValueError, match="process 7 on node7 writes to it"):
        RunLock(tmp_path).acquire()


def test_what_is_of_no_live_process_holds_nothing_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.fcntl, "lockf", without_locks)
    monkeypatch.setattr(run_lock.time, "sleep", lambda s: pytest.fail("waited"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = run_lock._this_process()
    old = json.dumps({"host": "node7", "namespace": 1, "pid": 7})
    for text in ("", "{", "[]", "\0\0\0", json.dumps(here | {"pid": dead.pid}), json.dumps(here), old):
        (tmp_path / ".lock").write_text(text)
        if text == old:  # of the day before
            os.utime(tmp_path / ".lock", (1e9, 1e9))
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()
    assert os.listdir(tmp_path) == []


def test_the_heart_beats_while_the_folder_is_owned(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.01)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / ".lock", (1, 1))
    deadline = time.monotonic() + HANGS
    while (tmp_path / ".lock").stat().st_mtime == 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
