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
"""Two records side by side, and what counts as a difference."""

import json

import numpy as np
import pytest

from erw_hf.evaluation.compare import compare_records, differs, main, protocol_differences
from erw_hf.evaluation.metrics import frechet_estimate


def record(**changes):
    found = {
        "metrics": {"fid": 10.0, "kid": 0.5, "kid_std": 0.1},
        "errors": {"fid": 0.1, "kid": 0.2},
        "bias": {"fid": 0.5},
        "settings": {"model": "a", "num_samples": 1000, "seed": 0},
        "model": {"sha256": "x"},
        "reference": {"sha256": "r"},
        "extractor": {"sha256": "e"},
        "versions": {"torch": "2"},
        "hardware": {"device": "cpu"},
    }
    return found | {part: found[part] | values for part, values in changes.items()}


def test_differences_of_protocol_come_first():
    other = record(
        versions={"torch": "3"}, settings={"seed": 1, "model": "b"}, extractor={"sha256": "f"}, model={"more": 1}
    )
    assert protocol_differences(record(), other) == [
        "settings.model: a | b", "settings.seed: 0 | 1", "extractor.sha256: e | f", "model.more: None | 1",
        "versions.torch: 2 | 3",
    ]  # fmt: skip
    lines = compare_records(record(), other)[1].splitlines()
    assert lines[0].startswith("settings.model") and lines[6].startswith("metric")


@pytest.mark.parametrize(
    ("fid", "verdict"), [(10.0, "the same"), (10.2, "not told apart"), (9.8, "not told apart"), (10.3, "differ")]
)
def test_a_difference_is_two_of_its_errors(fid, verdict):
    same, text = compare_records(record(), record(metrics={"fid": fid}))
    (line,) = [line for line in text.splitlines() if line.startswith("fid")]
    assert line.endswith(verdict) and same == (verdict == "the same")


def test_one_seed_of_two_models_is_said_to_count_as_two():
    line = "the same noise and labels, but the errors count as independent"
    assert line in compare_records(record(), record(metrics={"fid": 10.2}))[1]
    assert line not in compare_records(record(), record())[1]  # of one model, made again
    assert line not in compare_records(record(), record(metrics={"fid": 10.2}, settings={"seed": 1}))[1]
    assert line not in compare_records(record(), record(metrics={"fid": 10.2}) | {"model": None})[1]


def test_numbers_without_errors_missing_ones_and_old_records(tmp_path):
    old = {"metrics": {"fid": 10.2, "recall": 0.5}, "settings": None}
    same, text = compare_records(record(), old)
    assert not same and "kid                                0.5       0.2         missing" in text
    assert "recall                         missing" in text and "told apart" not in text
    assert not compare_records(old, record())[0] and compare_records(old, old)[0]


def test_of_unequal_counts_the_numbers_less_their_bias_are_compared():
    fewer = record(metrics={"fid": 11.0}, bias={"fid": 1.5}, settings={"num_samples": 300})
    assert "not told apart less their bias" in compare_records(record(), fewer)[1]
    assert " differ" in compare_records(record(), fewer | {"bias": {}})[1]


@pytest.mark.parametrize("seed", range(5))
def test_a_shift_of_one_percent_is_seen_at_10_000_samples_and_not_at_100(seed):
    """Of the mean of the features, 10 deviations away from the reference's."""
    rng, dim = np.random.default_rng(seed), 8
    far = np.full(dim, 10 / dim**0.5)

    def estimate(count, scale):
        x = rng.standard_normal((count, dim)) + scale * far
        return frechet_estimate(x, (x.mean(0), np.cov(x, rowvar=False)), (np.zeros(dim), np.eye(dim)))

    for count, seen in ((10_000, True), (100, False)):
        one, other = estimate(count, 1.0), estimate(count, 1.01)
        assert differs(one.value, one.error, other.value, other.error) == seen


def test_the_command_prints_two_records_and_refuses_what_is_none(tmp_path, capsys):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, fid in zip(paths, (10.0, 12.0), strict=True):
        path.write_text(json.dumps(record(metrics={"fid": fid})))
    main([str(path) for path in paths])
    assert "2.0e-01  differ" in capsys.readouterr().out
    for text in ("[]", "{}", "not json", '{"metrics": 1}'):
        paths[1].write_text(text)
        with pytest.raises(SystemExit) as end:
            main([str(path) for path in paths])
        assert end.value.code == 1 and "b.json is not an evaluation.json" in capsys.readouterr().err
