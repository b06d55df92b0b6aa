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
import threading

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    LayerSkipConfig,
    ModularPipelineBlocks,
    UniPCMultistepScheduler,
)
from diffusers.guiders import AdaptiveProjectedGuidance, AutoGuidance, ClassifierFreeGuidance, SkipLayerGuidance
from helpers import REPOSITORY, TINY_MODEL, randomize

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler


@pytest.fixture(scope="module")
def blocks():
    return ModularPipelineBlocks.from_pretrained(REPOSITORY / "pipelines" / "modular_erw", trust_remote_code=True)


def modular(blocks, transformer, scheduler, guider=None):
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=transformer, scheduler=scheduler, vae=None)
    if guider is not None:
        pipe.update_components(guider=guider)
    return pipe


@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler, FlowMatchEulerDiscreteScheduler]
)
def test_bit_identical_to_the_standard_pipeline(blocks, transformer, scheduler):
    standard = ERWPipeline(transformer, None, scheduler())
    standard.set_progress_bar_config(disable=True)
    kwargs = {"class_labels": [3, 7], "num_inference_steps": 6, "output_type": "np"}
    for scale in (1.0, 1.8):
        expected = standard(
            **kwargs, guidance_scale=scale, guidance_interval=(0.0, 1.0), generator=torch.manual_seed(0)
        ).images
        pipe = modular(blocks, transformer, scheduler(), ClassifierFreeGuidance(guidance_scale=scale))
        images = pipe(**kwargs, generator=torch.manual_seed(0)).images
        np.testing.assert_array_equal(images, expected)


def test_interval_as_fractions_of_the_steps(blocks, transformer):
    standard = ERWPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler())
    standard.set_progress_bar_config(disable=True)
    kwargs = {"class_labels": [3, 7], "num_inference_steps": 10, "output_type": "np"}
    expected = standard(**kwargs, guidance_interval=(0.0, 0.7), generator=torch.manual_seed(0)).images
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(10)
    first = int((scheduler.timesteps <= 700).nonzero()[0])
    guider = ClassifierFreeGuidance(guidance_scale=1.8, start=first / 10)
    images = modular(blocks, transformer, scheduler, guider)(**kwargs, generator=torch.manual_seed(0)).images
    np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize(
    "guider",
    [
        lambda: AdaptiveProjectedGuidance(guidance_scale=3.0),
        lambda: SkipLayerGuidance(guidance_scale=2.0, skip_layer_guidance_layers=[1], skip_layer_guidance_start=0.0),
        lambda: AutoGuidance(
            guidance_scale=2.0, auto_guidance_config=LayerSkipConfig([1], fqn="transformer_blocks"), start=0.0
        ),
    ],
)
def test_other_guiders_work_and_differ(blocks, transformer, guider):
    kwargs = {"class_labels": [3], "num_inference_steps": 4, "output_type": "np"}
    plain = modular(blocks, transformer, FlowMatchEulerMaruyamaScheduler(), ClassifierFreeGuidance(guidance_scale=1.0))
    guided = modular(blocks, transformer, FlowMatchEulerMaruyamaScheduler(), guider())
    expected = plain(**kwargs, generator=torch.manual_seed(0)).images
    images = guided(**kwargs, generator=torch.manual_seed(0)).images
    assert np.isfinite(images).all() and not np.array_equal(images, expected)


def test_a_guider_that_hooks_the_model_leaves_it_as_it_was_when_a_call_fails(blocks, transformer):
    kwargs = {"class_labels": np.array([3], np.uint8), "num_inference_steps": 3, "output_type": "np"}
    slg = SkipLayerGuidance(guidance_scale=2.0, skip_layer_guidance_layers=[1], skip_layer_guidance_start=0.0)
    plain, guided = (
        modular(blocks, transformer, FlowMatchHeunScheduler(), g) for g in (ClassifierFreeGuidance(1.8), slg)
    )
    alone = plain(**kwargs, generator=torch.manual_seed(0)).images
    expected = guided(**kwargs, generator=torch.manual_seed(0)).images
    calls = []

    def fail_in_the_skip_pass(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = transformer.register_forward_pre_hook(fail_in_the_skip_pass)
    with pytest.raises(KeyboardInterrupt):
        guided(**kwargs, generator=torch.manual_seed(0))
    handle.remove()
    np.testing.assert_array_equal(plain(**kwargs, generator=torch.manual_seed(0)).images, alone)
    np.testing.assert_array_equal(guided(**kwargs, generator=torch.manual_seed(0)).images, expected)


def test_step_caches_work_and_are_emptied(blocks, transformer):
    kwargs = {"class_labels": [3], "num_inference_steps": 6, "output_type": "np"}
    pipe = modular(blocks, transformer, FlowMatchHeunScheduler())
    expected = pipe(**kwargs, generator=torch.manual_seed(0)).images
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    try:
        for _ in range(2):
            images = pipe(**kwargs, generator=torch.manual_seed(0)).images
            np.testing.assert_allclose(images, expected, atol=1e-5)
    finally:
        transformer.disable_cache()


def test_bad_inputs_raise(blocks):
    transformer = randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()
    pipe = modular(blocks, transformer, FlowMatchEulerMaruyamaScheduler())
    with pytest.raises(ValueError, match=r"\[0, 9\]"):
        pipe(class_labels=[11], num_inference_steps=2)
    reg = ERWTransformer2DModel(**TINY_MODEL, class_token_dim=4)
    with pytest.raises(ValueError, match="use ERWPipeline for a model with a class token"):
        modular(blocks, reg, FlowMatchEulerMaruyamaScheduler())(class_labels=[1], num_inference_steps=2)
    with pytest.raises(ValueError, match="shape"):
        pipe(class_labels=[1], num_inference_steps=2, latents=torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(
    "guider",
    [
        lambda: ClassifierFreeGuidance(guidance_scale=4.0, start=0.3, stop=0.8),
        lambda: AdaptiveProjectedGuidance(guidance_scale=4.0, adaptive_projected_guidance_momentum=-0.5),
    ],
)
def test_threads_get_what_they_get_alone(blocks, transformer, guider):
    pipe = modular(blocks, transformer, FlowMatchEulerMaruyamaScheduler(), guider())

    def draw(label, steps):
        generator = torch.Generator().manual_seed(label)
        kwargs = {"class_labels": [label], "num_inference_steps": np.int64(steps), "output_type": "np"}
        return pipe(**kwargs, generator=generator).images

    settings, images = [(1, 24), (2, 37), (3, 49)], {}
    alone = {one: draw(*one) for one in settings}
    threads = [threading.Thread(target=lambda one=one: images.update({one: draw(*one)})) for one in settings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in settings:
        np.testing.assert_array_equal(images[one], alone[one])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "jpg"}, "`output_type` must be"),
        ({"generator": 42}, "`generator` must be a torch.Generator.*int"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 images"),
        ({"latents": torch.full((1, 1, 8, 8), torch.nan)}, "NaN"),
        ({"class_labels": ["7"]}, "must be class ids"),
    ],
)
def test_wrong_inputs_are_refused_before_the_first_step(blocks, transformer, options, message):
    pipe = modular(blocks, transformer, FlowMatchEulerMaruyamaScheduler())
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [1], "num_inference_steps": 2, **options})


def test_latents_are_not_shown_as_pixels_nor_given_to_another_vae(blocks, vae_path):
    transformer = ERWTransformer2DModel(**{**TINY_MODEL, "in_channels": 8}).eval()
    pipe = modular(blocks, transformer, FlowMatchEulerMaruyamaScheduler())
    with pytest.raises(ValueError, match="latents of 8 channels are not pixels"):
        pipe(class_labels=[1], num_inference_steps=2)
    pipe.update_components(vae=AutoencoderKL.from_pretrained(vae_path))
    with pytest.raises(ValueError, match="the vae decodes latents of 4 channels"):
        pipe(class_labels=[1], num_inference_steps=2)


def test_wrong_schedulers_and_broken_pictures_raise(blocks):
    transformer = randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()
    pipe = modular(blocks, transformer, DDIMScheduler())
    with pytest.raises(ValueError, match="use_flow_sigmas=True"):
        pipe(class_labels=[1], num_inference_steps=2)
    flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert len(modular(blocks, transformer, flow)(class_labels=[1], num_inference_steps=2).images) == 1
    of_samples = ERWTransformer2DModel(**TINY_MODEL, prediction_type="sample")
    with pytest.raises(ValueError, match="the scheduler steps along the cosine one"):
        cosine = FlowMatchEulerMaruyamaScheduler(path_type="cosine")
        modular(blocks, of_samples, cosine)(class_labels=[1], num_inference_steps=2)
    transformer.proj_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        modular(blocks, transformer, FlowMatchEulerMaruyamaScheduler())(class_labels=[1], num_inference_steps=2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_labels": [1.5]}, "class ids"),
        ({"class_labels": [True]}, "class ids"),
        ({"num_inference_steps": 2.0}, "num_inference_steps.*float"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"latents": [0.0]}, "got list"),
    ],
)
def test_arguments_of_other_types_are_refused(blocks, transformer, kwargs, message):
    pipe = modular(blocks, transformer, FlowMatchEulerMaruyamaScheduler())
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [1], "num_inference_steps": 2, **kwargs})
