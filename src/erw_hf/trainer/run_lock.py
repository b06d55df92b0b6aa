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
"""The lock that gives the folder of a run or of a latent cache one owner at a time."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
HEARTBEAT_SECONDS = 10.0
# Errors of disks without locks: NFS without its lock service, Lustre without "flock", FUSE.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """
    The file `.lock` of a folder, for as long as a process owns the folder.

    It holds a lock of the operating system if the disk supports them. Such a lock ends with the process, also by kill
    -9, and children do not inherit it, unlike with `flock`. The file also contains host and process, and its time
    stamp serves as a heartbeat, for disks without locks and for those whose locks another host does not see.

    Args:
        folder (`Path`): The folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK_FILE
        self._descriptor: int | None = None
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Takes the folder; raises ValueError if a live process owns it, OSError if it cannot be written to."""
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._take(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if not self._is_current(descriptor):  # its owner removed it meanwhile
                os.close(descriptor)
                continue
            self._descriptor = descriptor
        self._ended.clear()
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Gives the folder back and removes the file."""
        if self._descriptor is not None:
            self._ended.set()
            if self._is_current(self._descriptor):
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self, descriptor: int) -> None:
        locked = self._lock(descriptor)
        owner, own = _read_owner(descriptor), _this_process()
        same_host = {**owner, "pid": 0} == {**own, "pid": 0}
        # On the owner's host, a free lock or a dead process is proof enough.
        is_dead = not owner or owner == own or (same_host and (locked or not _exists(owner["pid"])))
        if not is_dead:
            if self._beats(descriptor, owner):
                raise self._owned(owner)
            self._lock(
                descriptor
            )  # again, because closing any handle of a file releases all locks that the process has on it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(own).encode(), 0)
        os.fsync(descriptor)

    def _lock(self, descriptor: int) -> bool:
        """Takes the system's lock; returns whether the disk supports locks."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._owned(_read_owner(descriptor)) from None
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _beats(self, descriptor: int, owner: dict[str, Any]) -> bool:
        """Whether the owner is alive, judged by the file's time stamp. Its clock may differ from ours."""
        last = os.fstat(descriptor).st_mtime_ns
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".") as file:  # the disk's own clock
            now = os.fstat(file.fileno()).st_mtime_ns
        if abs(now - last) > 3600e9:
            return False
        logger.warning(
            f"{self.folder} was last written to by process {owner['pid']} on {owner['host']}: waiting up to "
            f"{3 * HEARTBEAT_SECONDS:.0f} s to see whether it is alive"
        )
        deadline = time.monotonic() + 3 * HEARTBEAT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_SECONDS / 10)
            try:
                with self.path.open("rb") as file:  # reopened, so that a network disk reports the current state
                    if os.fstat(file.fileno()).st_mtime_ns != last:
                        return True
            except FileNotFoundError:  # it has just ended
                return False
        return False

    def _owned(self, owner: dict[str, Any]) -> ValueError:
        who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
        return ValueError(
            f"{self.folder} belongs to a run that is still going: {who} writes to it. Wait for it, stop it, or choose "
            "another --output_dir"
        )

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _this_process() -> dict[str, Any]:
    try:  # containers may share a host's name but not its process ids
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return {"host": socket.gethostname(), "namespace": namespace, "pid": os.getpid()}


def _read_owner(descriptor: int) -> dict[str, Any]:
    """The owner; empty if the file is empty or holds something else."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return {"host": str(owner["host"]), "namespace": owner["namespace"], "pid": int(owner["pid"])}
    except (ValueError, KeyError, TypeError):
        return {}


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
