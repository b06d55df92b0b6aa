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
"""The formulas of our own: Fréchet distance, MIND, CKNNA, and how far each number of an evaluation is from that of other draws.

A metric is a function of the distribution of the samples. Its influence function says how the number moves with the weight of
one sample; the standard error is the deviation of the influences over the square root of their number (the infinitesimal
jackknife: what deleting samples one by one gives to first order). For a Fréchet distance that costs one product with the
features, where a jackknife over groups holds a covariance for each group. No random numbers are drawn for it.

The means and covariances of all samples are summed up in `feature_statistics`; torch-fidelity's metrics are called in `quality`.
"""

from dataclasses import dataclass

import numpy as np


ROWS = 4096  # of features in float64 at a time


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Args:
        value (`float`): The number.
        influence (`numpy.ndarray` of shape `(N,)`): Of each sample on it, mean 0.
        bias (`float`): What the count of samples adds to it: an estimate, to be subtracted.
    """

    value: float
    influence: np.ndarray
    bias: float

    @property
    def error(self) -> float:
        """The standard error over the samples."""
        return standard_error(self.influence)


def standard_error(influence: np.ndarray) -> float:
    """
    Args:
        influence (`numpy.ndarray` of shape `(N,)`): Of each sample on a number.

    Returns:
        `float`: Standard error of the number; NaN of one sample.
    """
    return float(influence.std(ddof=1) / np.sqrt(len(influence))) if len(influence) > 1 else float("nan")


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
    return _frechet(mu1, sigma1, mu2, sigma2, _root(sigma2))


def _root(sigma: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _frechet(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray, root2: np.ndarray) -> float:
    # tr((A B)^(1/2)) = tr((B^(1/2) A B^(1/2))^(1/2)), and the latter matrix is symmetric.
    trace = np.sqrt(np.linalg.eigvalsh(root2 @ sigma1 @ root2).clip(min=0)).sum()
    return float(max(0.0, ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace))


Statistics = tuple[np.ndarray, np.ndarray]  # mean (D,) and covariance (D, D)


def frechet_estimate(features: np.ndarray, samples: Statistics, reference: Statistics) -> Estimate:
    """
    Squared Fréchet distance of samples from a reference, with its error and bias.

    With Y = (X - m) R U, where R R = sigma and R S R = U L U^T, a sample moves the distance by
    `2 (m - mu) (x - m) + |x - m|^2 - tr S - sum(y^2 / L^(1/2)) + tr L^(1/2)`: the derivative along a shift of mean m and
    covariance S. Below about 20 samples for each feature the error is too large rather than too small. The bias falls as
    1 / N (Chong and Forsyth, arXiv 1911.07023), so it is what halving the samples adds.

    Args:
        features (`numpy.ndarray` of shape `(N, D)`): Of the samples.
        samples (`tuple[numpy.ndarray, numpy.ndarray]`): Their mean (D,) and covariance (D, D).
        reference (`tuple[numpy.ndarray, numpy.ndarray]`): Those of the reference.

    Returns:
        [`Estimate`]: The distance; its bias is NaN for fewer than 4 samples.
    """
    (mean, covariance), (mu, sigma) = samples, reference
    value, root = frechet_distance(mean, covariance, mu, sigma), _root(np.asarray(sigma, dtype=np.float64))
    values, vectors = np.linalg.eigh(root @ covariance @ root)
    seen = values > values[-1] * 1e-10  # a direction that no sample takes moves nothing
    spread, turn = np.sqrt(values[seen]), root @ vectors[:, seen]
    influence = np.empty(len(features))
    for start in range(0, len(features), ROWS):
        x = features[start : start + ROWS].astype(np.float64) - mean
        shift = 2 * x @ (mean - mu) + (x**2).sum(axis=1)
        influence[start : start + ROWS] = shift - ((x @ turn) ** 2 / spread).sum(axis=1)
    halves = [_mean_and_covariance(features[i::2]) for i in range(2)] if len(features) > 3 else []
    bias = np.mean([_frechet(*part, mu, sigma, root) for part in halves]) - value if halves else np.nan
    return Estimate(value, influence - influence.mean(), float(bias))


def _mean_and_covariance(features: np.ndarray) -> Statistics:
    """As of `numpy.cov`, without a copy of all features in float64."""
    count, dim = features.shape
    mean, products = features.mean(axis=0, dtype=np.float64), np.zeros((dim, dim))
    for start in range(0, count, ROWS):
        x = features[start : start + ROWS].astype(np.float64) - mean
        products += x.T @ x
    return mean, products / (count - 1)


def mind_estimate(features: np.ndarray, reference: np.ndarray, projections: int = 1000, seed: int = 0) -> Estimate:
    """
    Monge Inception distance (MIND, arXiv 2605.06797): the squared Wasserstein distance along random directions, their mean
    times 3 D. As many of one side are taken as there are of the other, at random.

    Args:
        features (`numpy.ndarray` of shape `(N, D)`): Of the samples.
        reference (`numpy.ndarray` of shape `(M, D)`): Of real images.
        projections (`int`, *optional*, defaults to 1000): Number of directions.
        seed (`int`, *optional*, defaults to 0): Of directions and choice.

    Returns:
        [`Estimate`]: The distance. A sample moves it by Kantorovich's potential at its place; the bias is what halving the
        samples adds, NaN for fewer than 4.
    """
    rng, count = np.random.default_rng(seed), min(len(features), len(reference))
    chosen, other = (x[np.sort(rng.permutation(len(x))[:count])] for x in (features, reference))
    directions = rng.standard_normal((features.shape[1], projections)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    costs, halved, influence = 0.0, 0.0, np.zeros(count)  # summed over the directions
    for start in range(0, projections, 100):
        x, y = (side.astype(np.float32) @ directions[:, start : start + 100] for side in (chosen, other))  # (N, 100)
        for i in range(2):
            even = len(x) // 2 * 2
            halved += ((np.sort(x[i:even:2], axis=0) - np.sort(y[i:even:2], axis=0)) ** 2).mean(axis=0).sum() / 2
        order = np.argsort(x, axis=0)
        sorted_x = np.take_along_axis(x, order, axis=0).astype(np.float64)
        slope = 2 * (sorted_x - np.sort(y, axis=0))  # of the potential, at each sample
        costs += (slope**2).mean(axis=0).sum() / 4
        steps = np.diff(sorted_x, axis=0) * (slope[1:] + slope[:-1]) / 2
        potential = np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(steps, axis=0)])
        found = np.empty_like(potential)
        np.put_along_axis(found, order, potential, axis=0)
        influence += (found - found.mean(axis=0)).sum(axis=1)
    scale = 3 * features.shape[1] / projections
    bias = float(scale * (halved - costs)) if count > 3 else float("nan")
    return Estimate(float(scale * costs), scale * influence, bias)


def inception_score_error(logits: np.ndarray, chunk: int) -> tuple[float, float]:
    """
    Args:
        logits (`numpy.ndarray` of shape `(N, K)`): Of the samples.
        chunk (`int`): Samples per score; the mean of the scores is reported.

    Returns:
        `tuple[float, float]`: Standard error and bias of the mean of the scores. A sample moves the logarithm of its
        chunk's by its divergence from the mean; the entropy of a mean of n is short by `sum(var p / mean p) / 2 n`.
    """
    variances, biases = [], []
    for start in range(0, max(1, len(logits) // chunk) * chunk, chunk):
        x = logits[start : start + chunk].astype(np.float64)
        x = x - x.max(axis=1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        mean = p.mean(axis=0)
        divergence = (p * (log_p - np.log(mean))).sum(axis=1)
        score = np.exp(divergence.mean())
        variances.append((score * standard_error(divergence)) ** 2)
        biases.append(-score * (p.var(axis=0) / mean).sum() / (2 * len(p)))
    return float(np.sqrt(np.sum(variances)) / len(variances)), float(np.mean(biases))


def kid_error(features: np.ndarray, reference: np.ndarray, subset: int, seed: int = 0) -> float:
    """
    Args:
        features (`numpy.ndarray` of shape `(N, D)`): Of the samples.
        reference (`numpy.ndarray` of shape `(M, D)`): Of real images.
        subset (`int`): Most of either that a sample is compared with.
        seed (`int`, *optional*, defaults to 0): Of their choice.

    Returns:
        `float`: Standard error of the kernel distance of all samples. A sample moves it by twice the mean kernel with other
        samples less that with real ones; two choices of these give two noisy values, whose covariance has no noise. What pairs
        of samples add is not small where the distance is.
    """
    rng, influences = np.random.default_rng(seed), []
    samples, real = rng.permutation(len(features)), rng.permutation(len(reference))
    size, others = min(subset, len(features) // 2), min(subset, len(reference) // 2)
    for half in range(2):
        own, other = samples[half * size : (half + 1) * size], real[half * others : (half + 1) * others]
        rows = []
        for start in range(0, len(features), ROWS):
            x = features[start : start + ROWS].astype(np.float64)
            kernels = [(x @ y.astype(np.float64).T / x.shape[1] + 1) ** 3 for y in (features[own], reference[other])]
            itself = (own >= start) & (own < start + len(x))
            kernels[0][own[itself] - start, np.flatnonzero(itself)] = np.nan
            rows.append(np.nanmean(kernels[0], axis=1) - kernels[1].mean(axis=1))
        influences.append(2 * np.concatenate(rows))
    x, count = features[samples[:subset]].astype(np.float64), len(features)
    pairs = (x @ x.T / x.shape[1] + 1) ** 3
    pairs += pairs.mean() - pairs.mean(axis=0) - pairs.mean(axis=1, keepdims=True)
    pairs = (pairs**2).mean() - (np.diag(pairs) ** 2).mean() / len(x)
    return float(
        np.sqrt(max(0.0, np.cov(influences[0], influences[1])[0, 1]) / count + 2 * pairs / (count * (count - 1)))
    )


def share_error(share: float, count: int) -> float:
    """
    Args:
        share (`float`): Of a yes, in [0, 1].
        count (`int`): Of how many.

    Returns:
        `float`: Standard error of the share.
    """
    return float(np.sqrt(share * (1 - share) / count))


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
