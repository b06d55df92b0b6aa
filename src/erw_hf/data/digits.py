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
"""The 1 797 handwritten digits inside scikit-learn's wheel, as a `datasets` dataset: real data without a download."""

from functools import cache

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage


FACTOR = 4  # the source's 8x8 pixels become 32x32


def load_digits_dataset() -> DatasetDict:
    """The handwritten digits (Alpaydin & Kaynak, UCI 1998, test part; CC BY 4.0): `train` (1 438 rows) and `test` (359
    rows), columns `image` and `label`.

    Images are 32x32, grey, white on black: the source's 8x8 pixels, enlarged smoothly so that the mean of each 4x4
    cell is the source's value. Every fifth image is held out for `test`; neither the transformer nor the tiny
    encoder is trained on it."""
    return DatasetDict(_digits())  # a caller may change its own


@cache  # enlarging takes a second
def _digits() -> DatasetDict:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = [_enlarge(image * 255 / 16) for image in digits.images]  # the source counts ink in 0..16
    held_out = [i % 5 == 4 for i in range(len(pixels))]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "image": [PILImage.fromarray(pixels[i]) for i, out in enumerate(held_out) if out == wanted],
                    "label": [int(digits.target[i]) for i, out in enumerate(held_out) if out == wanted],
                },
                features=features,
            )
            for split, wanted in (("train", False), ("test", True))
        }
    )


def _enlarge(image: np.ndarray) -> np.ndarray:
    """Bicubic enlargement, corrected until every cell's mean is its source pixel again (iterative back-projection)."""
    small = PILImage.fromarray(image.astype(np.float32))
    size = (small.width * FACTOR, small.height * FACTOR)
    large = np.asarray(small.resize(size, PILImage.Resampling.BICUBIC)).clip(0, 255)
    for _ in range(10):
        cells = large.reshape(small.height, FACTOR, small.width, FACTOR).mean(axis=(1, 3))
        large = (large + np.kron(image - cells, np.ones((FACTOR, FACTOR)))).clip(0, 255)
    return large.round().astype(np.uint8)
