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
"""The formulas of our own, in float64: the Fréchet distance, behind FID, sFID and FD-DINOv2, and CKNNA.

The means and covariances that the first takes are summed up in `feature_statistics`; torch-fidelity's metrics are called in
`quality`.
"""

import numpy as np


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """
    Squared Fréchet distance of two Gaussians (FID, arXiv 1706.08500, Eq. 6).

    The trace of the matrix square root is taken from the eigenvalues of a symmetric matrix: `scipy.linalg.sqrtm` of the
    product has returned imaginary parts and, with some BLAS builds, wrong numbers.

    Args:
        mu1 (`numpy.ndarray` of shape `(D,)`): Mean of the first.
        sigma1 (`numpy.ndarray` of shape `(D, D)`): Covariance of the first.
        mu2 (`numpy.ndarray` of shape `(D,)`): Mean of the second.
        sigma2 (`numpy.ndarray` of shape `(D, D)`): Covariance of the second.

    Returns:
        `float`: `|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))`, at least 0.

    Raises:
        ValueError: if the shapes do not fit together or a value is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, dtype=np.float64) for value in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (mu1.size, mu1.size):
        raise ValueError(
            f"means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, {sigma2.shape} do not fit together"
        )
    if not all(np.isfinite(value).all() for value in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance is not finite")
    # tr((A B)^(1/2)) = tr((A^(1/2) B A^(1/2))^(1/2)), and the latter matrix is symmetric.
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)).sum()
    return float(max(0.0, ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace))


def cknna(x: np.ndarray, y: np.ndarray, k: int = 10) -> float:
    """
    Centered kernel nearest-neighbour alignment of two sets of features of the same samples (Huh et al., arXiv
    2405.07987; ERW, arXiv 2504.10188, App. C.1).

    A pair (i, j) counts in `Align(K, L)` if j is among the k nearest neighbours of i in both kernels, and in the
    normalisers `Align(K, K)` and `Align(L, L)` if it is so in that kernel alone. ERW's released tool takes the common
    mask for all three, which gives unrelated features 0.6 and more.

    Args:
        x (`numpy.ndarray` of shape `(N, D)`): Features of one model.
        y (`numpy.ndarray` of shape `(N, E)`): Features of another, in the same order.
        k (`int`, *optional*, defaults to 10): Number of neighbours.

    Returns:
        `float`: 1 for identical features, about k / N for unrelated ones.

    Raises:
        ValueError: if the numbers of samples differ, or are not more than k.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"features must be (N, D) and (N, E), got {x.shape} and {y.shape}")
    if len(x) <= k:
        raise ValueError(f"{len(x)} samples have no {k} neighbours each")
    (kernel_x, mask_x), (kernel_y, mask_y) = (_centered_kernel(features, k) for features in (x, y))
    aligned = (kernel_x * kernel_y)[mask_x & mask_y].sum()
    return float(aligned / np.sqrt((kernel_x[mask_x] ** 2).sum() * (kernel_y[mask_y] ** 2).sum()))


def _centered_kernel(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Inner products less the mean of their row, and which columns of a row are its k nearest neighbours."""
    kernel = features @ features.T  # (N, N)
    others = kernel.copy()
    np.fill_diagonal(others, -np.inf)
    mask = np.zeros(kernel.shape, dtype=bool)
    np.put_along_axis(mask, np.argpartition(-others, k - 1, axis=1)[:, :k], True, axis=1)
    return kernel - kernel.mean(axis=1, keepdims=True), mask
