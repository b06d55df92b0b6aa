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
"""The glyphs: drawn alike by anyone, loaded by the trainer, learnt from by the encoder and by the metric network."""

import sys

import numpy as np
import pytest
from datasets import load_dataset
from helpers import REPOSITORY, run_script
from transformers import AutoConfig

from erw_hf import RepresentationEncoder
from erw_hf.data.source import load_source


sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import glyphs  # noqa: E402


FLAGS = "--train 4 --validation 1 --test 2 --size 16 --characters AB8 --shard_rows 8".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glyphs") / "data-set"
    glyphs.main([*FLAGS, "--output_dir", str(folder), "--workers", "1", "--grid", str(folder.parent / "grid.png")])
    return folder


def test_an_image_depends_on_seed_split_and_number_alone():
    def pixels(split, index, seed=0):
        return np.asarray(glyphs.draw(split, index, "AB8", 32, seed))

    first = pixels("train", 4)
    assert first.shape == (32, 32, 3) and first.std() > 5
    view = glyphs.draw("train", 4, "AB8", 32, 0, rendering=1)
    assert not np.array_equal(np.asarray(view), first)
    pixels("test", 1)
    assert np.array_equal(pixels("train", 4), first)
    for other in (pixels("train", 7), pixels("validation", 4), pixels("train", 4, seed=1)):
        assert not np.array_equal(other, first)


def test_bright_ink_is_brighter_than_its_ground():
    def middle_over_edge(index, **kwargs):
        pixels = np.asarray(glyphs.draw("train", index, "H8", 32, 0, **kwargs).convert("L"), dtype=float)
        edge = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
        return pixels[8:24, 8:24].mean() - edge.mean()

    either = [middle_over_edge(index) for index in range(100)]
    bright = [middle_over_edge(index, bright_ink=True) for index in range(100)]
    assert 30 < sum(value > 0 for value in either) < 70
    assert sum(value > 0 for value in bright) > 90
    # What was bright already is the same image.
    assert sum(np.isclose(a, b) for a, b in zip(either, bright, strict=True)) > 30


def test_every_font_draws_every_character_and_those_of_the_test_are_its_own():
    assert not set(glyphs.FONTS["train"]) & set(glyphs.FONTS["test"])
    for font in {*glyphs.FONTS["train"], *glyphs.FONTS["test"]}:
        masks = {glyphs.character_mask(character, font, 0).tobytes() for character in glyphs.CHARACTERS}
        assert len(masks) == len(glyphs.CHARACTERS)  # a missing one would be the same empty box


def test_the_folder_is_a_data_set_and_is_made_once(folder):
    sizes = {}
    for split in ("train", "validation", "test"):
        source = load_source(str(folder), split)
        sizes[split] = len(source.dataset)
        assert source.id2label == {0: "A", 1: "B", 2: "8"}
        assert source.dataset["label"][:3] == [0, 1, 2]
    assert sizes == {"train": 12, "validation": 3, "test": 6}
    shards = {path: path.stat().st_mtime_ns for path in (folder / "data").iterdir()}
    assert len(shards) == 4  # 12 training images are two shards of 8
    lost = sorted(shards)[-1]
    content = lost.read_bytes()
    lost.unlink()
    glyphs.main([*FLAGS, "--output_dir", str(folder), "--workers", "1"])
    assert lost.read_bytes() == content
    assert {p: p.stat().st_mtime_ns for p in shards if p != lost} == {p: t for p, t in shards.items() if p != lost}
    with pytest.raises(ValueError, match="other settings"):
        glyphs.main([*FLAGS, "--seed", "1", "--output_dir", str(folder)])
    assert (folder.parent / "grid.png").exists()


def test_grey_images_have_one_channel_and_a_folder_of_their_own(folder, tmp_path):
    grey = [*FLAGS, "--grey", "--workers", "1", "--output_dir"]
    glyphs.main([*grey, str(tmp_path)])
    dull, bright = (load_dataset(str(data), split="train")[0] for data in (tmp_path, folder))
    for column in ("image", "view"):
        assert bright[column].mode == "RGB"
        assert np.array_equal(dull[column], bright[column].convert("L"))
    with pytest.raises(ValueError, match="other settings"):
        glyphs.main([*grey, str(folder)])


def test_encoder_and_metric_network_learn_from_it(folder, tmp_path, capsys):
    shared = ["--dataset_name", folder, "--image_size", "16", "--steps", "20", "--batch_size", "4"]
    sizes = ["--patch_size", "4", "--hidden_size", "32", "--num_layers", "1"]
    run_script("train_tiny_encoder", *shared, *sizes, "--output_dir", tmp_path / "encoder")
    run_script("train_tiny_encoder", *shared, "--view_column", "view", "--resnet", "--output_dir", tmp_path / "resnet")
    run_script("train_classifier", *shared, "--output_dir", tmp_path / "classifier")
    assert "accuracy on the held-out images" in capsys.readouterr().out
    assert AutoConfig.from_pretrained(tmp_path / "encoder").image_size == 16
    # Its cells are those of --patch_size, so that it is given images of the size that it learned from.
    assert RepresentationEncoder.from_pretrained(tmp_path / "resnet", token_grid=2).image_size == 16
    assert AutoConfig.from_pretrained(tmp_path / "classifier").id2label == {0: "A", 1: "B", 2: "8"}
