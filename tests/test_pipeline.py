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
import copy
import json

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from helpers import TINY_MODEL, randomize
from test_scheduler import reference_sde

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler


CACHES = [
    FirstBlockCacheConfig(threshold=10.0),
    TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, use_lite_mode=False),
    MagCacheConfig(
        threshold=0.5, max_skip_steps=2, retention_ratio=0.1, num_inference_steps=8, mag_ratios=torch.ones(8)
    ),
]
NAMES = dict(enumerate("tench,goldfish,crane,white shark,ox,cat,dog,hen,owl,crane".split(",")))


@pytest.fixture
def pipe(transformer):
    pipeline = ERWPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler(), id2label=NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipe, labels, **kwargs):
    kwargs = {"num_inference_steps": 4, "generator": torch.manual_seed(0), "output_type": "np", **kwargs}
    return pipe(class_labels=labels, **kwargs).images


def test_labels_of_every_form_mean_the_same(pipe):
    expected = draw(pipe, [5, 3])
    for labels in (["cat", "white shark"], ["cat", 3], torch.tensor([5, 3]), (5, np.int64(3)), np.array([5, 3])):
        np.testing.assert_array_equal(draw(pipe, labels), expected)
    np.testing.assert_array_equal(draw(pipe, "cat"), draw(pipe, 5))
    assert pipe.get_label_ids("white shark") == [3]
    assert pipe.labels["goldfish"] == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("catt", "did you mean 'cat'"),
        ("crane", r"\[2, 9\]"),
        (11, r"not in \[0, 9\]"),
        (-1, r"not in \[0, 9\]"),
        ([], "empty"),
        (1.5, "names or ids"),
        ([True], "a name or an id"),
        ([1.5], "a name or an id"),
        (torch.tensor([0.5]), "LongTensor"),
    ],
)
def test_unknown_labels_raise_and_help(pipe, labels, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, labels)


def test_synonyms():
    names = {0: "tench, Tinca tinca", 1: "maillot", 2: "maillot, tank suit", 3: "crane", 4: "crane"}
    model = ERWTransformer2DModel(**{**TINY_MODEL, "num_classes": 5})
    pipe = ERWPipeline(model, None, FlowMatchEulerMaruyamaScheduler(), id2label=names)
    assert pipe.get_label_ids(["Tinca tinca", "tank suit", "maillot, tank suit", "maillot"]) == [0, 2, 2, 1]
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        pipe.get_label_ids("crane")


def test_id2label_and_weights_survive_a_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["id2label"]["3"] == "white shark"
    loaded = ERWPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == pipe.labels
    np.testing.assert_array_equal(draw(loaded, "cat"), draw(pipe, "cat"))


def test_guidance_is_the_stated_formula_inside_the_interval_only(pipe, transformer):
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(6)
    generator = torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    labels, null = torch.tensor([5, 3]), torch.tensor([10, 10])
    calls = 0
    with torch.no_grad():
        for t in scheduler.timesteps:
            time = torch.full((2,), t.item() / 1000)
            v = transformer(x, time, labels).sample
            calls += 1
            if 0.2 <= t.item() / 1000 <= 0.62:
                v_null = transformer(x, time, null).sample
                v = v_null + 3.0 * (v - v_null)
                calls += 1
            x = scheduler.step(v, t, x, generator=generator).prev_sample
    images = draw(
        pipe, [5, 3], num_inference_steps=6, guidance_scale=3.0, guidance_interval=(0.2, 0.62), output_type="latent"
    )
    assert calls == 6 + 3
    torch.testing.assert_close(images, x, atol=1e-5, rtol=1e-5)


def test_bounds_of_the_interval_belong_to_it(pipe):
    rows = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    draw(pipe, 1, num_inference_steps=2, guidance_interval=(0.04, 1.0), guidance_scale=2.0)  # the grid is 1, 0.04
    assert rows == [2, 2]


def test_no_guidance_at_scale_one(pipe):
    rows = []
    pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    draw(pipe, [1, 2], guidance_scale=1.0, guidance_interval=(0.0, 1.0))
    assert rows == [2] * 4


def test_one_generator_an_image_makes_it_independent_of_the_batch(pipe):
    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = draw(pipe, [1, 2, 3, 4, 5], generator=generators(range(5)))
    for i in range(5):
        alone = draw(pipe, [i + 1], generator=generators([i]))
        np.testing.assert_allclose(together[i], alone[0], atol=1e-4)


def test_a_thousand_images_are_the_same_in_batches_and_one_by_one(pipe):
    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    labels = [seed % 10 for seed in range(1000)]
    kwargs = {"num_inference_steps": 2, "guidance_interval": (0.0, 1.0)}
    batches = np.concatenate(
        [
            draw(pipe, labels[i : i + 125], generator=generators(range(i, i + 125)), **kwargs)
            for i in range(0, 1000, 125)
        ]
    )
    singles = np.concatenate([draw(pipe, [labels[i]], generator=generators([i]), **kwargs) for i in range(1000)])
    np.testing.assert_allclose(batches, singles, atol=1e-4)
    assert len(np.unique(batches.reshape(1000, -1), axis=0)) == 1000


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_250_guided_steps_against_the_reference_sampler(pipe, transformer, path_type):
    """The whole pipeline, guidance inside an interval, against the sampler written from the score in float64."""
    for parameter in transformer.parameters():
        parameter.data *= 0.3  # a smoother field: float32 and float64 trajectories must not part by chaos
    pipe.scheduler = FlowMatchEulerMaruyamaScheduler(path_type=path_type)
    generator, twin = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    start = torch.randn(2, 1, 8, 8, generator=twin)
    noises = [torch.randn(2, 1, 8, 8, generator=twin) for _ in range(249)]
    labels, null = torch.tensor([5, 3]), torch.tensor([10, 10])

    def velocity(x, t):
        time = torch.full((2,), t, dtype=torch.float32)
        with torch.no_grad():
            v = transformer(x.float(), time, labels).sample.double()
            if 0.1 <= t <= 0.7:
                v_null = transformer(x.float(), time, null).sample.double()
                v = v_null + 2.0 * (v - v_null)
        return v

    kwargs = {"num_inference_steps": 250, "guidance_scale": 2.0, "guidance_interval": (0.1, 0.7)}
    result = draw(pipe, [5, 3], generator=generator, output_type="latent", **kwargs)
    expected = reference_sde(velocity, start, noises, 250, path_type)
    assert ((result - expected).norm() / expected.norm()).item() < 1e-5


def test_compiled_blocks_compile_for_both_batch_sizes_once(pipe):
    """Guidance doubles the batch inside its interval: the first call meets both sizes, later ones compile nothing."""
    torch._dynamo.reset()
    expected = draw(pipe, [1, 2, 3], num_inference_steps=6)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    draw(pipe, [1, 2, 3], num_inference_steps=6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = draw(pipe, [1, 2, 3], num_inference_steps=6)
        draw(pipe, [4, 5, 6, 7], num_inference_steps=6)  # and neither does another batch size
    np.testing.assert_allclose(compiled, expected, atol=1e-5)


def test_blocks_compiled_with_dynamic_shapes_compile_once(pipe):
    torch._dynamo.reset()
    expected = draw(pipe, [1, 2, 3], num_inference_steps=6)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = draw(pipe, [1, 2, 3], num_inference_steps=6)  # batches of 3 and of 6
    np.testing.assert_allclose(compiled, expected, atol=1e-5)


@pytest.mark.parametrize("cache", CACHES)
def test_step_caching_works_with_guidance_inside_an_interval(pipe, cache):
    """Batches of B and 2 B alternate: each has a cache of its own."""
    kwargs = {"num_inference_steps": 8, "guidance_interval": (0.3, 0.6)}

    def count_calls(transformer):
        calls = []
        transformer.transformer_blocks[1].attn.to_out[0].register_forward_hook(lambda *_: calls.append(1))
        return calls

    # Apart: diffusers 0.40 does not find the hooks of a cache that is enabled after a first call.
    plain = ERWPipeline(copy.deepcopy(pipe.transformer), None, FlowMatchEulerMaruyamaScheduler())
    plain.set_progress_bar_config(disable=True)
    uncached_calls, calls = count_calls(plain.transformer), count_calls(pipe.transformer)
    expected = draw(plain, [1, 2], output_type="latent", **kwargs)
    pipe.transformer.enable_cache(cache)
    cached = draw(pipe, [1, 2], output_type="latent", **kwargs)
    assert len(uncached_calls) == 8 and 0 < len(calls) < 8  # blocks were left out
    assert 0 < (cached - expected).norm() < 0.5 * expected.norm()  # and the pictures are about the same
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe, [1, 2], output_type="latent", **kwargs), expected)


def test_num_images_per_prompt_repeats_each_label(pipe):
    latents = torch.randn(4, 1, 8, 8)
    images = draw(pipe, [5, 3], num_images_per_prompt=2, latents=latents)
    np.testing.assert_array_equal(images, draw(pipe, [5, 5, 3, 3], latents=latents))


def test_output_types(pipe):
    assert draw(pipe, 1, output_type="pil")[0].size == (8, 8)
    assert draw(pipe, 1, output_type="np").shape == (1, 8, 8, 1)
    assert draw(pipe, 1, output_type="pt").shape == (1, 1, 8, 8)
    assert draw(pipe, 1, output_type="latent").shape == (1, 1, 8, 8)
    assert isinstance(pipe(class_labels=1, num_inference_steps=2, return_dict=False), tuple)


def test_latents_come_back_decoded_by_the_vae(transformer):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
        shift_factor=0.1,
    ).eval()  # fmt: skip
    pipe = ERWPipeline(transformer, vae, FlowMatchEulerMaruyamaScheduler())
    pipe.set_progress_bar_config(disable=True)
    latents = draw(pipe, 1, output_type="latent")
    with torch.no_grad():
        expected = vae.decode(latents / 0.5 + 0.1).sample
    images = draw(pipe, 1, output_type="pt")
    assert images.shape == (1, 3, 16, 16)
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))


def test_callback_sees_and_changes_the_latents_and_can_interrupt(pipe):
    def callback(pipe, step, timestep, kwargs):
        if step == 1:
            pipe._interrupt = True
        return {"latents": torch.full_like(kwargs["latents"], float(step))}

    latents = draw(pipe, 1, output_type="latent", callback_on_step_end=callback)
    assert torch.equal(latents, torch.ones(1, 1, 8, 8))


def test_euler_ode_runs_on_the_reference_grid(pipe, transformer):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    latents = torch.randn(2, 1, 8, 8)
    result = draw(pipe, [1, 2], num_inference_steps=5, latents=latents, guidance_scale=1.0, output_type="latent")
    x, grid = latents, torch.linspace(1, 0, 6)
    with torch.no_grad():
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            x = x + (t_next - t) * transformer(x, t.repeat(2), torch.tensor([1, 2])).sample
    torch.testing.assert_close(result, x, atol=1e-5, rtol=1e-5)


def test_autoguidance_takes_a_worse_model_in_place_of_the_null_class(pipe, transformer):
    worse = randomize(ERWTransformer2DModel(**{**TINY_MODEL, "num_layers": 1}), seed=9).eval()
    pipe.register_modules(guidance_transformer=worse, scheduler=FlowMatchEulerDiscreteScheduler())
    latents = torch.randn(2, 1, 8, 8)
    result = draw(
        pipe,
        [1, 2],
        num_inference_steps=3,
        latents=latents,
        guidance_scale=2.5,
        guidance_interval=(0.5, 1.0),
        output_type="latent",
    )
    x, grid, labels = latents, torch.linspace(1, 0, 4), torch.tensor([1, 2])
    with torch.no_grad():
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            v = transformer(x, t.repeat(2), labels).sample
            if t >= 0.5:
                v_worse = worse(x, t.repeat(2), labels).sample
                v = v_worse + 2.5 * (v - v_worse)
            x = x + (t_next - t) * v
    torch.testing.assert_close(result, x, atol=1e-5, rtol=1e-5)


def test_a_model_left_in_training_mode_draws_the_same(pipe, transformer):
    expected = draw(pipe, list(range(10)))
    transformer.train()
    np.testing.assert_array_equal(draw(pipe, list(range(10))), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"guidance_interval": (0.7, 0.2)}, "guidance_interval"),
        ({"output_type": "jpg"}, "output_type"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "shape"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 images"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_arguments_that_do_not_fit_raise(pipe, kwargs, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, 1, **kwargs)


def test_unconditional_model():
    model = randomize(ERWTransformer2DModel(**{**TINY_MODEL, "num_classes": 0})).eval()
    pipe = ERWPipeline(model, None, FlowMatchEulerMaruyamaScheduler())
    pipe.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(draw(pipe, None), draw(pipe, 0))
    with pytest.raises(ValueError, match="no class names"):
        draw(pipe, "cat")
