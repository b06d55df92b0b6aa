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
"""Probes of every block: the tokens that they see, the linear probe's optimum, the command."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import REPOSITORY, run_script, train
from sklearn.linear_model import LogisticRegression

from erw_hf import RepresentationEncoder
from erw_hf.data.source import load_source
from erw_hf.evaluation import cknna
from erw_hf.evaluation.probes import (
    ProbeImages,
    block_features,
    encoder_features,
    linear_probe,
    load_probe_images,
    load_probe_pair,
    probe_blocks,
)
from erw_hf.flow import interpolate


@pytest.fixture(scope="module")
def images():
    return load_probe_images(load_source("digits", "test"), 60, 8, 1, seed=0)


def test_linear_probe_finds_scikit_learns_optimum():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 12))
    labels = rng.integers(5, size=900)
    features = 3 + 10 * (centres[labels] + 1.2 * rng.standard_normal((900, 12)))
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    found = linear_probe(x[:600], y[:600], x[600:], y[600:], weight_decay=0.01)
    mean, std = features[:600].mean(0), features[:600].std(0, ddof=1)
    standard = (features - mean) / std
    # scikit-learn's loss is a sum: its C is 1 / (n weight_decay).
    theirs = LogisticRegression(C=1 / (600 * 0.01), max_iter=2000, tol=1e-8).fit(standard[:600], labels[:600])
    expected = theirs.score(standard[600:], labels[600:])
    assert 0.6 < expected < 0.95 and found == pytest.approx(expected, abs=1e-9)


def test_blocks_are_read_without_the_class_on_clean_and_noised_latents(transformer, images):
    clean = block_features(transformer, images, 0.0, batch_size=16)
    assert clean.shape == (3, 60, 16)
    latents = images.pixels.float() / 127.5 - 1
    null = torch.full((60,), 10)
    with torch.no_grad():
        tokens = transformer(latents, torch.zeros(60), null, hidden_states_depths=(1, 2, 3)).hidden_states
    expected = torch.stack([depth.mean(dim=1) for depth in tokens])
    assert torch.allclose(clean, expected, atol=1e-5)
    noised = block_features(transformer, images, 0.5)
    assert (noised - clean).abs().max() > 0.1
    assert torch.allclose(noised, block_features(transformer, images, 0.5, batch_size=7), atol=1e-5)
    assert interpolate(latents, latents, torch.full((60,), 0.5), "cosine")[0].shape == latents.shape
    assert not torch.allclose(noised, block_features(transformer, images, 0.5, path_type="cosine"), atol=1e-2)


def test_probe_of_every_block(transformer, images, encoder_path):
    encoder = RepresentationEncoder.from_pretrained(encoder_path, token_grid=4)
    fit = load_probe_images(load_source("digits", "train"), 80, 8, 1, seed=0)
    results = probe_blocks(transformer, fit, images, (0.0, 0.3), encoder=encoder, k=5)
    assert [result["t"] for result in results] == [0.0, 0.3]
    unit = torch.nn.functional.normalize
    block = unit(block_features(transformer, images, 0.3)[1], dim=-1).numpy()
    target = unit(encoder_features(encoder, images), dim=-1).numpy()
    assert results[1]["cknna"][1] == pytest.approx(cknna(block, target, k=5), rel=1e-9)
    assert len(results[0]["cknna"]) == len(results[0]["accuracy"]) == 3
    # Pixels on 16 tokens, mixed at random: more than chance is known.
    assert min(results[0]["accuracy"]) > 0.15
    without = probe_blocks(transformer, ProbeImages(fit.pixels, None, 0), ProbeImages(images.pixels, None, 0))
    assert without == [{"t": 0.0}]


def test_choice_of_images_is_random_but_fixed():
    source = load_source("digits", "train")
    first, again, other = (load_probe_images(source, 50, 8, 1, seed) for seed in (0, 0, 1))
    assert torch.equal(first.pixels, again.pixels) and not torch.equal(first.pixels, other.pixels)
    assert len(set(first.labels.tolist())) == 10
    stream = load_source("digits", "train", streaming=True)
    assert len(load_probe_images(stream, 5, 8, 1, seed=0).pixels) == 5
    with pytest.raises(ValueError, match="name a dataset of images"):
        load_probe_images(replace(source, image_column=None), 5, 8, 1, seed=0)


@pytest.mark.parametrize(("count", "expected"), [(50, (50, 50)), (1000, (719, 719))])
def test_one_split_is_shared_without_an_image_in_both(count, expected):
    """On the images that it was fitted on, a probe of noise has an accuracy of 1."""
    source = load_source("digits", "train")
    fit, test = load_probe_pair(source, None, count, 8, 1, seed=0)
    assert (len(fit.pixels), len(test.pixels)) == expected
    both = torch.cat([fit.pixels, test.pixels]).flatten(1)
    rows = torch.cat([load_probe_images(source, 2000, 8, 1, 0).pixels]).flatten(1)
    assert torch.equal(both, rows[: sum(expected)])
    stream = load_source("digits", "train", streaming=True)
    fit, test = load_probe_pair(stream, None, 5, 8, 1, seed=0)
    assert len(fit.pixels) == len(test.pixels) == 5 and not torch.equal(fit.pixels, test.pixels)
    held_out = load_source("digits", "test")
    assert len(load_probe_pair(source, held_out, 20, 8, 1, seed=0)[1].pixels) == 20


def test_a_run_whose_probes_cannot_work_does_not_start(tiny_flags, tmp_path):
    with pytest.raises(ValueError, match="CKNNA needs more than 10 images, test gave 5"):
        train(
            *tiny_flags, f"--output_dir={tmp_path}/run", "--probe_steps=1", "--probe_samples=5", "--probe_split=test"
        )


def test_command_on_the_shipped_pipeline(tmp_path, capsys):
    run_script(
        "probe", f"--output_dir={tmp_path}", f"--model={REPOSITORY}/pipelines/erw-digits", "--dataset_name=digits",
        "--test_split=test", f"--encoder={REPOSITORY}/pipelines/dinov2-tiny-digits", "--times", "0", "0.5",
        "--num_images=200",
    )  # fmt: skip
    record = json.loads((tmp_path / "probe.json").read_text())
    clean, noised = record["probes"]
    assert len(clean["cknna"]) == len(clean["accuracy"]) == 8 and record["images"] == {"fit": 200, "test": 200}
    # What it learned of digits without being told their class.
    assert max(clean["accuracy"]) > 0.85 and max(noised["cknna"]) > 0.15
    assert (tmp_path / "probe.png").stat().st_size > 10_000
    assert "cknna" in capsys.readouterr().out


def test_ranks_other_than_the_main_one_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    run_script(
        "probe", f"--output_dir={tmp_path}/out", f"--model={REPOSITORY}/pipelines/erw-digits", "--num_images=12",
        "--dataset_name=digits", "--test_split=test",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_images=1", "num_images must be at least 2"),
        ("--neighbours=0", "neighbours must be at least 1"),
        ("--times=1.5", r"times must lie in \[0, 1\]"),
        ("--output_dir={folder}/file", "file is a file"),
    ],
)
def test_command_checks_its_flags_first(flag, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        run_script(
            "probe",
            f"--output_dir={tmp_path}",
            "--model=absent",
            "--dataset_name=digits",
            flag.format(folder=tmp_path),
        )
    assert re.search(message, capsys.readouterr().err)


def test_command_needs_more_images_than_neighbours_before_it_probes(tmp_path):
    with pytest.raises(ValueError, match="--neighbours 10 needs more images than that, test has 5"):
        run_script(
            "probe", f"--output_dir={tmp_path}/out", f"--model={REPOSITORY}/pipelines/erw-digits", "--num_images=5",
            "--dataset_name=digits", "--test_split=test", f"--encoder={REPOSITORY}/pipelines/dinov2-tiny-digits",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
