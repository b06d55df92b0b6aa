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
"""The report on nearest neighbours."""

import json

import pytest
import torch
from helpers import REPOSITORY, run_script
from PIL import Image

from erw_hf.evaluation.neighbours import compare_neighbours, nearest


def test_copies_have_a_ratio_of_0_and_new_ones_of_1():
    draw = torch.Generator().manual_seed(0)
    training, held_out, new = (torch.randn(n, 4, generator=draw) for n in (500, 200, 200))
    found = compare_neighbours(new, training, held_out)
    assert abs(found.ratio - 1) < 3 * found.error < 0.5
    copies = compare_neighbours(training[[7, 3, 5]], training, held_out)
    assert copies.ratio == pytest.approx(0, abs=1e-5) and {pair[:2] for pair in copies.pairs} == {
        (0, 7),
        (1, 3),
        (2, 5),
    }
    half = compare_neighbours(torch.cat([new, training[:1]]), training, held_out)
    assert half.pairs[0][:2] == (200, 0)
    with pytest.raises(ValueError, match="held-out"):
        compare_neighbours(new, training, training)


@pytest.mark.parametrize("rows", [10, 20_000])
def test_an_image_is_its_own_nearest_neighbour_whatever_the_width(rows, monkeypatch):
    monkeypatch.setattr("erw_hf.evaluation.neighbours.ROWS", rows)
    draw = torch.Generator().manual_seed(0)
    training, samples = (torch.rand(300, 64, generator=draw) + 0.5 for _ in range(2))
    distances, indices = nearest(training, training)
    assert not distances.any() and torch.equal(indices, torch.arange(300))
    expected = torch.cdist(samples.double(), training.double(), compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    distances, indices = nearest(samples, training)
    torch.testing.assert_close(distances, expected.values)
    assert torch.equal(indices, expected.indices)
    with pytest.raises(ValueError, match="held-out"):  # features of other batches differ in their last bits
        compare_neighbours(samples, training, training + 1e-7)


def test_a_reference_of_the_training_images_is_refused_at_once(capsys):
    with pytest.raises(SystemExit):
        run_script("evaluate", "--images=digits", "--reference=digits", "--training_images=digits")
    assert "--training_images are the reference's" in capsys.readouterr().err


def test_held_out_images_are_asked_for(capsys):
    with pytest.raises(SystemExit):
        run_script("evaluate", "--images=digits", "--save_reference=r.npz", "--training_images=digits")
    assert "--training_images needs --reference" in capsys.readouterr().err


def test_an_evaluation_finds_copies_and_shows_them(tmp_path):
    run_script(
        "evaluate", "--images=digits", "--split=train", "--num_samples=20", "--reference=digits", "--reference_split=test",
        "--training_images=digits", f"--extractor={REPOSITORY}/pipelines/digits-classifier", "--metrics=fid",
        f"--output_dir={tmp_path}/out",
    )  # fmt: skip
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert record["metrics"]["nearest_neighbour_ratio"] == pytest.approx(0, abs=1e-3)
    assert record["settings"]["training_split"] == "train"
    assert Image.open(tmp_path / "out/nearest.png").size == (8 * 128, 2 * 128 + 16)
