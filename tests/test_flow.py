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
import math

import pytest
import torch

from erw_hf.flow import interpolate, path_coefficients, timestep_from_normal


def test_linear_path_by_hand():
    x0, noise = torch.tensor([[[[2.0]]]]), torch.tensor([[[[-1.0]]]])
    x_t, velocity = interpolate(x0, noise, torch.tensor([0.25]))
    assert x_t.item() == pytest.approx(0.75 * 2.0 + 0.25 * -1.0)
    assert velocity.item() == pytest.approx(-1.0 - 2.0)


def test_cosine_path_by_hand():
    x0, noise = torch.tensor([[[[2.0]]]]), torch.tensor([[[[-1.0]]]])
    x_t, velocity = interpolate(x0, noise, torch.tensor([1 / 3]), "cosine")
    assert x_t.item() == pytest.approx(math.cos(math.pi / 6) * 2.0 - math.sin(math.pi / 6))
    assert velocity.item() == pytest.approx(
        math.pi / 2 * (-math.sin(math.pi / 6) * 2.0 - math.cos(math.pi / 6)), rel=1e-6
    )


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_path_runs_from_data_to_noise_and_derivatives_are_its_own(path_type):
    alpha, sigma, _, _ = path_coefficients(torch.tensor([0.0, 1.0]), path_type)
    torch.testing.assert_close(alpha, torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(sigma, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    step = 1e-6
    ahead, behind = path_coefficients(t + step, path_type), path_coefficients(t - step, path_type)
    _, _, d_alpha, d_sigma = path_coefficients(t, path_type)
    torch.testing.assert_close((ahead[0] - behind[0]) / (2 * step), d_alpha, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close((ahead[1] - behind[1]) / (2 * step), d_sigma, atol=1e-6, rtol=1e-6)


def test_every_sample_has_its_own_time():
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0.0, 0.5, 1.0])
    x_t, _ = interpolate(x0, noise, t)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], (x0[1] + noise[1]) / 2)
    torch.testing.assert_close(x_t[2], noise[2])


def test_distributions_of_t():
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniform = timestep_from_normal(normal)
    quantiles = torch.quantile(uniform, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), atol=5e-3, rtol=0)
    logit = torch.logit(timestep_from_normal(normal, "logit_normal", logit_mean=0.5, logit_std=2.0))
    assert logit.mean().item() == pytest.approx(0.5, abs=0.02)
    assert logit.std().item() == pytest.approx(2.0, abs=0.02)
    shifted = timestep_from_normal(torch.tensor([0.0]), shift=3.0)
    assert shifted.item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


def test_unknown_names_raise():
    with pytest.raises(ValueError, match="path_type"):
        path_coefficients(torch.tensor([0.5]), "quadratic")
    with pytest.raises(ValueError, match="distribution"):
        timestep_from_normal(torch.tensor([0.5]), "beta")
