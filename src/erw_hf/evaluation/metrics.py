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
"""The formulas: Fréchet distance, Inception score, KID, precision and recall, MIND, CKNNA, and how far each number of an
evaluation is from that of other draws.

A metric is a function of the distribution of the samples. Its influence function says how the number moves with the weight of
one sample; the standard error is the deviation of the influences over the square root of their number (the infinitesimal
jackknife: what deleting samples one by one gives to first order). For a Fréchet distance that costs one product with the
features, where a jackknife over groups holds a covariance for each group. No random numbers are drawn for it.

The means and covariances of all samples are summed up in `feature_statistics`. Tests compare the values with torch-fidelity's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


ROWS = 4096  # of features in float64 at a time


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Args:
        value (`float`): The number.
        influence (`numpy.ndarray` of shape `(N,)`): Of each sample on it, mean 0.
        bias (`float`): What the count of samples adds to it: an estimate, to be subtracted.
        shrinkage (`float`, *optional*, defaults to 1.0): Of the error, by what the influences overstate it.
    """

    value: float
    influence: np.ndarray
    bias: float
    shrinkage: float = 1.0

    @property
    def error(self) -> float:
        """The standard error over the samples."""
        return self.shrinkage * standard_error(self.influence)


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
    mu1, sigma1, mu2, sigma2 = _checked(mu1, sigma1, mu2, sigma2)
    root2 = _root(sigma2)
    return _frechet(mu1, sigma1, mu2, sigma2, np.linalg.eigvalsh(root2 @ sigma1 @ root2))


def _checked(*statistics: np.ndarray) -> tuple[np.ndarray, ...]:
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, dtype=np.float64) for value in statistics)
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (mu1.size, mu1.size):
        raise ValueError(
            f"means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, {sigma2.shape} do not fit together"
        )
    if not all(np.isfinite(value).all() for value in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance is not finite")
    return mu1, sigma1, mu2, sigma2


def _root(sigma: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(sigma)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _frechet(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray, values: np.ndarray) -> float:
    # tr((A B)^(1/2)) = tr((B^(1/2) A B^(1/2))^(1/2)); the latter matrix is symmetric, and these are its eigenvalues.
    trace = np.sqrt(values.clip(min=0)).sum()
    return float(max(0.0, ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace))


Statistics = tuple[np.ndarray, np.ndarray]  # mean (D,) and covariance (D, D)


def frechet_estimate(features: np.ndarray, samples: Statistics, reference: Statistics) -> Estimate:
    """
    Squared Fréchet distance of samples from a reference, with its error and bias.

    With Y = (X - m) R U, where R R = sigma and R S R = U L U^T, a sample moves the distance by
    `2 (m - mu) (x - m) + |x - m|^2 - tr S - sum(y^2 / L^(1/2)) + tr L^(1/2)`: the derivative along a shift of mean m and
    covariance S. The bias falls as 1 / N (Chong and Forsyth, arXiv 1911.07023), so it is what halving the samples adds. The
    influences overstate the variance, `a / N + 2 b / N^2` instead of `a / N + b / N^2`, where the second order counts (Efron and
    Stein, Annals of Statistics 9, 1981). Those of the halves tell b.

    Args:
        features (`numpy.ndarray` of shape `(N, D)`): Of the samples.
        samples (`tuple[numpy.ndarray, numpy.ndarray]`): Their mean (D,) and covariance (D, D).
        reference (`tuple[numpy.ndarray, numpy.ndarray]`): Those of the reference.

    Returns:
        [`Estimate`]: The distance; its bias is NaN for fewer than 4 samples.

    Raises:
        ValueError: see [`frechet_distance`].
    """
    mean, covariance, mu, sigma = _checked(*samples, *reference)
    root = _root(sigma)
    value, influence = _influence(features, mean, covariance, mu, sigma, root)
    if len(features) < 4:
        return Estimate(value, influence, float("nan"))
    order = np.random.default_rng(0).permutation(len(features))  # their own may go by class
    halves = [
        _influence(half, *_mean_and_covariance(half), mu, sigma, root)
        for half in (features[order[::2]], features[order[1::2]])
    ]
    bias = float(np.mean([half_value for half_value, _ in halves])) - value
    variance, variance_of_half = standard_error(influence) ** 2, np.mean([standard_error(x) ** 2 for _, x in halves])
    shrinkage = np.sqrt(np.clip(1.5 - variance_of_half / variance / 4, 0.25, 1)) if variance > 0 else 1.0
    return Estimate(value, influence, bias, float(shrinkage))


def _influence(
    features: np.ndarray, mean: np.ndarray, covariance: np.ndarray, mu: np.ndarray, sigma: np.ndarray, root: np.ndarray
) -> tuple[float, np.ndarray]:
    """The distance and the influence of each sample; `root` is that of sigma."""
    values, vectors = np.linalg.eigh(root @ covariance @ root)
    seen = values > values[-1] * 1e-10  # a direction that no sample takes moves nothing
    spread, turn = np.sqrt(values[seen]), root @ vectors[:, seen]
    influence = np.empty(len(features))
    for start in range(0, len(features), ROWS):
        x = features[start : start + ROWS].astype(np.float64) - mean
        shift = 2 * x @ (mean - mu) + (x**2).sum(axis=1)
        influence[start : start + ROWS] = shift - ((x @ turn) ** 2 / spread).sum(axis=1)
    return _frechet(mean, covariance, mu, sigma, values), influence - influence.mean()


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
    chosen, other = (x[np.sort(rng.permutation(len(x))[:count])].astype(np.float32) for x in (features, reference))
    directions = rng.standard_normal((features.shape[1], projections)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    half_of = np.full(count, -1)  # at random: their order may go by class
    half_of[rng.permutation(count)[: count // 2 * 2]] = np.arange(count // 2 * 2) % 2
    costs, halved, influence = 0.0, 0.0, np.zeros(count)  # summed over the directions
    for start in range(0, projections, 100):
        x, y = (directions[:, start : start + 100].T @ side.T for side in (chosen, other))  # (100, N)
        order = np.argsort(x, axis=1)
        sorted_x = np.take_along_axis(x, order, axis=1)
        for i in range(2):
            half = sorted_x[half_of[order] == i].reshape(len(x), -1)
            halved += ((half - np.sort(y[:, half_of == i], axis=1)) ** 2).mean(axis=1, dtype=np.float64).sum() / 2
        gap = sorted_x - np.sort(y, axis=1)  # half the slope of the potential, at each sample
        costs += (gap**2).mean(axis=1, dtype=np.float64).sum()
        potential = np.zeros(gap.shape)
        np.cumsum(np.diff(sorted_x) * (gap[:, 1:] + gap[:, :-1]), axis=1, out=potential[:, 1:])
        potential -= potential.mean(axis=1, keepdims=True)
        influence += np.bincount(order.ravel(), potential.ravel(), count)
    scale = 3 * features.shape[1] / projections
    bias = float(scale * (halved - costs)) if count > 3 else float("nan")
    return Estimate(float(scale * costs), scale * influence, bias)


def inception_score(logits: np.ndarray, chunk: int) -> tuple[float, float, float, float]:
    """
    Inception score (arXiv 1606.03498): the exponential of the mean divergence of a sample's classes from their mean.

    Args:
        logits (`numpy.ndarray` of shape `(N, K)`): Of the samples.
        chunk (`int`): Samples per score, consecutive; what remains is shared out among the scores.

    Returns:
        `tuple[float, float, float, float]`: Mean of the scores, their deviation, and standard error and bias of the mean. A
        sample moves the logarithm of its chunk's by its divergence from the mean; the entropy of a mean of n is short by
        `sum(var p / mean p) / 2 n`.
    """
    scores, variances, biases, splits = [], [], [], max(1, len(logits) // chunk)
    for i in range(splits):
        x = logits[i * len(logits) // splits : (i + 1) * len(logits) // splits].astype(np.float64)
        x = x - x.max(axis=1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        mean = p.mean(axis=0).clip(min=np.finfo(np.float64).tiny)  # of a class that no sample can be
        divergence = (p * (log_p - np.log(mean))).sum(axis=1)
        score = np.exp(divergence.mean())
        scores.append(score)
        variances.append((score * standard_error(divergence)) ** 2)
        biases.append(-score * (p.var(axis=0) / mean).sum() / (2 * len(p)))
    return (
        float(np.mean(scores)),
        float(np.std(scores)),
        float(np.sqrt(np.sum(variances)) / splits),
        float(np.mean(biases)),
    )


def kernel_distance(
    features: np.ndarray, reference: np.ndarray, subset: int, subsets: int
) -> tuple[float, float, float]:
    """
    Kernel distance (KID, arXiv 1801.01401): the unbiased squared maximum mean discrepancy of kernel `(x y / D + 1)^3`, over
    the random subsets that torch-fidelity takes.

    Args:
        features (`numpy.ndarray` of shape `(N, D)`): Of the samples.
        reference (`numpy.ndarray` of shape `(M, D)`): Of real images.
        subset (`int`): Most images of either side in a subset.
        subsets (`int`): Number of subsets.

    Returns:
        `tuple[float, float, float]`: Mean and deviation over the subsets, and the standard error of the mean: over the
        samples, and of the choice of the subsets.
    """
    rng, size, found = np.random.RandomState(2020), min(subset, len(features), len(reference)), []
    for _ in range(subsets):
        # float64: the cubes of a 2 048-wide inner product lose digits in float32.
        x, y = (side[rng.choice(len(side), size, replace=False)].astype(np.float64) for side in (features, reference))
        within = sum((_kernel(z, z, sums=True) - _kernel_of_itself(z)).sum() for z in (x, y))
        found.append(within / (size * (size - 1)) - 2 * _kernel(x, y, sums=True).sum() / size**2)
    deviation = float(np.std(found))
    return (
        float(np.mean(found)),
        deviation,
        float(np.hypot(kid_error(features, reference, subset), deviation / np.sqrt(subsets))),
    )


def _kernel(x: np.ndarray, y: np.ndarray, sums: bool = False) -> np.ndarray:
    """(N, M), or only the sums of its rows (N,)."""
    base = (x / x.shape[1]) @ y.T
    base += 1
    # Ten times as fast as a power.
    return np.einsum("ij,ij->i", base * base, base) if sums else base * base * base


def _kernel_of_itself(x: np.ndarray) -> np.ndarray:
    return ((x**2).mean(axis=1) + 1) ** 3  # (N,)


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
        compared, rows = [side.astype(np.float64) for side in (features[own], reference[other])], []
        for start in range(0, len(features), ROWS):
            x = features[start : start + ROWS].astype(np.float64)
            itself = np.isin(np.arange(start, start + len(x)), own)  # a sample is not compared with itself
            within = _kernel(x, compared[0], sums=True) - itself * _kernel_of_itself(x)
            rows.append(within / np.maximum(size - itself, 1) - _kernel(x, compared[1], sums=True) / others)
        influences.append(2 * np.concatenate(rows))
    x, count = features[samples[:subset]].astype(np.float64), len(features)
    pairs = _kernel(x, x)
    pairs += pairs.mean() - pairs.mean(axis=0) - pairs.mean(axis=1, keepdims=True)
    pairs = (pairs**2).mean() - (np.diag(pairs) ** 2).mean() / len(x)
    return float(
        np.sqrt(max(0.0, np.cov(influences[0], influences[1])[0, 1]) / count + 2 * pairs / (count * (count - 1)))
    )


def precision_recall(features: torch.Tensor, reference: torch.Tensor, neighbours: int = 3) -> tuple[float, float]:
    """
    Improved precision and recall (arXiv 1904.06991): the share of samples within the distance of some real image to its k-th
    neighbour, and the share of real images within that of some sample. Block by block, so that no matrix of all distances is
    held.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of the samples.
        reference (`torch.Tensor` of shape `(M, D)`): Of real images.
        neighbours (`int`, *optional*, defaults to 3): k.

    Returns:
        `tuple[float, float]`: Precision and recall.

    Raises:
        ValueError: for not more than k of either, and for features that are not finite.
    """
    if min(len(features), len(reference)) <= neighbours or not all(x.isfinite().all() for x in (features, reference)):
        raise ValueError(
            f"precision and recall need more than {neighbours} finite samples of either, got {len(features)} and {len(reference)}"
        )
    middle = reference.mean(dim=0)  # distances stay, and rounding shrinks
    x, y = (features - middle).float(), (reference - middle).float()
    x_radii, y_radii = (
        torch.cat([block.topk(neighbours + 1, largest=False).values[:, -1] for block in _distances(side, side)])
        for side in (x, y)
    )
    inside, covered, start = 0, torch.zeros(len(y), dtype=torch.bool), 0
    for block in _distances(x, y):
        inside += int((block <= y_radii).any(dim=1).sum())
        covered |= (block <= x_radii[start : start + len(block), None]).any(dim=0)
        start += len(block)
    return inside / len(x), int(covered.sum()) / len(y)


def _distances(x: torch.Tensor, y: torch.Tensor) -> Iterator[torch.Tensor]:
    """Squared distances (B, M), of a few rows of x at a time."""
    squares = (y**2).sum(dim=1)
    for rows in x.split(256):
        yield torch.addmm(squares, rows, y.T, alpha=-2).add_((rows**2).sum(dim=1, keepdim=True))


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
