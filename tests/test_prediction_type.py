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
"""A network that predicts the clean sample (JiT, arXiv 2511.13720): the model's velocity, the loss, sampling, a run."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from helpers import TINY_MODEL, randomize, train

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler
from erw_hf.flow import sample_loss_weight
from erw_hf.hub.cards import run_card
from erw_hf.objective import AlignedTransformer, Batch, Objective
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.initialization import load_warmup, save_warmup
from erw_hf.trainer.run_record import read_metrics
from erw_hf.transformer_erw import MIN_TIME, velocity_from_sample
from erw_hf.warmup import build_warmup_transformer


TIMES = [1e-4, 5e-4, 1e-3, 4e-3, 0.02, 0.05, 0.3, 0.7, 0.999, 1.0]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def twins(**changes) -> tuple[ERWTransformer2DModel, ERWTransformer2DModel]:
    """One network, read as the velocity and as the clean sample."""
    network = randomize(ERWTransformer2DModel(**{**TINY_MODEL, **changes})).eval()
    model = ERWTransformer2DModel(**{**TINY_MODEL, **changes, "prediction_type": "sample"}).eval()
    model.load_state_dict(network.state_dict())
    return network, model


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, 8, 8, generator=generator)
    return x, torch.tensor([1e-3, 0.3, 1.0])[:batch], torch.arange(batch)


# The conversion


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", TIMES)
def test_the_velocity_and_its_gradient_against_closed_forms(t, dtype):
    generator = torch.Generator().manual_seed(0)
    x_t, sample = (torch.randn(2, 3, 4, 4, generator=generator).to(dtype) for _ in range(2))
    sample.requires_grad_()
    velocity = velocity_from_sample(x_t, sample, torch.full((2,), t))
    divisor = max(t, MIN_TIME)
    assert velocity.dtype == dtype
    closed = (x_t.double() - sample.detach().double()) / divisor  # in float64, of what the tensors really hold
    torch.testing.assert_close(velocity.double(), closed, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    velocity.sum().backward()
    expected = torch.full_like(sample, -1 / divisor)
    torch.testing.assert_close(sample.grad, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("t", [t for t in TIMES if t >= MIN_TIME])
def test_of_the_true_sample_it_is_the_velocity_of_the_path(t):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    velocity = velocity_from_sample((1 - t) * x0 + t * noise, x0, torch.full((2,), t))
    torch.testing.assert_close(velocity, noise - x0, rtol=0, atol=1e-6 / t)  # float32's rounding of x_t, over t


def test_every_sample_has_its_own_time_and_zero_divides_nothing():
    x_t, sample = torch.ones(3, 2), torch.zeros(3, 2)
    velocity = velocity_from_sample(x_t, sample, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(velocity[:, 0], torch.tensor([1 / MIN_TIME, 2.0, 1.0]))


# The model


@pytest.mark.parametrize("class_token_dim", [None, 6])
def test_the_model_returns_the_velocity_whatever_its_network_predicts(class_token_dim):
    network, model = twins(class_token_dim=class_token_dim)
    x, t, labels = inputs()
    token = None if class_token_dim is None else torch.randn(3, class_token_dim)
    predicted = network(x, t, labels, class_token=token, hidden_states_depths=(2,))
    output = model(x, t, labels, class_token=token, hidden_states_depths=(2,))
    torch.testing.assert_close(output.sample, (x - predicted.sample) / t.view(3, 1, 1, 1))
    torch.testing.assert_close(output.hidden_states[0], predicted.hidden_states[0])
    if token is not None:
        torch.testing.assert_close(output.class_token, (token - predicted.class_token) / t.view(3, 1))
    tokens = model(x, t, labels, class_token=token, hidden_states_depths=(2,), tokens_only=True)
    assert tokens.sample is None and tokens.class_token is None


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_only_the_network_is_of_low_precision(autocast):
    network, model = twins()
    x, t, labels = inputs()
    if not autocast:
        network, model, x = network.bfloat16(), model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predicted, velocity = network(x, t, labels).sample, model(x, t, labels).sample
    assert velocity.dtype == predicted.dtype == torch.bfloat16
    expected = ((x.float() - predicted.float()) / t.view(3, 1, 1, 1)).bfloat16()
    assert torch.equal(velocity, expected)


def test_a_fresh_model_predicts_a_grey_sample():
    model = ERWTransformer2DModel(**TINY_MODEL, prediction_type="sample").eval()
    x, t, labels = inputs()
    torch.testing.assert_close(model(x, t, labels).sample, x / t.view(3, 1, 1, 1))


def test_unknown_predictions_are_refused():
    with pytest.raises(ValueError, match='prediction_type must be "velocity" or "sample", got \'epsilon\''):
        ERWTransformer2DModel(**TINY_MODEL, prediction_type="epsilon")


# The loss


def model_and_batch() -> tuple[AlignedTransformer, Batch, ERWTransformer2DModel, torch.Tensor]:
    """The model, a batch, the network alone and x_t."""
    network, model = twins()
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(4, 1, 8, 8, generator=generator), torch.randn(4, 1, 8, 8, generator=generator)
    t = torch.tensor([MIN_TIME, 0.02, 0.3, 1.0])
    batch = Batch(x0=x0, noise=noise, t=t, class_labels=torch.arange(4), drop=torch.zeros(4))
    x_t = (1 - t.view(4, 1, 1, 1)) * x0 + t.view(4, 1, 1, 1) * noise
    return AlignedTransformer(model, [], 2), batch, network, x_t


def test_the_loss_and_its_gradient_are_those_of_jit():
    model, batch, network, x_t = model_and_batch()
    predicted = network(x_t, batch.t, batch.class_labels).sample
    losses = Objective(prediction_type="sample").full_loss(model, batch, 0.0)
    squares = (predicted - batch.x0).square().mean(dim=(1, 2, 3)) / batch.t.clamp(min=0.05).square()
    torch.testing.assert_close(losses.terms["velocity"].value, squares.mean(), rtol=1e-4, atol=0)
    losses.loss.backward()
    squares.mean().backward()
    torch.testing.assert_close(
        model.transformer.proj_out.weight.grad, network.proj_out.weight.grad, rtol=1e-3, atol=1e-3
    )


def test_the_contrastive_term_is_weighted_alike():
    model, batch, network, x_t = model_and_batch()
    predicted = network(x_t, batch.t, batch.class_labels).sample
    losses = Objective(prediction_type="sample", contrastive_weight=0.05).full_loss(model, batch, 0.0)
    velocity = (x_t - predicted) / batch.t.view(4, 1, 1, 1)
    squares = (velocity - (batch.noise - batch.x0).roll(1, dims=0)).square().mean(dim=(1, 2, 3))
    expected = (squares * sample_loss_weight(batch.t)).mean()
    torch.testing.assert_close(losses.terms["contrastive"].value, expected, rtol=1e-4, atol=0)


def test_times_of_training_are_those_at_which_the_model_has_a_velocity():
    normal = torch.tensor([-8.0, -3.0, 0.0])
    t = Objective(prediction_type="sample").flow_time(normal)
    torch.testing.assert_close(t, torch.tensor([MIN_TIME, math.erfc(3 / 2**0.5) / 2, 0.5]))
    assert Objective().flow_time(normal)[0] < MIN_TIME
    weights = sample_loss_weight(torch.tensor([0.0, MIN_TIME, 0.025, 0.05, 1.0]))
    torch.testing.assert_close(weights, torch.tensor([0.0, 4e-4, 0.25, 1.0, 1.0]))


# Configuration and components


def test_the_cosine_path_is_refused():
    with pytest.raises(ValueError, match='prediction_type "sample" needs path_type "linear"'):
        TrainingConfig(prediction_type="sample", path_type="cosine")
    network, model = twins()
    for models in ((model, None), (network, model)):
        with pytest.raises(ValueError, match="the scheduler steps along the cosine one"):
            ERWPipeline(models[0], None, FlowMatchHeunScheduler(path_type="cosine"), guidance_transformer=models[1])
    assert TrainingConfig(prediction_type="sample", in_channels=3).model_config(10)["prediction_type"] == "sample"


def test_models_of_both_predictions_guide_each_other():
    network, model = twins()
    pipe = ERWPipeline(model, None, FlowMatchHeunScheduler(), guidance_transformer=network)
    pipe.set_progress_bar_config(disable=True)
    guided, plain = (pipe(3, 1, 4, w, generator=torch.manual_seed(0), output_type="latent").images for w in (1.5, 1.0))
    assert not torch.allclose(guided, plain)


def test_a_warmup_serves_both_predictions(tmp_path):
    config = {**TINY_MODEL, "class_token_dim": None}
    warmup = AlignedTransformer(build_warmup_transformer(config, 2), [], 2, warmup=True)
    save_warmup(warmup.state_dict(), config, 2, tmp_path)
    assert load_warmup(str(tmp_path), {**config, "prediction_type": "sample"})


# A run, and every scheduler


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_flags):
    folder = tmp_path_factory.mktemp("sample") / "run"
    flags = ["--prediction_type=sample", "--timestep_distribution=logit_normal", "--timestep_logit_mean=0.8",
             "--timestep_logit_std=0.8", "--learning_rate=1e-2", "--max_train_steps=40"]  # fmt: skip
    train(*tiny_flags, *flags, f"--output_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def trained(run):
    """The run's pipeline and its network: what predicts the clean sample."""
    pipe = ERWPipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer
    assert model.config.prediction_type == "sample"
    network = ERWTransformer2DModel(**{**model.config, "prediction_type": "velocity"}).eval()
    network.load_state_dict(model.state_dict())
    return pipe, network


def test_a_run_learns_and_names_its_prediction(run):
    losses = [record["velocity"] for record in read_metrics(run / "metrics.jsonl") if record["phase"] == "full"]
    assert len(losses) == 37 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    card = run_card(run, "user/tiny")
    for row in ("`prediction_type` | sample", "`timestep_distribution` | logit_normal", "`timestep_logit_mean` | 0.8"):
        assert f"| {row} |" in card.text, row


def test_the_pipeline_loads_three_ways(run, trained):
    pipe, _ = trained
    folder = run / "pipeline"
    remote = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    remote.set_progress_bar_config(disable=True)
    alone = ERWTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    x, t, labels = inputs()
    assert torch.equal(alone(x, t, labels).sample, pipe.transformer(x, t, labels).sample)
    images = [one(3, 1, 4, generator=torch.manual_seed(0), output_type="np").images for one in (pipe, remote)]
    np.testing.assert_array_equal(*images)


def even_grid(steps: int) -> list[float]:
    return [1 - i / steps for i in range(steps)] + [0.0]


def plain_loop(predict, x: torch.Tensor, scheduler, steps: int) -> torch.Tensor:
    """The sampler written out for a network that predicts the clean sample: its grid, `(x - sample) / t`, its steps."""
    kind = type(scheduler)
    generator = torch.manual_seed(1)
    if kind in (FlowMatchEulerDiscreteScheduler, FlowMatchEulerMaruyamaScheduler):
        grid = even_grid(steps)
        if kind is FlowMatchEulerMaruyamaScheduler:
            grid = [1 + (0.04 - 1) * i / (steps - 1) for i in range(steps)] + [0.0]
        for t, t_next in zip(grid, grid[1:], strict=False):
            v = (x - predict(x, t)) / t
            if kind is FlowMatchEulerDiscreteScheduler:
                x = x + (t_next - t) * v
                continue
            score = -(x + (1 - t) * v) / t
            x = x + (v - t * score) * (t_next - t)
            if t_next > 0:
                x = x + math.sqrt(2 * t * (t - t_next)) * torch.randn(x.shape, generator=generator)
        return x
    if kind in (FlowMatchHeunScheduler, FlowMatchHeunDiscreteScheduler):
        grid = even_grid(steps)  # diffusers' own would go to 1 / 1000 before 0, where errors grow a thousandfold
        for t, t_next in zip(grid, grid[1:], strict=False):
            v = (x - predict(x, t)) / t
            ahead = x + (t_next - t) * v
            if t_next > 0:
                v = (v + (ahead - predict(ahead, t_next)) / t_next) / 2
            x = x + (t_next - t) * v
        return x
    if kind is UniPCMultistepScheduler:  # takes a grid
        scheduler.set_timesteps(sigmas=np.array(even_grid(steps)[:-1]))
    else:
        scheduler.set_timesteps(steps)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        x = scheduler.step((x - predict(x, sigma)) / sigma, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [10, 25, 50])
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerMaruyamaScheduler(),
        FlowMatchHeunScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(**FLOW),
        UniPCMultistepScheduler(**FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_every_scheduler_agrees_with_a_plain_loop(trained, scheduler, steps):
    pipe, network = trained
    pipe.scheduler = scheduler
    labels = torch.tensor([3, 7])
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        return network(x, torch.full((2,), t), labels).sample

    kwargs = {"generator": torch.manual_seed(1)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    images = pipe(
        labels, num_inference_steps=steps, guidance_scale=1.0, latents=noise, output_type="latent", **kwargs
    ).images
    with torch.no_grad():
        expected = plain_loop(predict, noise, copy.deepcopy(scheduler), steps)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


def test_pictures_of_few_steps_are_those_of_many(trained):
    """diffusers' two at 10, 25 and 50 steps, against 200 of ours: the more steps, the nearer."""
    pipe, _ = trained
    noise = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def draw(scheduler, steps: int) -> torch.Tensor:
        pipe.scheduler = scheduler
        labels = list(range(8))
        return pipe(labels, 1, steps, 1.0, latents=noise, output_type="latent").images

    exact = draw(FlowMatchHeunScheduler(), 200)
    for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler):
        errors = [(draw(kind(), steps) - exact).abs().mean().item() for steps in (10, 25, 50)]
        assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02, (kind.__name__, errors)
