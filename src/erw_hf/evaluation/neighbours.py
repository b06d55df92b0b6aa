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
"""Whether samples repeat training images: how far their nearest ones are, beside those of held-out images."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from erw_hf.evaluation.images import ImageSet


PAIRS = 8  # shown
RESAMPLES = 200  # of the bootstrap
ROWS = 20_000  # of features that are in memory in float64


@dataclass(frozen=True)
class Neighbours:
    """
    Distances in the features of the first extractor.

    Args:
        ratio (`float`): Median distance of samples to their nearest training image, over that of held-out images: about 1 for
            samples that are new, towards 0 for copies.
        error (`float`): Its standard error, by bootstrap.
        pairs (`list[tuple[int, int, float]]`): Sample, training image and distance of the closest pairs, the closest first.
    """

    ratio: float
    error: float
    pairs: list[tuple[int, int, float]]


def nearest(features: torch.Tensor, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of images.
        among (`torch.Tensor` of shape `(M, D)`): Of others.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: For each image the Euclidean distance to the nearest of the others, and which it is.
    """
    found = []
    for some in features.split(1024):
        best = torch.full((len(some),), torch.inf, dtype=torch.float64), torch.zeros(len(some), dtype=torch.long)
        for start in range(0, len(among), ROWS):
            part = torch.cdist(some.double(), among[start : start + ROWS].double()).min(dim=1)
            closer = part.values < best[0]
            best = torch.where(closer, part.values, best[0]), torch.where(closer, part.indices + start, best[1])
        found.append(best[1])
    indices = torch.cat(found)
    # Once more: `cdist` multiplies matrices, after which an image is not at distance 0 from itself.
    distances = [
        (some.double() - among[rows].double()).norm(dim=1)
        for some, rows in zip(features.split(1024), indices.split(1024), strict=True)
    ]
    return torch.cat(distances), indices


def compare_neighbours(samples: torch.Tensor, training: torch.Tensor, held_out: torch.Tensor) -> Neighbours:
    """
    Args:
        samples (`torch.Tensor` of shape `(N, D)`): Features of samples.
        training (`torch.Tensor` of shape `(M, D)`): Of the training images.
        held_out (`torch.Tensor` of shape `(K, D)`): Of images that were not trained on.

    Returns:
        [`Neighbours`]: The comparison.

    Raises:
        ValueError: if half of the held-out images are training images.
    """
    (distances, indices), expected = nearest(samples, training), nearest(held_out, training)[0]
    medians = distances.median().item(), expected.median().item()
    if medians[1] <= 1e-4 * medians[0]:  # 0 up to how features differ from batch to batch
        raise ValueError("half of the reference's images are training images: compare with held-out ones")
    rng = np.random.default_rng(0)
    ratios = [
        np.median(rng.choice(distances.numpy(), len(distances)))
        / max(np.median(rng.choice(expected.numpy(), len(expected))), 1e-12)
        for _ in range(RESAMPLES)
    ]
    closest = distances.argsort()[:PAIRS].tolist()
    pairs = [(index, int(indices[index]), distances[index].item()) for index in closest]
    return Neighbours(medians[0] / medians[1], float(np.std(ratios)), pairs)


def draw_pairs(neighbours: Neighbours, samples: ImageSet, training: ImageSet, min_side: int = 128) -> Image.Image:
    """
    Args:
        neighbours ([`Neighbours`]): What was found.
        samples ([`ImageSet`]): The samples.
        training ([`ImageSet`]): The training images.
        min_side (`int`, *optional*, defaults to 128): Side that smaller images are enlarged to, in pixels.

    Returns:
        `PIL.Image.Image`: A column for each of the closest pairs: the sample above its training image, and their distance.
    """
    columns = []
    for sample, image, distance in neighbours.pairs:
        both = [images.read([index])[0][0] for images, index in ((samples, sample), (training, image))]
        columns.append(([Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in both], distance))
    side = max(min_side, *samples.size)
    sheet = Image.new("RGB", (side * len(columns), 2 * side + 16), "white")
    for column, (pictures, distance) in enumerate(columns):
        for row, picture in enumerate(pictures):
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (column * side, row * side))
        ImageDraw.Draw(sheet).text((column * side + 2, 2 * side + 2), f"{distance:.3g}", fill="black")
    return sheet
