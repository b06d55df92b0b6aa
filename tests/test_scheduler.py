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
import contextlib
import inspect
import json
import math
import sys

import diffusers
import numpy as np
import pytest
import torch

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler
from erw_hf.pipeline_erw import FLOW_MATCHING_SCHEDULERS, FLOW_SIGMA_SCHEDULERS


def reference_sde(velocity, x, noises, steps, path_type, sigma_last=0.04):
    """Euler-Maruyama of the reverse SDE, written from the score, in float64 (SiT, arXiv 2401.08740, Eq. 5)."""
    grid = torch.linspace(1, sigma_last, steps, dtype=torch.float64).tolist() + [0.0]
    x = x.double()
    for i in range(steps):
        t, dt = grid[i], grid[i + 1] - grid[i]
        if path_type == "linear":
            alpha, sigma, d_alpha, d_sigma = 1 - t, t, -1.0, 1.0
        else:
            alpha, sigma = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
            d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
        v = velocity(x, t)
        ratio = alpha / d_alpha
        score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
        x = x + (v - 0.5 * (2 * t) * score) * dt
        if grid[i + 1] > 0:
            x = x + math.sqrt(2 * t * -dt) * noises[i].double()
    return x


def field(x, t):
    return torch.sin(2 * x) * (1 - t) + 0.5 * x * t - 0.3


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 250])
def test_parity_with_the_reference_sampler(path_type, steps):
    scheduler = FlowMatchEulerMaruyamaScheduler(path_type=path_type)
    scheduler.set_timesteps(steps)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    generator, twin = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    noises = [torch.randn(start.shape, generator=twin) for _ in range(steps - 1)]

    x, calls = start, 0
    for t in scheduler.timesteps:
        calls += 1
        x = scheduler.step(field(x, t.item() / 1000), t, x, generator=generator).prev_sample
    expected = reference_sde(field, start, noises, steps, path_type)
    assert calls == steps
    assert ((x - expected).norm() / expected.norm()).item() < 1e-5
    # Exactly one draw for each stochastic step and none in the last: both generators stand at the same place.
    assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=twin))


def test_grid():
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(250)
    assert len(scheduler.timesteps) == 250 and len(scheduler.sigmas) == 251
    torch.testing.assert_close(scheduler.timesteps, 1000 * torch.linspace(1, 0.04, 250))
    assert scheduler.sigmas[-1] == 0


def test_state_stays_float32_for_a_half_precision_model():
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(4)
    x = torch.randn(1, 1, 4, 4)
    out = scheduler.step(x.bfloat16(), scheduler.timesteps[0], x.bfloat16())
    assert out.prev_sample.dtype == torch.float32


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_predicted_clean_sample(path_type):
    scheduler = FlowMatchEulerMaruyamaScheduler(path_type=path_type)
    scheduler.set_timesteps(10)
    x0, noise = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    t = scheduler.timesteps[4:5]
    x_t = scheduler.scale_noise(x0, t, noise)
    angle = t / 1000 * math.pi / 2
    v = noise - x0 if path_type == "linear" else math.pi / 2 * (torch.cos(angle) * noise - torch.sin(angle) * x0)
    torch.testing.assert_close(scheduler.step(v, t[0], x_t).pred_original_sample, x0, atol=1e-5, rtol=1e-4)


def test_one_generator_an_image_makes_it_independent_of_the_batch():
    def run(seeds):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(5)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = torch.cat([torch.randn(1, 1, 4, 4, generator=g) for g in generators])
        for t in scheduler.timesteps:
            x = scheduler.step(field(x, t.item() / 1000), t, x, generator=generators).prev_sample
        return x

    assert torch.equal(run([3, 7, 11])[1:2], run([7]))


def test_a_run_can_start_in_the_middle():
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(10)
    x = torch.randn(1, 1, 4, 4)
    searched = scheduler.step(x, scheduler.timesteps[6], x, generator=torch.manual_seed(0)).prev_sample
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(6)
    assert scheduler.begin_index == 6 and scheduler.step_index is None
    given = scheduler.step(x, scheduler.timesteps[6], x, generator=torch.manual_seed(0)).prev_sample
    assert scheduler.step_index == 7
    assert torch.equal(searched, given)


def test_config_round_trip(tmp_path):
    FlowMatchEulerMaruyamaScheduler(path_type="cosine", sigma_last=0.1).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["path_type"] == "cosine"
    loaded = FlowMatchEulerMaruyamaScheduler.from_pretrained(tmp_path)
    assert loaded.config.path_type == "cosine" and loaded.config.sigma_last == 0.1
    assert len(loaded) == 1000


def test_errors():
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="path_type"):
        FlowMatchEulerMaruyamaScheduler(path_type="sine")
    with pytest.raises(ValueError, match="sigma_last"):
        FlowMatchEulerMaruyamaScheduler(sigma_last=0.0)
    with pytest.raises(ValueError, match="num_train_timesteps must be at least 1"):
        FlowMatchEulerMaruyamaScheduler(num_train_timesteps=0)
    scheduler = FlowMatchEulerMaruyamaScheduler()
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1000.0, x)
    with pytest.raises(ValueError, match="at least 1"):
        scheduler.set_timesteps(0)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="integer"):
        scheduler.step(x, 0, x)
    with pytest.raises(ValueError, match="not one of this scheduler"):
        scheduler.step(x, 123.0, x)


def reference_heun(velocity, x, steps):
    """Heun's ODE steps on the even grid, the last one Euler's, in float64."""
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    x, calls = x.double(), 0
    for i in range(steps):
        dt, v = grid[i + 1] - grid[i], velocity(x, grid[i])
        ahead, calls = x + v * dt, calls + 1
        if i < steps - 1:
            ahead, calls = x + (v + velocity(ahead, grid[i + 1])) / 2 * dt, calls + 1
        x = ahead
    return x, calls


@pytest.mark.parametrize("steps", [1, 2, 250])
def test_heun_parity_with_the_reference_sampler(steps):
    scheduler = FlowMatchHeunScheduler()
    scheduler.set_timesteps(steps)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = start
    for t in scheduler.timesteps:
        x = scheduler.step(field(x, t.item() / 1000), t, x).prev_sample
    expected, calls = reference_heun(field, start, steps)
    assert len(scheduler.timesteps) == calls == 2 * steps - 1
    assert ((x - expected).norm() / expected.norm()).item() < 1e-5


def test_heun_converges_faster_than_its_first_order_half():
    start = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    exact, _ = reference_heun(field, start, 4000)
    errors = [(reference_heun(field, start, steps)[0] - exact).norm().item() for steps in (10, 20, 40)]
    scheduler = FlowMatchHeunScheduler()
    for steps, expected in zip((10, 20, 40), errors, strict=True):
        scheduler.set_timesteps(steps)
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(field(x, t.item() / 1000), t, x, return_dict=False)[0]
        assert (x - exact).norm().item() == pytest.approx(expected, rel=0.05, abs=2e-5)
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]


def test_heun_errors_and_preview():
    with pytest.raises(ValueError, match="path_type"):
        FlowMatchHeunScheduler(path_type="sine")
    scheduler = FlowMatchHeunScheduler()
    scheduler.set_timesteps(4)
    x0, noise = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    x = noise
    for t in scheduler.timesteps:  # along a straight path every preview is the end
        output = scheduler.step(noise - x0, t, x)
        torch.testing.assert_close(output.pred_original_sample, x0, atol=1e-5, rtol=1e-4)
        x = output.prev_sample
    torch.testing.assert_close(x, x0, atol=1e-5, rtol=1e-4)


def test_heun_starts_in_the_middle_and_anew_after_a_run_that_stopped_between_two_calls():
    scheduler = FlowMatchHeunScheduler()
    scheduler.set_timesteps(4)
    x = torch.randn(1, 1, 4, 4)
    assert scheduler.timesteps[1] == scheduler.timesteps[2]  # the end of a step and the start of the next
    assert [scheduler.index_for_timestep(scheduler.timesteps[i]) for i in range(7)] == [0, 2, 2, 4, 4, 6, 6]
    first = scheduler.step(x, scheduler.timesteps[2], x).prev_sample
    torch.testing.assert_close(first, x - x / 4)  # a prediction
    assert scheduler.step_index == 3
    scheduler.set_timesteps(4)
    velocity, other = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    anew = scheduler.step(velocity, scheduler.timesteps[0], other).prev_sample
    torch.testing.assert_close(anew, other - velocity / 4)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler])
@pytest.mark.parametrize(
    ("steps", "message"), [(2.0, "float"), (True, "bool"), ("3", "str"), (None, "NoneType"), (-1, "at least 1")]
)
def test_steps_are_whole_numbers(scheduler, steps, message):
    with pytest.raises(ValueError, match=message):
        scheduler().set_timesteps(steps)
    scheduler().set_timesteps(np.int64(3))


# Which schedulers draw right: Gaussian data, whose velocity is known. The ODE maps noise e to mean + std e.

MEAN, STD = 0.3, 0.5


def gaussian_velocity(x, t):
    alpha, variance = 1 - t, (1 - t) ** 2 * STD**2 + t**2
    centred = x - alpha * MEAN
    return t / variance * centred - (MEAN + alpha * STD**2 / variance * centred)


class GaussianModel(torch.nn.Module):
    """In place of a transformer: the exact velocity of that data."""

    device, dtype = torch.device("cpu"), torch.float32
    config = ERWTransformer2DModel(sample_size=32, in_channels=1, num_layers=0).config

    def cache_context(self, name):
        return contextlib.nullcontext()

    def forward(self, latents, timestep, **kwargs):
        return (gaussian_velocity(latents, timestep.reshape(-1, 1, 1, 1)),)


def draws_right(scheduler) -> bool:
    pipe = ERWPipeline(None, None, FlowMatchEulerMaruyamaScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer, pipe.scheduler = GaussianModel(), scheduler
    noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images = pipe(
        [0] * 4, num_inference_steps=100, guidance_scale=1.0, latents=noise, output_type="latent",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    exact = MEAN + STD * noise
    as_ode = (images - exact).norm() / exact.norm() < 0.03
    as_sde = abs(images.mean() - exact.mean()) < 0.03 and abs(images.std() / exact.std() - 1) < 0.05
    return bool(as_ode or as_sde)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OPTIONS = [
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "invert_sigmas",
    "stochastic_sampling", "thresholding", "use_dynamic_shifting",
]  # fmt: skip
ALL = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))


def made(name, **options):
    """The scheduler as a user makes it of ours, or `None` where it cannot be made so."""
    scheduler = getattr(diffusers, name)
    if not set(options) <= set(inspect.signature(scheduler.__init__).parameters):
        return None
    try:
        return scheduler.from_config(FlowMatchEulerMaruyamaScheduler().config, **options)
    except (AttributeError, ImportError, NotImplementedError, TypeError, ValueError):
        return None


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("flow", [{}, FLOW])
def test_a_scheduler_of_diffusers_draws_right_or_is_refused(name, flow):
    for options in [{}, *({option: True} for option in OPTIONS)]:
        scheduler = made(name, **flow, **options)
        if scheduler is not None:
            try:
                assert draws_right(scheduler), options
            except ValueError as error:
                assert "scheduler" in str(error).lower(), error
                assert options or name not in ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
                assert options or not flow or name not in FLOW_SIGMA_SCHEDULERS


@pytest.mark.parametrize(
    "name", [*FLOW_MATCHING_SCHEDULERS, *FLOW_SIGMA_SCHEDULERS, "DEISMultistepScheduler", "SASolverScheduler"]
)
def test_no_noise_is_left_in_the_picture_or_the_scheduler_is_refused(name, monkeypatch):
    """Data of one value, which the last step reaches from wherever it begins."""
    monkeypatch.setattr(sys.modules[__name__], "STD", 0.0)
    pipe = ERWPipeline(GaussianModel(), None, FlowMatchEulerMaruyamaScheduler())
    pipe.set_progress_bar_config(disable=True)
    options = {
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "data_prediction", "noise_prediction"],
        "final_sigmas_type": ["sigma_min"], "lower_order_final": [False], "predict_x0": [False], "euler_at_final": [True],
        "solver_type": ["midpoint", "heun", "bh1", "bh2"], "solver_order": [1, 3], "shift": [3.0], "flow_shift": [3.0],
    }  # fmt: skip
    drawn = 0
    for one in [{}, *({option: value} for option, values in options.items() for value in values)]:
        scheduler = made(name, **(FLOW if name not in FLOW_MATCHING_SCHEDULERS else {}), **one)
        if scheduler is None:
            continue
        pipe.scheduler = scheduler
        try:
            images = pipe([0], num_inference_steps=10, guidance_scale=1.0, output_type="latent").images
        except ValueError as error:
            assert "NaN" not in str(error), one
            continue
        drawn += 1
        torch.testing.assert_close(images, torch.full_like(images, MEAN), atol=1e-4, rtol=0)
    assert (drawn > 1) == (name in FLOW_MATCHING_SCHEDULERS + FLOW_SIGMA_SCHEDULERS)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler])
def test_what_is_called_compatible_draws_right_and_so_do_we(scheduler):
    assert draws_right(scheduler())
    compatibles = scheduler().compatibles
    assert {one.__name__ for one in compatibles} == set(FLOW_MATCHING_SCHEDULERS)
    for one in compatibles:
        assert draws_right(one.from_config(scheduler().config))


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_the_last_step_leaves_some_noise_as_published_or_none(path_type):
    """By a perfect model of one picture."""
    picture = torch.full((4, 1, 16, 16), 0.3, dtype=torch.float64)

    def left(last_step):
        scheduler = FlowMatchEulerMaruyamaScheduler(path_type=path_type, last_step=last_step)
        scheduler.set_timesteps(250)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(picture.shape, generator=generator)
        for t, time in zip(scheduler.sigmas[:-1].tolist(), scheduler.timesteps, strict=True):
            alpha, sigma, d_alpha, d_sigma = (1 - t, t, -1, 1)
            if path_type == "cosine":
                alpha, sigma = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
                d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
            velocity = d_alpha * picture + d_sigma * (x.double() - alpha * picture) / sigma
            x = scheduler.step(velocity.float(), time, x, generator=generator).prev_sample
        return (x - picture).std().item()

    assert 0.02 < left("mean") < 0.08
    assert left("tweedie") < 1e-4
    assert FlowMatchEulerMaruyamaScheduler().config.last_step == "mean"
    with pytest.raises(ValueError, match="last_step must be"):
        FlowMatchEulerMaruyamaScheduler(last_step="euler")


@pytest.mark.parametrize("scheduler", [FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler])
def test_times_are_set_whatever_torchs_default_device_is(scheduler):
    """Without values there, as on the meta device, or without float64, as on Apple's."""
    with torch.device("meta"):
        made = scheduler()
        made.set_timesteps(4, device="cpu")
    assert made.sigmas.device.type == "cpu" and made.timesteps[0] == 1000
