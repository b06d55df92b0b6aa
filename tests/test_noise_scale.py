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
"""Noise of deviation s beside the data is the same as data divided by s: against JiT's form, x_t = (1 - t) x_0 + t s e."""

import numpy as np
import pytest
import torch
from diffusers import ModularPipelineBlocks
from helpers import REPOSITORY, TINY_MODEL, randomize, train
from test_modular import modular

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchHeunScheduler
from erw_hf.data.source import load_source
from erw_hf.evaluation.probes import block_features, load_probe_images
from erw_hf.flow import sample_loss_weight
from erw_hf.hub.cards import run_card
from erw_hf.objective import AlignedTransformer, Batch, Objective


SCALES = [2.0, 0.5, 3.0]


def twins(noise_scale: float, prediction_type: str) -> tuple[ERWTransformer2DModel, ERWTransformer2DModel]:
    """One network: bare, and as the model whose noise has that scale."""
    network = randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()
    model = ERWTransformer2DModel(**TINY_MODEL, prediction_type=prediction_type, noise_scale=noise_scale).eval()
    model.load_state_dict(network.state_dict())
    return network, model


def batch_of(scale: float) -> tuple[Batch, torch.Tensor]:
    """What a run makes of four images, and those images."""
    generator = torch.Generator().manual_seed(1)
    images, noise = torch.randn(4, 1, 8, 8, generator=generator), torch.randn(4, 1, 8, 8, generator=generator)
    t = torch.tensor([0.01, 0.2, 0.6, 1.0])
    return Batch(x0=images / scale, noise=noise, t=t, class_labels=torch.arange(4), drop=torch.zeros(4)), images


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_loss_and_gradient_are_those_of_noise_beside_the_data(prediction_type, scale):
    network, model = twins(scale, prediction_type)
    batch, images = batch_of(scale)
    t = batch.t.view(4, 1, 1, 1)
    x_t = (1 - t) * images + t * scale * batch.noise
    predicted = network(x_t, batch.t, batch.class_labels).sample
    velocity = predicted if prediction_type == "velocity" else (x_t - predicted) / t
    squares = (velocity - (scale * batch.noise - images)).square().mean(dim=(1, 2, 3))
    explicit = (squares * (sample_loss_weight(batch.t) if prediction_type == "sample" else 1)).mean() / scale**2

    losses = Objective(prediction_type=prediction_type).full_loss(AlignedTransformer(model, [], 2), batch, 0.0)
    torch.testing.assert_close(losses.terms["velocity"].value, explicit, rtol=1e-4, atol=0)
    losses.loss.backward()
    explicit.backward()
    for ours, theirs in zip(model.parameters(), network.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_pictures_are_those_of_a_loop_whose_noise_has_the_scale(prediction_type, scale, tmp_path):
    network, model = twins(scale, prediction_type)
    labels, noise = torch.tensor([3, 7]), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x, grid = scale * noise, [1 - i / 6 for i in range(7)]

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        predicted = network(x, torch.full((2,), t), labels).sample
        return predicted if prediction_type == "velocity" else (x - predicted) / t

    with torch.no_grad():
        for t, t_next in zip(grid, grid[1:], strict=False):  # Heun
            v = velocity(x, t)
            if t_next > 0.01:
                v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
            x = x + (t_next - t) * v
    expected = (x / 2 + 0.5).clamp(0, 1)

    ERWPipeline(model, None, FlowMatchHeunScheduler()).save_pretrained(tmp_path)
    pipe = ERWPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(labels, 1, 6, guidance_scale=1.0, latents=noise, output_type="pt").images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


def test_modular_blocks_know_the_scale():
    blocks = ModularPipelineBlocks.from_pretrained(REPOSITORY / "pipelines" / "modular_erw", trust_remote_code=True)
    _, model = twins(2.0, "sample")
    pipe = ERWPipeline(model, None, FlowMatchHeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    blocks = modular(blocks, model, FlowMatchHeunScheduler())
    for output_type in ("np", "latent"):
        kwargs = {"class_labels": [3, 7], "num_inference_steps": 3, "output_type": output_type}
        images = blocks(**kwargs, generator=torch.manual_seed(0)).images
        expected = pipe(**kwargs, guidance_interval=(0.0, 1.0), generator=torch.manual_seed(0)).images
        np.testing.assert_array_equal(images, expected)


def test_a_run_keeps_its_scale(tiny_flags, tmp_path):
    """In its pipeline, card and probes; the images that it learned from are those of another scale."""
    train(*tiny_flags, "--noise_scale=2", "--max_train_steps=4", f"--output_dir={tmp_path}/run")
    pipe = ERWPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.transformer.config.noise_scale == 2
    assert "| `noise_scale` | 2.0 |" in run_card(tmp_path / "run", "user/tiny").text

    plain = ERWTransformer2DModel(**{**pipe.transformer.config, "noise_scale": 1.0}).eval()
    plain.load_state_dict(pipe.transformer.state_dict())
    images = load_probe_images(load_source("digits", "test"), 4, 8, 1, seed=0)
    clean = [block_features(model, images, 0.0) for model in (pipe.transformer, plain)]
    torch.testing.assert_close(*clean)  # without noise there is none to scale
    noised = [block_features(model, images, 0.5) for model in (pipe.transformer, plain)]
    assert not torch.allclose(*noised)


def test_scales_that_do_not_fit_are_refused():
    _, model = twins(2.0, "sample")
    _, other = twins(1.0, "sample")
    with pytest.raises(ValueError, match=r"guidance_transformer has noise_scale=1.0, the transformer 2.0"):
        ERWPipeline(model, None, FlowMatchHeunScheduler(), guidance_transformer=other)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="noise_scale must be above 0"):
            ERWTransformer2DModel(**TINY_MODEL, noise_scale=scale)
