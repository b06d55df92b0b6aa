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
"""Trackers that never end a run."""

import logging
from typing import Any

from accelerate.tracking import GeneralTracker


logger = logging.getLogger(__name__)

TRACKER_PROJECT = "erw"


class ForgivingTracker:
    """
    A tracker of accelerate, whose failures cost its own record alone. It warns at the first and tries again each time.

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
                    logger.warning(f"the tracker {self._tracker.name} failed, the run goes on: {error!r}")
                self._has_warned = True

        return forgiving
