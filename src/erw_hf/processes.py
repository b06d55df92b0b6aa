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
"""What ranks do together: one decides for all, a failure of one fails all; and what may fail without ending the run."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object


logger = logging.getLogger(__name__)

T = TypeVar("T")


def decided_by_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """
    Asks the main rank alone and tells the others its picklable answer: what they see of a disk may be older. All ranks call it.

    Raises:
        Exception: what `decide` raised, on the main rank.
        SystemExit: on the others then, with status 1, so that none waits for the main one.
    """
    answer, error = None, None
    if accelerator.is_main_process:
        try:
            answer = decide()
        except Exception as raised:
            error = raised
    answer, failed = broadcast_object_list([answer, error is not None])
    if error is not None:
        raise error
    if failed:
        raise SystemExit(1)
    return answer


def done_by_all(accelerator: Accelerator, do: Callable[[], T]) -> T:
    """
    Lets each rank do its part, in which it does not wait for others, and waits for all. Where a part fails, all ranks
    raise, so that none goes on alone.

    Raises:
        Exception: what `do` raised here.
        RuntimeError: on the other ranks then, with the first failure.
    """
    error = None
    try:
        result = do()
    except Exception as raised:
        error = raised
    failures = gather_object([None if error is None else f"process {accelerator.process_index}: {error!r}"])
    if error is not None:
        raise error
    if failure := next((failure for failure in failures if failure is not None), None):
        raise RuntimeError(failure)
    return result


@contextlib.contextmanager
def forgiven(missing: str) -> Iterator[None]:
    """Around something optional: a failure becomes a warning that names what is missing. Not for collective work,
    unless it fails on all ranks."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{missing}, the run continues: {type(error).__name__}: {error}")
