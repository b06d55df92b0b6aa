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
"""The retry policy for reading data, from disk or from the Hub. Pushing has its own, in `hub.upload`.

A run waits for a Hub that is away; a dry run asks only once.
"""

import contextlib
import functools
import logging
import os
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import TypeVar

import datasets
import huggingface_hub
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

from erw_hf.names import resolve_name


logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Waiting does not help against these.
FATAL = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    FileNotFoundError,
    PermissionError,
    RepositoryNotFoundError,
    EntryNotFoundError,
    OfflineModeIsEnabled,
    DatasetsError,
    NotImplementedError,
    zipfile.BadZipFile,
    tarfile.TarError,
)


class Backoff:
    """Waits after failures, longer each time, and gives up `seconds` after the first. Once one exists, `datasets`
    itself no longer retries in this process. `listed`: the file existed before, so if it is missing or denied now
    (`ENOENT`, `EACCES`), the system is at fault, and reading is retried."""

    def __init__(self, seconds: float, listed: bool = False) -> None:
        self.seconds = seconds
        self.listed = listed
        self.succeeded()
        # `datasets` would wait up to half an hour in some reads and fail at once on most server errors.
        # huggingface_hub keeps its own six attempts within half a minute.
        config = datasets.config
        config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
        config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
        config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0

    def succeeded(self) -> None:
        """Resets: the next failure counts as the first."""
        self._failing_since: float | None = None
        self._wait = 1.0

    def failed(self, error: Exception) -> None:
        """
        Waits before the next attempt.

        Raises:
            Exception: `error` itself, if waiting does not help.
            ConnectionError: if the deadline does not allow another attempt.
        """
        of_the_system = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, FATAL) and not (self.listed and of_the_system):
            raise error
        now = time.monotonic()
        self._failing_since = now if self._failing_since is None else self._failing_since
        if now + self._wait > self._failing_since + self.seconds:
            raise ConnectionError(
                f"no data for {now - self._failing_since:.0f} s, and reading is retried for at most {self.seconds:g} s; "
                f"the last error was {type(error).__name__}: {error}"
            ) from error
        logger.warning(f"reading failed, retrying in {self._wait:.0f} s ({type(error).__name__}: {error})")
        time.sleep(self._wait)
        self._wait = min(2 * self._wait, 60.0)


def retried(seconds: float, call: Callable[[], Result], listed: bool = False) -> Result:
    """
    Calls until it succeeds, for `seconds` after the first failure; see [`Backoff`].

    Raises:
        Exception: what `call` raised, if waiting does not help.
        ConnectionError: if the deadline does not allow another attempt.
    """
    backoff = Backoff(seconds, listed)
    while True:
        try:
            return call()
        except Exception as error:
            backoff.failed(error)


@contextlib.contextmanager
def hub_or_cache(name: str, what: str) -> Iterator[None]:
    """
    Makes code that reads from the Hub answer within seconds: while the Hub is away, only this machine's cache is read.
    `what` names it in messages.

    Raises:
        FileNotFoundError: if it can only be a local folder and does not exist.
        ConnectionError: if the Hub does not answer and the cache lacks it.
    """
    if os.path.isdir(name):
        yield
        return
    resolve_name(name, what)
    constants = huggingface_hub.constants
    absence, was_offline = _why_hub_is_away(constants.ENDPOINT), constants.HF_HUB_OFFLINE
    if absence is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except OSError as error:  # diffusers, transformers and datasets each raise another kind
        raise ConnectionError(
            f"{what}={name!r} is not in the cache of this machine, and {absence}. Connect, or name a local folder"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = was_offline


@functools.cache
def _why_hub_is_away(endpoint: str) -> str | None:
    if huggingface_hub.constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.get_session().head(endpoint, timeout=5)
    except Exception as error:  # the kind depends on the version of the client
        return f"the Hub ({endpoint}) does not answer ({error})"
    return None
