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
"""What one process decides for all."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


T = TypeVar("T")


def decided_by_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """
    Asks the main process alone and tells the others: what they see of a disk may be older. All processes call it.

    Args:
        accelerator (`Accelerator`): The processes.
        decide (`Callable`): The question. Its answer has to be picklable.

    Returns:
        `T`: The main process's answer, on all.

    Raises:
        Exception: what `decide` raised, on the main process.
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
