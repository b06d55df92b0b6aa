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
"""The shipped pipeline draws what it is asked for, and neither copies nor prototypes."""

import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from erw_hf import ERWPipeline, RepresentationEncoder
from erw_hf.data.digits import load_digits_dataset


def cells(image) -> np.ndarray:
    """Ink in 0..16 on the source's 8x8 grid."""
    pixels = np.asarray(image.convert("L"), dtype=np.float64)
    factor = pixels.shape[0] // 8
    return pixels.reshape(8, factor, 8, factor).mean(axis=(1, 3)) * 16 / 255


@pytest.fixture(scope="module")
def drawn():
    pipe = ERWPipeline.from_pretrained(REPOSITORY / "pipelines" / "erw-digits")
    pipe.set_progress_bar_config(disable=True)
    labels = np.arange(250) % 10
    images = []
    for start in range(0, 250, 125):
        images += pipe(
            class_labels=labels[start : start + 125].tolist(),
            num_inference_steps=50,
            generator=torch.Generator().manual_seed(start),
        ).images
    return images, np.stack([cells(image) for image in images]), labels


def test_an_independent_classifier_reads_the_class_that_was_asked_for(drawn):
    _, samples, labels = drawn
    digits = load_digits()
    classifier = SVC(gamma=0.001).fit(digits.data, digits.target)
    assert (classifier.predict(samples.reshape(-1, 64)) == labels).mean() >= 0.97


def test_pictures_are_square_white_on_black_and_fill_the_frame(drawn):
    images, samples, _ = drawn
    assert all(image.width == image.height and image.width % 8 == 0 for image in images)
    real = load_digits().images
    assert abs(samples.mean() - real.mean()) < 0.1 * real.mean()
    ink = (samples.mean(axis=0) > 1).mean()
    assert abs(ink - (real.mean(axis=0) > 1).mean()) < 0.1


def test_neither_copies_nor_prototypes(drawn):
    _, samples, labels = drawn
    splits = load_digits_dataset()
    train, held_out = (np.stack([cells(image) for image in splits[name]["image"]]) for name in ("train", "test"))
    train_labels = np.asarray(splits["train"]["label"])

    def median_distance(images):
        nearest = [np.sqrt(((train - image) ** 2).sum(axis=(1, 2))).min() for image in images]
        return np.median(nearest)

    def spread(images, classes):
        return np.mean([images[classes == digit].std(axis=0).mean() for digit in range(10)])

    assert median_distance(samples) >= 0.6 * median_distance(held_out)
    assert spread(samples, labels) >= 0.8 * spread(train, train_labels)


def test_the_shipped_encoder_knows_digits_that_it_has_not_seen():
    """k-NN by its mean patch token: well above what an untrained encoder of the same shape reaches."""
    encoder = RepresentationEncoder.from_pretrained(REPOSITORY / "pipelines" / "dinov2-tiny-digits", token_grid=4)
    splits = load_digits_dataset()
    features = []
    for name in ("train", "test"):
        pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in splits[name]["image"]])
        tokens = encoder(pixels[:, None] / 255)
        assert tokens.shape[1:] == (16, encoder.embed_dim)
        features.append(torch.nn.functional.normalize(tokens.mean(dim=1), dim=-1))
    nearest = (features[1] @ features[0].T).topk(10).indices
    votes = torch.nn.functional.one_hot(torch.tensor(splits["train"]["label"])[nearest], 10).sum(dim=1)
    assert (votes.argmax(dim=1) == torch.tensor(splits["test"]["label"])).float().mean() > 0.9
