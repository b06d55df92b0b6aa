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
import json

import pytest

from erw_hf.trainer.run_record import MetricsFile, keep_until, measured_alike, read_metrics, training_cost


def line(step):
    return json.dumps({"step": step, "loss": 0.5}).encode() + b"\n"


TORN = {
    "zeros at the end": [line(1), line(2), b"\0" * 50],
    "a line cut off": [line(1), line(2), line(3)[:10]],
    "zeros before a line": [line(1), b"\0" * 50 + line(2)],
    "zeros in place of a line": [line(1), b"\0" * 30 + b"\n", line(2)],
    "a torn line in the middle": [line(1), b'{"step": 9, "lo\n', line(2)],
    "two lines in one": [line(1), line(2)[:-3] + line(2), line(2)],
    "bytes of another file": [line(1), b"\xff\xfe\x80\n", line(2)],
    "another JSON": [line(1), b"[]\n", b"3\n", b'{"loss": 1}\n', b'{"step": null}\n', line(2)],
    "a line twice": [line(1), line(1), line(2), line(1)],
    "empty lines": [line(1), b"\n\n", line(2)],
}


@pytest.mark.parametrize("damage", TORN)
def test_what_a_power_cut_has_made_unreadable_is_left_out(tmp_path, damage, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(TORN[damage]))
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    # Any kill cuts a line off, and what stands behind zeros is not lost.
    assert ("unreadable" in caplog.text) == (damage not in ("a line cut off", "zeros before a line"))
    file = MetricsFile(path, resume_step=2)
    assert path.read_bytes() == line(1) + line(2)
    file.write({"step": 3, "loss": float("nan")})
    assert [record["loss"] for record in read_metrics(path)] == [0.5, 0.5, None]
    keep_until(path, 1)
    assert path.read_bytes() == line(1)


def test_the_cost_of_a_branch_counts_by_its_last_step(tmp_path):
    def record(step):
        full = max(step - 3, 0)
        return {
            "step": step, "phase": "full" if full else "warmup", "images_seen": 4 * step, "flops": min(step, 3) + 10 * full,
            "images_per_second": 2.0, "data_wait": 0.5, "loss": 1.0,
        }  # fmt: skip

    costs = []
    for first in (1, 2, 4, 6):
        path = tmp_path / f"{first}.jsonl"
        path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(first, 8)))
        cost = training_cost(path, None, warmup_steps=3)
        assert cost["steps"] == 7
        costs.append(dict(cost["rows"]))
        # 2 s for each of its own steps, at 2 images per second
        assert costs[-1].pop("hours in steps") == f"{2 * (8 - first) / 3600:.2f} (2 images per second)"
        assert costs[-1].pop(f"loss, mean of the last {min(4, 8 - first)} steps") == "1.0000"
    assert costs[0]["steps"] == "3 warmup + 4 full" and all(cost == costs[0] for cost in costs)


def test_measurements_made_otherwise_are_not_compared(tmp_path):
    """More samples lower the FID of the same model."""
    lines = [
        {"step": 1, "fid": 5.0, "samples": 100},
        {"step": 2, "fid": 3.0, "samples": 1000},
        {"step": 3, "fid": None},
    ]
    lines += [{"step": 4, "fid": 4.0, "samples": 1000}]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["step"] for line in measured_alike(tmp_path / "evaluations.jsonl")] == [2, 4]
    assert measured_alike(tmp_path / "none.jsonl") == []
