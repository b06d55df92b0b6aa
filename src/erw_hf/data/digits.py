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
"""The 1 797 handwritten digits inside scikit-learn's wheel, as a `datasets` data set: real data without a download."""

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage


def load_digits_dataset() -> DatasetDict:
    """
    Builds the data set of handwritten digits (Alpaydin & Kaynak, UCI 1998, test part; CC BY 4.0).

    Images are 8x8, grey, white on black. Every fifth image is held out as the `test` split, and no training of this
    repository sees it: not the transformer's and not the tiny encoder's.

    Returns:
        `DatasetDict`: `train` (1 438 rows) and `test` (359 rows), columns `image` and `label`.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    # The source counts ink in 0..16.
    pixels = (digits.images * 255 / 16).round().astype("uint8")
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
