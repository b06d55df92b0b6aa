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
"""Signals that stop a run after its next step, with a checkpoint."""

import os
import signal
import stat
from collections.abc import Callable
from types import FrameType


_PARENT = os.getppid()  # as early as this process can know it


def stop_on_signals() -> Callable[[], bool]:
    """Whether to stop, as a function: the run ends after the next step, with a checkpoint and status 0, once it gets
    SIGTERM, SIGHUP (a closed terminal) or SIGINT (Ctrl-C; a second one ends it at once), or its launcher is gone. A
    signal that is ignored, as by `nohup`, stays so."""
    own_pid, received = os.getpid(), []
    # Of accelerate's variables users set the precision themselves, too.
    accelerate = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"} <= set(os.environ)
    launched = accelerate or "TORCHELASTIC_RUN_ID" in os.environ
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]
    pipes = [fd for fd in (1, 2) if stat.S_ISFIFO(os.fstat(fd).st_mode)]

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != own_pid:  # a loader worker, which inherits this handler
            return
        received.append(signum)
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)
        # A closed terminal, or what a pipe leads to, ends as well: a line for it would then end the run before its checkpoint.
        gone = {signal.SIGINT: pipes, signal.SIGHUP: terminals + pipes}.get(signal.Signals(signum), [])
        for fd in gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handle)
    return lambda: bool(received) or (launched and os.getppid() != _PARENT)
