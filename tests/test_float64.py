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
"""Apple's GPUs and some others have no float64: nothing makes one there."""

import numpy as np
import pytest
import torch
from devices import DEVICE, DeviceWithoutFloat64
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ModularPipelineBlocks, UniPCMultistepScheduler
from helpers import REPOSITORY, TINY_MODEL, randomize

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler
from erw_hf.alignment import cosine_alignment_loss
from erw_hf.data.latents import pixels_to_latents
from erw_hf.evaluation.feature_statistics import FeatureStatistics
from erw_hf.evaluation.probes import ProbeImages, probe_blocks


SCHEDULERS = [
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchHeunScheduler,
    FlowMatchEulerDiscreteScheduler,
    lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
]


def test_the_device_refuses_float64():
    with DeviceWithoutFloat64():
        for make in (
            lambda: torch.zeros(1, device=DEVICE).double(),
            lambda: torch.zeros(1, dtype=torch.float64).to(DEVICE),
            lambda: torch.zeros(1, dtype=torch.float64, device=DEVICE),
            lambda: torch.tensor([0.5], dtype=torch.float64, device=DEVICE),
        ):
            with pytest.raises(TypeError, match="float64"):
                make()
        assert torch.zeros(1, device=DEVICE).cpu().double().dtype == torch.float64


def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=1, latents_mean=[0.5], latents_std=[2.0],
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("config", [{}, {"class_token_dim": 6, "use_rope": True, "qk_norm": "rms_norm"}])
def test_a_pipeline_draws_there(scheduler, config):
    pipe = ERWPipeline(randomize(ERWTransformer2DModel(**TINY_MODEL, **config)).eval(), vae(), scheduler())
    pipe.set_progress_bar_config(disable=True)

    def draw(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return pipe([3, 5], num_inference_steps=3, generator=generator, output_type="np", **kwargs).images

    expected = draw(), draw(latents=torch.ones(2, 1, 8, 8))
    with DeviceWithoutFloat64():
        pipe.to(DEVICE)
        assert pipe.device == DEVICE
        np.testing.assert_allclose(draw(), expected[0], atol=1e-3)
        np.testing.assert_allclose(draw(latents=torch.ones(2, 1, 8, 8, device=DEVICE)), expected[1], atol=1e-3)


def test_modular_blocks_draw_there(transformer):
    blocks = ModularPipelineBlocks.from_pretrained(REPOSITORY / "pipelines" / "modular_erw", trust_remote_code=True)
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=transformer, scheduler=FlowMatchEulerMaruyamaScheduler(), vae=None)
    with DeviceWithoutFloat64():
        pipe.to(DEVICE)
        generator = torch.Generator().manual_seed(0)
        images = pipe(class_labels=[3], num_inference_steps=3, generator=generator, output_type="np").images
    assert images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize("config", [{}, {"class_token_dim": 6, "use_rope": True}])
def test_a_model_is_built_there(config):
    expected = ERWTransformer2DModel(**TINY_MODEL, **config)
    with DeviceWithoutFloat64():
        with DEVICE:
            model = ERWTransformer2DModel(**TINY_MODEL, **config)
        assert {buffer.device for buffer in model.buffers()} == {DEVICE}
        for (name, buffer), other in zip(model.named_buffers(), expected.buffers(), strict=True):
            np.testing.assert_allclose(buffer.tolist(), other.tolist(), atol=1e-6, err_msg=name)


def test_latents_and_losses_are_made_there():
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    autoencoder = vae()
    expected = pixels_to_latents(pixels, autoencoder)
    tokens = torch.randn(2, 4, 6)
    with DeviceWithoutFloat64(), torch.no_grad():
        latents = pixels_to_latents(pixels.to(DEVICE), autoencoder.to(DEVICE))
        np.testing.assert_allclose(latents.tolist(), expected.tolist(), atol=1e-4)
        assert abs(float(cosine_alignment_loss(tokens.to(DEVICE), tokens.to(DEVICE)).mean())) <= 1


def test_statistics_of_features_that_lie_there():
    features = torch.randn(8, 4)
    expected, moved = FeatureStatistics(4), FeatureStatistics(4)
    expected.update(features)
    with DeviceWithoutFloat64():
        moved.update(features.to(DEVICE))
    assert torch.equal(moved.sum, expected.sum) and torch.equal(moved.products, expected.products)


def test_tensors_of_two_devices_do_not_mix():
    with DeviceWithoutFloat64(), pytest.raises(RuntimeError, match="and on the CPU"):
        torch.zeros(2, device=DEVICE) + torch.zeros(2)


def test_blocks_are_probed_there(transformer):
    rng = torch.Generator().manual_seed(0)
    images = ProbeImages(
        torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=rng), torch.arange(12) % 3, noise_seed=0
    )
    expected = probe_blocks(transformer, images, images, times=(0.5,))
    with DeviceWithoutFloat64():
        assert probe_blocks(transformer.to(DEVICE), images, images, times=(0.5,)) == expected
