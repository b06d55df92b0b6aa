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
import re
from pathlib import Path


TESTS = Path(__file__).parent


def test_each_test_of_the_table_exists():
    rows = [line for line in (TESTS / "FAULTS.md").read_text().splitlines() if line.startswith("| ")]
    named = [re.findall(r"`([\w/]+\.py)::(\w+)`", row) for row in rows if not row.startswith("| kind")]
    assert len(named) > 50 and all(named)
    for path, name in [test for row in named for test in row]:
        assert re.search(rf"^def {name}\(", (TESTS / path).read_text(), flags=re.MULTILINE), f"{path}::{name}"
