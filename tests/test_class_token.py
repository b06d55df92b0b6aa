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

"""REG's class token (arXiv 2507.01467): a token more in the model, a term more in the loss, a state more in sampling."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from helpers import TINY_MODEL, randomize, run_script, train
from safetensors.torch import load_file
from transformers import BitImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler
from erw_hf.alignment import ConvProjector, MLPProjector, spatial_normalize
from erw_hf.data.decoding import decode_image
from erw_hf.data.samples import SampleMaker
from erw_hf.data.source import load_source
from erw_hf.objective import AlignedTransformer, Batch, Objective, Teacher
from erw_hf.trainer.run_record import read_metrics
from erw_hf.warmup import build_warmup_transformer, hand_over


WIDTH, CLASS_WIDTH = 16, 12
MODEL = {**TINY_MODEL, "class_token_dim": CLASS_WIDTH}


def model(**changes) -> ERWTransformer2DModel:
    return randomize(ERWTransformer2DModel(**{**MODEL, **changes})).eval()


def inputs(batch: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 1, 8, 8, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "class_labels": torch.arange(batch) % 10,
        "class_token": torch.randn(batch, CLASS_WIDTH, generator=generator),
    }


# The model


@pytest.mark.parametrize("use_rope", [False, True])
def test_the_class_token_goes_first_through_all_blocks_and_has_its_own_last_layer(use_rope):
    transformer, x = model(use_rope=use_rope), inputs()
    output = transformer(**x, hidden_states_depths=(3, 1))

    embed = transformer.class_token_embed
    token = x["class_token"] @ embed.proj.weight.T + embed.proj.bias
    token = (token - token.mean(-1, keepdim=True)) / (token.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    token = token * embed.norm.weight + embed.norm.bias
    h = torch.cat([token[:, None], transformer.pos_embed(x["hidden_states"])], dim=1)
    temb = transformer.time_class_embed(x["timestep"], x["class_labels"], torch.zeros(3), h.dtype)
    rope = None
    if use_rope:  # the patches turn as they do without a class token, which stays as it is
        cos, sin = ERWTransformer2DModel(**{**TINY_MODEL, "use_rope": True}).rope(h)
        rope = torch.cat([torch.ones(1, 8), cos]), torch.cat([torch.zeros(1, 8), sin])
    after = []
    for block in transformer.transformer_blocks:
        h = block(h, temb, rope)
        after.append(h)
    h = transformer.norm_out(h, temb)
    velocity = h[:, 0] @ transformer.class_token_out.weight.T + transformer.class_token_out.bias
    torch.testing.assert_close(output.class_token, velocity)
    patches = (h[:, 1:] @ transformer.proj_out.weight.T + transformer.proj_out.bias).reshape(3, 4, 4, 2, 2, 1)
    torch.testing.assert_close(output.sample, patches.permute(0, 5, 1, 3, 2, 4).reshape(3, 1, 8, 8))
    for taps, class_taps, depth in zip(output.hidden_states, output.class_hidden_states, (3, 1), strict=True):
        torch.testing.assert_close(taps, after[depth - 1][:, 1:])
        torch.testing.assert_close(class_taps, after[depth - 1][:, 0])
    sample, tokens, class_velocity, class_tokens = transformer(**x, hidden_states_depths=(3, 1), return_dict=False)
    assert torch.equal(sample, output.sample) and torch.equal(class_velocity, output.class_token)
    assert torch.equal(tokens[1], output.hidden_states[1])
    assert torch.equal(class_tokens[1], output.class_hidden_states[1])
    only = transformer(**x, hidden_states_depths=(1,), tokens_only=True)
    assert only.sample is None and only.class_token is None
    torch.testing.assert_close(only.class_hidden_states[0], output.class_hidden_states[1])


def test_a_sample_depends_on_its_own_class_token_and_on_no_neighbour():
    transformer, x = model(), inputs()
    expected = transformer(**x)
    order = torch.tensor([2, 0, 1])
    shuffled = transformer(**{name: tensor[order] for name, tensor in x.items()})
    torch.testing.assert_close(shuffled.sample, expected.sample[order])
    torch.testing.assert_close(shuffled.class_token, expected.class_token[order])
    x["class_token"] = x["class_token"].clone()
    x["class_token"][1] += 1
    changed = transformer(**x)
    torch.testing.assert_close(changed.sample[[0, 2]], expected.sample[[0, 2]])
    torch.testing.assert_close(changed.class_token[[0, 2]], expected.class_token[[0, 2]])
    assert (changed.sample[1] - expected.sample[1]).abs().max() > 1e-3
    assert (changed.class_token[1] - expected.class_token[1]).abs().max() > 1e-3


def test_a_model_without_the_option_has_nothing_of_it_and_a_token_that_does_not_fit_raises():
    plain, x = ERWTransformer2DModel(**TINY_MODEL), inputs()
    more = set(ERWTransformer2DModel(**MODEL).state_dict()) - set(plain.state_dict())
    assert more == {
        f"{name}.{kind}"
        for name in ("class_token_embed.proj", "class_token_embed.norm", "class_token_out")
        for kind in ("weight", "bias")
    }
    with pytest.raises(ValueError, match="class_token_dim=None: class_token must be left out"):
        plain(**x)
    del x["class_token"]
    assert plain(**x).class_token is None
    with pytest.raises(ValueError, match="class_token_dim=12: class_token must be given"):
        model()(**x)


def test_a_fresh_model_predicts_zero_velocities():
    transformer, x = ERWTransformer2DModel(**MODEL), inputs()
    output = transformer(**x)
    assert output.sample.abs().max() == 0 and output.class_token.abs().max() == 0


def test_checkpointing_compilation_and_half_precision(tmp_path):
    transformer, x = model(use_rope=True, norm_type="rms_norm", qk_norm="rms_norm"), inputs()
    transformer.save_pretrained(tmp_path)
    loaded = ERWTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half = {name: x[name].bfloat16() for name in ("hidden_states", "class_token")}
    assert loaded(**{**x, **half}).class_token.dtype == torch.bfloat16
    expected = transformer(**x)
    torch._dynamo.reset()
    compiled = torch.compile(transformer, fullgraph=True, backend="eager")(**x)
    torch.testing.assert_close(compiled.class_token, expected.class_token)
    (expected.sample.mean() + expected.class_token.mean()).backward()
    plain = [parameter.grad.clone() for parameter in transformer.parameters()]
    transformer.zero_grad()
    transformer.enable_gradient_checkpointing()
    output = transformer(**x)
    (output.sample.mean() + output.class_token.mean()).backward()
    for gradient, parameter in zip(plain, transformer.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# The losses

OBJECTIVE = Objective(class_token_weight=0.03)


def aligned(depth: int = 3, warmup: bool = False, projector: type = MLPProjector) -> AlignedTransformer:
    torch.manual_seed(3)
    hidden = (16,) if projector is MLPProjector else ()
    transformer = build_warmup_transformer(MODEL, depth) if warmup else ERWTransformer2DModel(**MODEL)
    projectors = [projector(WIDTH, CLASS_WIDTH, *hidden), MLPProjector(WIDTH, 20, 16)]
    net = AlignedTransformer(transformer, projectors, depth, warmup, aligns_class_token=projector is MLPProjector)
    return randomize(net, seed=7)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    data = {"x0": random(4, 1, 8, 8), "noise": random(4, 1, 8, 8), "t": torch.tensor([0.1, 0.4, 0.6, 0.95])}
    data |= {"class_labels": torch.arange(4), "drop": torch.tensor([0, 0, 1, 0])}
    data |= {"class_token": random(4, CLASS_WIDTH), "class_noise": random(4, CLASS_WIDTH)}
    return {**data, "targets": [random(4, 16, CLASS_WIDTH), random(4, 16, 20)]}


def as_batch(data: dict, aligns_class_token: bool = True) -> Batch:
    """With the first encoder's class token before its tokens, as the teacher gives them to an MLP."""
    targets = data["targets"]
    if targets is not None and aligns_class_token:
        targets = [torch.cat([data["class_token"][:, None], targets[0]], dim=1), *targets[1:]]
    return Batch(**{**data, "targets": targets})


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()


@pytest.mark.parametrize("projector", [MLPProjector, ConvProjector])
@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_objective_against_its_statement(path_type, projector):
    net, data = aligned(projector=projector), batch()
    objective = Objective(path_type=path_type, class_token_weight=0.03)
    losses = objective.full_loss(net, as_batch(data, projector is MLPProjector), 0.5).values
    velocity, class_velocity, alignment = [], [], []
    for i in range(4):  # one sample after the other, straight from the equations
        s = data["t"][i]
        angle = s * torch.pi / 2
        alpha, sigma, d_alpha, d_sigma = (1 - s, s, -1, 1)
        if path_type == "cosine":
            alpha, sigma = torch.cos(angle), torch.sin(angle)
            d_alpha, d_sigma = -torch.pi / 2 * sigma, torch.pi / 2 * alpha
        x0, e, c, n = (data[name][i] for name in ("x0", "noise", "class_token", "class_noise"))
        predicted = net.transformer(
            (alpha * x0 + sigma * e)[None], s[None], data["class_labels"][i : i + 1],
            force_drop_ids=data["drop"][i : i + 1], class_token=(alpha * c + sigma * n)[None],
            hidden_states_depths=(3,),
        )  # fmt: skip
        velocity.append((predicted.sample[0] - d_alpha * x0 - d_sigma * e).square().mean())
        class_velocity.append((predicted.class_token[0] - d_alpha * c - d_sigma * n).square().mean())
        patches, first, second = predicted.hidden_states[0], *(target[i] for target in data["targets"])
        if projector is MLPProjector:  # the first encoder's class token is aligned as one token more
            ours = torch.cat([predicted.class_hidden_states[0][:, None], patches], dim=1)
            one = cosine_distance(net.projectors[0](ours)[0], torch.cat([c[None], first]))
        else:
            one = cosine_distance(net.projectors[0](patches)[0], first)
        alignment.append((one + cosine_distance(net.projectors[1](patches)[0], second)) / 2)
    velocity, class_velocity, alignment = (torch.stack(v).mean() for v in (velocity, class_velocity, alignment))
    torch.testing.assert_close(losses["velocity"], velocity)
    torch.testing.assert_close(losses["class_token"], class_velocity)
    torch.testing.assert_close(losses["alignment"], alignment)
    torch.testing.assert_close(losses["loss"], velocity + 0.03 * class_velocity + 0.5 * alignment)


def test_the_loss_does_not_depend_on_the_order_of_the_batch():
    net, data = aligned(), batch()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {name: tensor[order] for name, tensor in data.items() if name != "targets"}
    shuffled["targets"] = [target[order] for target in data["targets"]]
    losses, again = (OBJECTIVE.full_loss(net, as_batch(d), 0.5).values for d in (data, shuffled))
    assert set(losses) == {"loss", "velocity", "class_token", "alignment"}
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value)


def test_gradients_flow_where_they_should():
    net, data = aligned(), batch()
    OBJECTIVE.full_loss(net, as_batch(data), 0.0).terms["class_token"].value.backward()
    reached = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    unreached = {name for name, _ in net.named_parameters()} - reached
    # The class token's own loss trains the embedders, all blocks and its last layer, not that of the patches.
    assert {name.split(".")[0] for name in unreached} == {"projectors", "transformer"}
    assert {name.split(".")[1] for name in unreached if name.startswith("transformer")} == {"proj_out"}
    net.zero_grad(set_to_none=True)
    OBJECTIVE.full_loss(net, as_batch({**data, "targets": None}), 0.0).loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())  # DDP waits for each
    assert all(parameter.grad.abs().max() == 0 for parameter in net.projectors.parameters())
    warm = aligned(2, warmup=True)
    OBJECTIVE.warmup_loss(warm, as_batch({**data, "t": torch.zeros(4)})).loss.backward()
    for name, parameter in warm.named_parameters():
        final = name.startswith(("transformer.norm_out", "transformer.proj_out", "transformer.class_token_out"))
        assert (parameter.grad is None) == final, name


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("aligns_class_token", [False, True])
def test_the_teacher_puts_its_clean_class_token_before_its_normalised_tokens(aligned, aligns_class_token):
    torch.manual_seed(0)
    patches, token, others = torch.randn(2, 16, 12), torch.randn(2, 12), torch.randn(2, 16, 20)
    encoders = [SimpleNamespace(patch_and_class_tokens=lambda images: (patches, token)), lambda images: others]
    teacher = Teacher(encoders, spatial_norm=True, draws_class_token=True, aligns_class_token=aligns_class_token)
    targets, class_token = teacher({"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, aligned)
    assert torch.equal(class_token, token)  # a step that does not align draws it too
    assert len(teacher.encoders_for(aligned)) == (2 if aligned else 1)
    if not aligned:
        assert targets is None
        return
    first = spatial_normalize(patches)
    if aligns_class_token:
        first = torch.cat([token[:, None], first], dim=1)
    torch.testing.assert_close(targets, [first, spatial_normalize(others)])


@pytest.mark.parametrize("noised", [False, True])
def test_warmup_sees_the_class_token_as_clean_as_the_latents(noised):
    net, data, seen = aligned(2, warmup=True), batch(), {}
    net.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs, x=args[0]), with_kwargs=True)
    if not noised:
        data["t"] = torch.zeros(4)
    loss = OBJECTIVE.warmup_loss(net, as_batch(data)).loss
    x_t, token = data["x0"], data["class_token"]
    if noised:
        x_t = (1 - data["t"]).view(4, 1, 1, 1) * x_t + data["t"].view(4, 1, 1, 1) * data["noise"]
        token = (1 - data["t"])[:, None] * token + data["t"][:, None] * data["class_noise"]
    torch.testing.assert_close(seen["class_token"], token)
    _, projected, _ = net(x_t, data["t"], data["class_labels"], data["drop"], token)
    # What is matched is the clean token, whatever is seen.
    targets = [torch.cat([data["class_token"][:, None], data["targets"][0]], dim=1), data["targets"][1]]
    each = [cosine_distance(ours, theirs) for ours, theirs in zip(projected, targets, strict=True)]
    torch.testing.assert_close(loss, (each[0] + each[1]) / 2)


def test_hand_over_covers_the_embedder_and_misses_none():
    warm, full = aligned(2, warmup=True), aligned()
    full.load_state_dict({name: tensor + 1 for name, tensor in full.state_dict().items()})
    names = hand_over(warm.state_dict(), full)
    assert "transformer.class_token_embed.proj.weight" in names
    assert not any("class_token_out" in name for name in names)
    state = {name: tensor for name, tensor in warm.state_dict().items() if "class_token_embed" not in name}
    with pytest.raises(ValueError, match="the warmup lacks .*class_token_embed"):
        hand_over(state, full)


# Sampling


def pipeline(scheduler=FlowMatchEulerMaruyamaScheduler, transformer=None) -> ERWPipeline:
    pipe = ERWPipeline(transformer or model(), None, scheduler(), id2label={0: "dog", 1: "cat"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("scheduler", ["sde", "heun", "euler"])
def test_sampling_is_the_stated_loop_over_both_states(scheduler):
    """Guided inside the interval, one draw a step and sample for latents and class token together."""
    transformer, steps = model(), 5
    labels, null = torch.tensor([5, 3]), torch.tensor([10, 10])
    schedulers = {
        "sde": FlowMatchEulerMaruyamaScheduler,
        "heun": FlowMatchHeunScheduler,
        "euler": FlowMatchEulerDiscreteScheduler,
    }
    sources = generators(0, 1)
    noise = [(torch.randn(1, 1, 8, 8, generator=g), torch.randn(1, CLASS_WIDTH, generator=g)) for g in sources]
    x, c = (torch.cat(parts) for parts in zip(*noise, strict=True))

    def velocity(x, c, t):
        time = torch.full((2,), t)
        v = transformer(x, time, labels, class_token=c)
        v, w = v.sample, v.class_token
        if 0.15 <= t <= 0.7:
            free = transformer(x, time, null, class_token=c)
            v, w = free.sample + 3 * (v - free.sample), free.class_token + 3 * (w - free.class_token)
        return v, w

    grid = [1 - i / steps for i in range(steps)] + [0.0]
    if scheduler == "sde":
        grid = [1 - 0.96 * i / (steps - 1) for i in range(steps)] + [0.0]
    with torch.no_grad():
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            v, w = velocity(x, c, t)
            dt = t_next - t
            if scheduler == "euler":
                x, c = x + v * dt, c + w * dt
            elif scheduler == "heun":
                if t_next > 0:
                    v2, w2 = velocity(x + v * dt, c + w * dt, t_next)
                    v, w = (v + v2) / 2, (w + w2) / 2
                x, c = x + v * dt, c + w * dt
            else:  # drift v - t score with score = -((1 - t) v + x) / t
                x, c = x + (v + (1 - t) * v + x) * dt, c + (w + (1 - t) * w + c) * dt
                if t_next > 0:
                    both = torch.cat([torch.randn(1, 64 + CLASS_WIDTH, generator=g) for g in sources])
                    scale = (2 * t * -dt) ** 0.5
                    x, c = x + scale * both[:, :64].reshape(2, 1, 8, 8), c + scale * both[:, 64:]
    result = pipeline(schedulers[scheduler], transformer)(
        [5, 3], num_inference_steps=steps, guidance_scale=3.0, guidance_interval=(0.15, 0.7),
        generator=generators(0, 1), output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(result, x, atol=1e-4, rtol=1e-4)


def test_a_picture_does_not_depend_on_its_neighbours():
    pipe = pipeline()
    arguments = {"num_inference_steps": 4, "output_type": "latent"}
    both = pipe([5, 3], generator=generators(0, 1), **arguments).images
    swapped = pipe([3, 5], generator=generators(1, 0), **arguments).images
    alone = pipe([3], generator=generators(1), **arguments).images
    torch.testing.assert_close(swapped, both.flip(0))
    torch.testing.assert_close(alone, both[1:])


def test_callbacks_see_latents_and_may_replace_them():
    pipe, seen = pipeline(FlowMatchEulerDiscreteScheduler), []
    arguments = {"num_inference_steps": 3, "output_type": "latent", "generator": generators(0)}

    def callback(pipe, step, timestep, kwargs):
        seen.append(kwargs["latents"].shape)
        return {"latents": torch.full_like(kwargs["latents"], float(step))}

    images = pipe(1, callback_on_step_end=callback, **arguments).images
    assert seen == [(1, 1, 8, 8)] * 3 and torch.equal(images, torch.full((1, 1, 8, 8), 2.0))
    latents = torch.randn(1, 1, 8, 8)
    first, again = (pipe(1, latents=latents, **{**arguments, "generator": generators(s)}).images for s in (0, 0))
    assert torch.equal(first, again)


def test_a_guidance_transformer_must_denoise_the_same_class_token():
    pipe = pipeline()
    pipe.register_modules(guidance_transformer=ERWTransformer2DModel(**TINY_MODEL))
    with pytest.raises(ValueError, match="guidance_transformer has class_token_dim=None, the transformer 12"):
        pipe(1, num_inference_steps=1)
    pipe.register_modules(guidance_transformer=randomize(ERWTransformer2DModel(**{**MODEL, "num_layers": 1})))
    assert pipe(1, num_inference_steps=2, guidance_interval=(0.0, 1.0)).images[0].size == (8, 8)


def test_an_exported_pipeline_loads_all_three_ways(tmp_path):
    pipe = pipeline()
    arguments = {"num_inference_steps": 3, "output_type": "np"}
    expected = pipe("cat", generator=torch.manual_seed(0), **arguments).images
    pipe.save_pretrained(tmp_path / "repo")
    own = ERWPipeline.from_pretrained(tmp_path / "repo")
    remote = DiffusionPipeline.from_pretrained(
        tmp_path / "repo", custom_pipeline=str(tmp_path / "repo"), trust_remote_code=True
    )
    for loaded in (own, remote):
        loaded.set_progress_bar_config(disable=True)
        np.testing.assert_array_equal(loaded("cat", generator=torch.manual_seed(0), **arguments).images, expected)
    transformer = ERWTransformer2DModel.from_pretrained(tmp_path / "repo", subfolder="transformer")
    assert transformer.config.class_token_dim == CLASS_WIDTH


# Training


def losses(run):
    return [(record["step"], record["phase"], record["loss"]) for record in read_metrics(run / "metrics.jsonl")]


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_its_noise_comes_after_all_other_draws_of_a_sample():
    source = load_source("digits")
    arguments = (source, 8, 1, (1, 8, 8), 0, 0.1, False)
    image, _ = decode_image(source.dataset[0]["image"])
    plain = SampleMaker(*arguments)(image, 3, 0, 0)
    more = SampleMaker(*arguments, class_token_dim=5)(image, 3, 0, 0)
    noise = more.pop("class_noise")
    assert noise.shape == (5,) and noise.dtype == torch.float32
    assert set(plain) == set(more) and all(torch.equal(plain[name], more[name]) for name in plain)
    other = SampleMaker(*arguments, class_token_dim=5)(image, 3, 1, 0)["class_noise"]
    assert not torch.equal(noise, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_flags):
    run = tmp_path_factory.mktemp("class-token") / "whole"
    flags = [*tiny_flags, "--class_token_weight=0.03", "--checkpoints_total_limit=9", "--checkpointing_steps=1"]
    train(*flags, f"--output_dir={run}")
    return run, flags


def test_a_run_records_the_part_and_leaves_a_pipeline_and_a_warmup(whole, tmp_path):
    run, flags = whole
    records = read_metrics(run / "metrics.jsonl")
    assert all("class_token" not in record for record in records[:3])
    for record in records[3:]:
        expected = record["velocity"] + 0.03 * record["class_token"] + record["lambda"] * record["alignment"]
        assert record["class_token"] > 0 and record["loss"] == pytest.approx(expected, rel=1e-5)
    pipe = ERWPipeline.from_pretrained(run / "pipeline")
    assert pipe.transformer.config.class_token_dim == 16
    assert pipe("7", num_inference_steps=2).images[0].size == (8, 8)
    assert json.loads((run / "warmup" / "transformer" / "config.json").read_text())["class_token_dim"] == 16
    frozen = [*flags, "--learning_rate=1e-300", "--ema_decay=0", "--max_train_steps=4"]
    train(*frozen, f"--warmup_from={run}/warmup", "--warmup_steps=0", f"--output_dir={tmp_path}/from")
    name = "class_token_embed.proj.weight"
    assert torch.equal(weights(tmp_path / "from" / "pipeline")[name], weights(run / "warmup")[name])
    with pytest.raises(ValueError, match="the warmup was made with class_token_dim=16, the config has None"):
        train(*frozen, f"--warmup_from={run}/warmup", "--warmup_steps=0", "--class_token_weight=0",
              f"--output_dir={tmp_path}/other")  # fmt: skip


@pytest.mark.parametrize("kept", [2, 3, 5])  # in the warmup, at the hand-over, in full training
def test_resumed_run_is_bitwise_the_uninterrupted_one(whole, tmp_path, kept):
    run, flags = whole
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    for step in range(kept + 1, 8):
        shutil.rmtree(cut / f"checkpoint-{step}")
    shutil.rmtree(cut / "pipeline")
    train(*flags, f"--output_dir={cut}", "--resume_from_checkpoint=latest")
    assert losses(cut) == losses(run)
    for name, tensor in weights(run / "pipeline").items():
        assert torch.equal(weights(cut / "pipeline")[name], tensor), name
    if kept == 5:
        with pytest.raises(ValueError, match="class_token_weight is 0.05, the run so far had 0.03"):
            train(*flags, "--class_token_weight=0.05", f"--output_dir={cut}", "--resume_from_checkpoint=latest")


def test_the_encoder_runs_on_where_the_alignment_stops(whole, tmp_path, tiny_flags, encoder_path):
    """For the class token, of the first encoder alone; the projectors rest."""
    _, flags = whole
    stop = ["--alignment_schedule=stop", "--alignment_stop_step=2", f"--encoder={encoder_path},{encoder_path}"]
    train(*flags, *stop, "--projector=conv", "--spatial_norm", f"--output_dir={tmp_path}/run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert ["alignment" in record for record in records] == [True] * 5 + [False] * 2
    assert all("class_token" in record for record in records[3:])
    flops = np.diff([record["flops"] for record in records]) / 4
    aligned, alone = flops[3], flops[5]
    without = [*tiny_flags, "--warmup_steps=0", "--alignment_weight=0", "--max_train_steps=2", "--encoder=none"]
    train(*without, f"--output_dir={tmp_path}/sit")
    plain = read_metrics(tmp_path / "sit" / "metrics.jsonl")[0]["flops"] / 4
    assert plain < alone < aligned
    # No alignment at all still needs the encoder, for what is drawn.
    train(*without[:-1], "--class_token_weight=0.03", f"--output_dir={tmp_path}/class")
    record = read_metrics(tmp_path / "class" / "metrics.jsonl")[-1]
    assert record["class_token"] > 0 and "alignment" not in record


def test_what_cannot_work_is_said_before_the_first_step(tmp_path, tiny_flags, vae_path, encoder_path, capsys):
    flags = [*tiny_flags, "--class_token_weight=0.03"]
    with pytest.raises(SystemExit):
        train(*flags, "--encoder=none", "--warmup_steps=0", f"--output_dir={tmp_path}/run")
    assert "class_token_weight needs an encoder" in capsys.readouterr().err
    config = SiglipVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    BitImageProcessorPil(size={"shortest_edge": 16}).save_pretrained(tmp_path / "siglip")
    for dry in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match="siglip.*has no class token"):
            train(*flags, f"--encoder={tmp_path}/siglip", f"--output_dir={tmp_path}/run", *dry)
    run_script(
        "cache_latents", "--dataset_name=digits", f"--vae={vae_path}", "--sample_size=8", "--patch_size=2",
        f"--encoder={encoder_path}", f"--output_dir={tmp_path}/cache",
    )  # fmt: skip
    cached = [*flags, f"--dataset_name={tmp_path}/cache", f"--vae={vae_path}", "--in_channels=4"]
    for dry in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match="holds no class tokens.*without --encoder"):
            train(*cached, f"--output_dir={tmp_path}/run", *dry)
    assert not (tmp_path / "run").exists()


def test_dry_run_and_probes_and_fid_during_training(tmp_path, tiny_flags, capsys):
    flags = [*tiny_flags, "--class_token_weight=0.03"]
    train(*flags, "--dry_run")
    assert "No problem was found" in capsys.readouterr().out
    train(
        *flags, "--probe_steps=3", "--probe_split=test", "--probe_samples=30", "--evaluation_steps=6",
        "--evaluation_samples=4", "--evaluation_reference=digits",
        "--evaluation_extractor=pipelines/digits-classifier", f"--output_dir={tmp_path}/run",
    )  # fmt: skip
    records = read_metrics(tmp_path / "run" / "evaluations.jsonl")
    assert [record["step"] for record in records] == [3, 6] and records[1]["fid"] > 0
    assert len(records[1]["probes"][0]["cknna"]) == 3
