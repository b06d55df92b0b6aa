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
"""Speed changes nothing else: the trainer's losses are those of a plain loop, compiled or not."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from helpers import PRESET, TINY_MODEL, train
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2Config, Dinov2Model

from erw_hf import ERWPipeline, ERWTransformer2DModel, RepresentationEncoder
from erw_hf.data.latents import encode_moments, pixels_to_latents
from erw_hf.data.samples import SampleMaker, StepSampler, TrainingSamples
from erw_hf.data.source import load_source
from erw_hf.objective import AlignedTransformer
from erw_hf.trainer.config import parse_config
from erw_hf.trainer.device import LateValues
from erw_hf.trainer.run_record import read_metrics
from erw_hf.trainer.setup import Inputs, build_full_model, build_warmup_model, vae_precision
from erw_hf.trainer.snapshots import Snapshots


def losses_of(run) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def plain_run(config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Both phases as one would first write them: a loop over samples, an optimizer without tricks, an EMA tensor by
    tensor, a hand-over by name. Only the models, the samples' draws and the encoder are the library's."""
    source = load_source(**config.source_arguments())
    shape = (config.in_channels, config.sample_size, config.sample_size)
    maker = SampleMaker(
        source, config.sample_size, config.in_channels, shape, config.seed, config.class_dropout_prob, False
    )
    samples = TrainingSamples(maker)
    encoder = RepresentationEncoder.from_pretrained(config.encoder, config.token_grid)
    losses, warmup_state, average = [], {}, {}
    for phase in ("warmup", "full"):
        set_seed(config.seed)
        build = build_warmup_model if phase == "warmup" else build_full_model
        model = build(config, source.num_classes, [encoder]).train()
        parameters = dict(model.named_parameters())
        for name, tensor in warmup_state.items():
            if "norm_out" not in name and "proj_out" not in name:
                parameters[name].data.copy_(tensor)
        start, end = (0, config.warmup_steps) if phase == "warmup" else (config.warmup_steps, config.max_train_steps)
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        betas = (config.adam_beta1, config.adam_beta2)
        optimizer = torch.optim.AdamW(
            trained, lr=0, betas=betas, eps=config.adam_epsilon, weight_decay=config.adam_weight_decay, foreach=False
        )
        if phase == "full":
            average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        sampler = StepSampler(
            len(source.dataset), config.train_batch_size, 1, num_processes=1, process_index=0,
            start_step=start, end_step=end, seed=config.seed,
        )  # fmt: skip
        for number, indices in enumerate(sampler):
            optimizer.param_groups[0]["lr"] = config.learning_rate * min(1, number / config.lr_warmup_steps)
            weight = config.alignment_weight * 0.5 ** (number / config.alignment_half_life)
            loss = 0
            for index in indices:
                sample = {name: torch.as_tensor(value)[None] for name, value in samples[index].items()}
                image = sample["pixels"].float() / 255
                x0, noise = image * 2 - 1, sample["noise"]
                t = torch.special.ndtr(sample["time_normal"])
                t = config.timestep_shift * t / (1 + (config.timestep_shift - 1) * t)
                if phase == "warmup":
                    t, noise = torch.zeros_like(t), torch.zeros_like(noise)
                velocity, (projected,), _ = model((1 - t) * x0 + t * noise, t, sample["label"], sample["drop"])
                cosine = torch.nn.functional.cosine_similarity(projected, encoder(image), dim=-1)
                of_sample = (1 - cosine).mean()
                if phase == "full":
                    of_sample = ((velocity - (noise - x0)) ** 2).mean() + weight * of_sample
                loss = loss + of_sample / len(indices)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm, foreach=False)
            optimizer.step()
            decay = min(config.ema_decay, (1 + number) / (10 + number)) if number > 0 else 0.0  # diffusers' ramp
            for name, tensor in average.items():
                tensor.mul_(decay).add_(parameters[name].detach(), alpha=1 - decay)
            losses.append(loss.item())
        warmup_state = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return losses, {name.removeprefix("transformer."): t for name, t in average.items() if "projectors" not in name}


@pytest.fixture(scope="module")
def flags(tiny_flags) -> list[str]:
    # A schedule that a line of the plain loop states, and a few more steps than elsewhere.
    return [*tiny_flags, "--lr_scheduler=constant", "--warmup_steps=4", "--max_train_steps=12"]


@pytest.fixture(scope="module")
def eager(tmp_path_factory, flags):
    run = tmp_path_factory.mktemp("eager")
    train(*flags, f"--output_dir={run}/run")
    return run / "run"


def test_losses_and_average_are_those_of_a_plain_loop(eager, flags):
    config = parse_config([*PRESET, *flags])
    losses, average = plain_run(config)
    np.testing.assert_allclose(losses_of(eager), losses, rtol=1e-5)
    weights = load_file(eager / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in average.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_blocks_change_no_loss(eager, flags, tmp_path):
    torch._dynamo.reset()
    counters["stats"].clear()
    train(*flags, "--torch_compile=yes", f"--output_dir={tmp_path}/run")
    assert counters["stats"]["unique_graphs"] == 2  # the encoder, and one block for all of both phases
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(eager), rtol=1e-3)


def test_values_arrive_late_but_as_they_were():
    values = torch.tensor([1.5, float("nan"), float("inf")])
    np.testing.assert_array_equal(LateValues(values).fetch(), values)


def test_bf16_runs_compile(flags, tmp_path, monkeypatch):
    # Traced as one graph is what bf16 adds to the test above; Inductor takes half a minute for what it makes of the graph.
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, fullgraph=False, **_: compile_(f, fullgraph=fullgraph, backend="aot_eager")
    )
    torch._dynamo.reset()
    train(*flags, "--mixed_precision=bf16", "--torch_compile=yes", f"--output_dir={tmp_path}/run")
    assert np.isfinite(losses_of(tmp_path / "run")).all()


def test_pictures_build_their_model_on_the_device():
    """On meta here, where XL would take the CPU that stands in for it 20 s, and every process with it."""
    model = AlignedTransformer(ERWTransformer2DModel(**TINY_MODEL), [], 1)
    weights = {name: parameter.to("meta") for name, parameter in model.transformer.named_parameters()}
    built = []
    inputs = SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True, device=torch.device("meta")),
        config=SimpleNamespace(path_type="linear"), model_config=TINY_MODEL, vae=None, source=SimpleNamespace(id2label=None),
    )  # fmt: skip
    phase = SimpleNamespace(transformer=model.transformer, ema=SimpleNamespace(weights=lambda: weights))
    with TensorsMadeOn(built):
        pipeline = Snapshots._pipeline(SimpleNamespace(inputs=inputs), phase)()
    assert {parameter.device.type for parameter in pipeline.transformer.parameters()} == {"meta"}
    assert sum(numel for device, numel in built if device == "cpu") < 5000  # the table of positions


def test_the_encoder_computes_nothing_when_it_is_made():
    model = Dinov2Model(
        Dinov2Config(image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    made = []
    with TensorsMadeOn(made):
        encoder = RepresentationEncoder(model, [0.5] * 3, [0.5] * 3, 8)
    assert {device for device, numel in made if numel > 3} == {"meta"}
    assert encoder.embed_dim == 16 and encoder.num_prefix_tokens == 1
    images = torch.rand(1, 3, 112, 112)
    expected = model(pixel_values=(images - 0.5) / 0.5).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(images), expected)


def test_images_are_encoded_in_bf16_on_a_gpu_alone(vae_path, monkeypatch):
    chosen = {(d, p): vae_precision(d, p) for d in ("cuda", "cpu", "mps") for p in ("bf16", "fp16", "no")}
    assert [where for where, precision in chosen.items() if precision == "bf16"] == [("cuda", "bf16")]
    vae = AutoencoderKL.from_pretrained(vae_path)
    side = 8 * ERWPipeline.vae_scale_factor_of(vae)
    pixels = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(0))
    exact = pixels_to_latents(pixels, vae)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")
    inputs = Inputs(**dict.fromkeys((field.name for field in fields(Inputs)), None) | {"accelerator": accelerator})
    with inputs.autocast_vae():
        assert torch.equal(pixels_to_latents(pixels, vae), exact)
    monkeypatch.setattr("erw_hf.trainer.setup.vae_precision", lambda *where: "bf16")  # as on a GPU
    with inputs.autocast_vae():
        rounded = pixels_to_latents(pixels, vae)
    assert rounded.dtype == torch.float32 and vae.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()

    class OnCuda(torch.Tensor):
        is_cuda = True

    layouts = []
    encode = vae.encode
    vae.encode = lambda x: layouts.append(x.is_contiguous(memory_format=torch.channels_last)) or encode(x)
    torch.testing.assert_close(encode_moments(pixels.as_subclass(OnCuda), vae), encode_moments(pixels, vae))
    assert layouts == [True, False]


class TensorsMadeOn(TorchDispatchMode):
    """Notes the device and the size of what each operation gives."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.found.append((result.device.type, result.numel()))
        return result
