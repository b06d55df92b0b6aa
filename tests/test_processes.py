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
import pytest
from accelerate import Accelerator

from erw_hf.processes import done_by_all


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    accelerator = Accelerator(cpu=True)

    def fail():
        raise OSError("no space")

    assert done_by_all(accelerator, lambda: 3) == 3
    with pytest.raises(OSError, match="no space"):
        done_by_all(accelerator, fail)
    monkeypatch.setattr("erw_hf.processes.gather_object", lambda mine: [*mine, "process 1: OSError('no space')"])
    with pytest.raises(RuntimeError, match="process 1: OSError"):
        done_by_all(accelerator, lambda: 3)
    with pytest.raises(OSError, match="no space"):  # its own, where both fail
        done_by_all(accelerator, fail)
