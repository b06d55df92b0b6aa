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
"""What a run shows of itself never ends it: pictures, plots, measurements and trackers that fail cost a warning."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from accelerate.tracking import GeneralTracker


logger = logging.getLogger(__name__)

TRACKER_PROJECT = "erw"


@contextlib.contextmanager
def forgiven(missing: str) -> Iterator[None]:
    """
    Turns a failure of something optional into a warning. Not for collective work, unless it fails on all ranks.

    Args:
        missing (`str`): What is missing after a failure, for the warning.

    Returns:
        `contextlib.AbstractContextManager`: The block that may fail.
    """
    try:
        yield
    except Exception as error:
        logger.warning(f"{missing}, the run continues: {type(error).__name__}: {error}")


class ForgivingTracker:
    """
    A tracker of accelerate whose failures cost only its own record. It warns at the first failure and keeps trying.

    Args:
        tracker (`GeneralTracker`): The tracker, started.
    """

    def __init__(self, tracker: GeneralTracker) -> None:
        self._tracker = tracker
        self._has_warned = False

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._tracker, name)
        if not callable(attribute):
            return attribute

        def forgiving(*args: Any, **kwargs: Any) -> Any:
            try:
                return attribute(*args, **kwargs)
            except Exception as error:
                if not self._has_warned:
                    logger.warning(f"the tracker {self._tracker.name} failed, the run continues: {error!r}")
                self._has_warned = True

        return forgiving
