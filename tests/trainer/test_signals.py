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
"""A signal, or a launcher that is gone, asks for a stop."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import HANGS

from erw_hf.data.samples import outlive_signals
from erw_hf.trainer import signals
from erw_hf.trainer.signals import stop_on_signals


@pytest.fixture
def handlers():
    found = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    before = {signum: signal.getsignal(signum) for signum in found}
    for signum in found:  # a shell may have started the tests with some ignored
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    yield found
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_asks_for_a_stop(name, handlers):
    stop_requested = stop_on_signals()
    assert not stop_requested()
    signal.raise_signal(signal.Signals[name])
    assert stop_requested()


def test_a_second_ctrl_c_ends_at_once(handlers):
    stop_on_signals()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_what_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_requested = stop_on_signals()
    signal.raise_signal(signal.SIGHUP)
    assert not stop_requested()


@pytest.mark.parametrize(
    ("launcher", "stops"),
    [
        (["ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"], True),
        (["ACCELERATE_MIXED_PRECISION"], False),  # which users set themselves
        (["TORCHELASTIC_RUN_ID"], True),
        ([], False),
    ],
)
def test_a_run_stops_with_its_launcher_but_not_with_a_shell(launcher, stops, handlers, monkeypatch):
    for variable in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    for variable in launcher:
        monkeypatch.setenv(variable, "x")
    stop_requested = stop_on_signals()
    assert not stop_requested()
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    assert stop_requested() == stops


CLOSED_PIPE = """
import os, signal
from erw_hf.trainer.signals import stop_on_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
stop_requested = stop_on_signals()
print("ready", flush=True)
input()
signal.raise_signal(signal.SIGINT)
print("a line that nobody reads", flush=True)
assert stop_requested()
"""


def test_a_pipe_that_ended_with_ctrl_c_does_not_end_the_run():
    """`... | tee log`: Ctrl-C ends tee too."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED_PIPE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    message = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, message


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(0.05 if index < 2 else HANGS)
        return index


def test_a_loaders_worker_ends_for_its_loader_alone():
    loader = iter(torch.utils.data.DataLoader(Slow(), num_workers=2, worker_init_fn=outlive_signals, batch_size=None))
    assert [next(loader), next(loader)] == [0, 1]
    for worker in loader._workers:
        for signum in (signal.SIGINT, signal.SIGHUP):
            os.kill(worker.pid, signum)
        if hasattr(signal, "sigwaitinfo"):
            subprocess.run(["kill", str(worker.pid)], check=True)  # of another process
    time.sleep(0.5)
    workers = loader._workers
    assert all(worker.is_alive() for worker in workers)
    del loader  # which waits five seconds for them, and then ends them
    for worker in workers:
        worker.join(HANGS)
        assert not worker.is_alive()
