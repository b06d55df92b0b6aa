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
import numpy as np
import pytest
import scipy.linalg

from erw_hf.evaluation import cknna, frechet_distance


def gaussian(seed, dim=64):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((500, dim)) @ rng.standard_normal((dim, dim)) + rng.standard_normal(dim)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def test_frechet_distance_against_the_matrix_square_root():
    (mu1, sigma1), (mu2, sigma2) = gaussian(0), gaussian(1)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_simple_gaussians():
    assert frechet_distance(*gaussian(0), *gaussian(0)) == pytest.approx(0, abs=1e-6)
    zero, one = np.zeros(3), np.eye(3)
    assert frechet_distance(zero, one, zero + 2, 9 * one) == pytest.approx(3 * 4 + 3 * (1 - 3) ** 2)
    singular = np.diag([1.0, 0.0, 0.0])  # fewer samples than dimensions
    assert frechet_distance(zero, singular, zero, one) == pytest.approx(1 + 3 - 2)


def test_frechet_distance_refuses_what_does_not_fit():
    mu, sigma = gaussian(0, 4)
    with pytest.raises(ValueError, match="do not fit"):
        frechet_distance(mu, sigma, mu[:3], sigma)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(mu * np.nan, sigma, mu, sigma)


def slow_cknna(x, y, k):
    n = len(x)

    def neighbours(features, i):
        products = [(features[i] @ features[j], j) for j in range(n) if j != i]
        return {j for _, j in sorted(products, reverse=True)[:k]}

    def align(a, b):
        total = 0.0
        for i in range(n):
            both = neighbours(a, i) & neighbours(b, i)
            mean_a, mean_b = np.mean(a @ a[i]), np.mean(b @ b[i])
            total += sum((a[i] @ a[j] - mean_a) * (b[i] @ b[j] - mean_b) for j in both)
        return total

    return align(x, y) / np.sqrt(align(x, x) * align(y, y))


def test_cknna_against_its_definition_in_loops():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 8))
    y = x @ rng.standard_normal((8, 5)) + 0.5 * rng.standard_normal((60, 5))
    assert 0.1 < slow_cknna(x, y, 7) < 0.9
    assert cknna(x, y, k=7) == pytest.approx(slow_cknna(x, y, 7), rel=1e-10)


def test_cknna_of_identical_and_of_unrelated_features():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1000, 128)), rng.standard_normal((1000, 128))
    assert cknna(x, x) == pytest.approx(1)
    # The released tool's common mask in the normalisers gives 0.6 and more here.
    assert abs(cknna(x, y)) < 0.03


def test_cknna_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="got"):
        cknna(np.zeros((5, 2)), np.zeros((6, 2)), k=2)
    with pytest.raises(ValueError, match="no 10 neighbours"):
        cknna(np.zeros((5, 2)), np.zeros((5, 2)))
