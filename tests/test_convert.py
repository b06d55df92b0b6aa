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
"""Numerical parity with a plain-PyTorch statement of the published models, written here from their papers' equations:
independent of diffusers and of our model, with the published tensor names."""

import argparse
import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import run_forked
from safetensors.torch import load_file, save_file

from erw_hf import ERWTransformer2DModel
from erw_hf.conversion import read_checkpoint
from erw_hf.hub.convert import convert_checkpoint, main
from erw_hf.sizes import mlp_ratio


DIM, HEADS, LAYERS, PATCH, CHANNELS, GRID, CLASSES = 24, 2, 3, 2, 4, 4, 5
HEAD_DIM = DIM // HEADS


def position_table() -> torch.Tensor:
    """Fixed 2D sin-cos table (DiT, MAE): first half the column, second half the row, sines before cosines."""
    omega = 10000.0 ** (-torch.arange(DIM // 4, dtype=torch.float64) / (DIM / 4))
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    parts = []
    for axis in (columns, rows):
        angle = axis.reshape(-1, 1).double() * omega
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1)[None].float()


def rope_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """EVA's 2D table: first half of a head turns with the row, second with the column, pairs interleaved."""
    omega = 10000.0 ** (-torch.arange(0, HEAD_DIM // 2, 2).float() / (HEAD_DIM // 2))
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angle = torch.cat([axis.reshape(-1, 1) * omega.repeat_interleave(2) for axis in (rows, columns)], dim=1)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def state_dict(
    *, rope=False, qk_norm=None, rms=False, swiglu=False, learn_sigma=False, trained_variance=False, projectors=0,
    layers=LAYERS, reg=False,
):  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.15

    def linear(name, rows, columns):
        return {f"{name}.weight": random(rows, columns), f"{name}.bias": random(rows)}

    out_channels = CHANNELS * (2 if learn_sigma else 1)
    state = {
        "pos_embed": position_table(),
        "x_embedder.proj.weight": random(DIM, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": random(DIM),
        **linear("t_embedder.mlp.0", DIM, 256),
        **linear("t_embedder.mlp.2", DIM, DIM),
        "y_embedder.embedding_table.weight": random(CLASSES + 1, DIM),
        **linear("final_layer.linear", PATCH * PATCH * out_channels, DIM),
        **linear("final_layer.adaLN_modulation.1", 2 * DIM, DIM),
    }
    inner = int(DIM * 4 * 2 / 3) if swiglu else 4 * DIM
    for i in range(layers):
        state |= linear(f"blocks.{i}.attn.qkv", 3 * DIM, DIM) | linear(f"blocks.{i}.attn.proj", DIM, DIM)
        state |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * DIM, DIM)
        if swiglu:
            state |= linear(f"blocks.{i}.mlp.w12", 2 * inner, DIM) | linear(f"blocks.{i}.mlp.w3", DIM, inner)
        else:
            state |= linear(f"blocks.{i}.mlp.fc1", inner, DIM) | linear(f"blocks.{i}.mlp.fc2", DIM, inner)
        if qk_norm:
            for name in ("q_norm", "k_norm"):
                state[f"blocks.{i}.attn.{name}.weight"] = 1 + random(HEAD_DIM)
                if qk_norm == "layer_norm":
                    state[f"blocks.{i}.attn.{name}.bias"] = random(HEAD_DIM)
        if rms:
            state[f"blocks.{i}.norm1.weight"] = 1 + random(DIM)
            state[f"blocks.{i}.norm2.weight"] = 1 + random(DIM)
    if learn_sigma and not trained_variance:  # as nothing in SiT's loss reaches it
        for kind in ("weight", "bias"):
            state[f"final_layer.linear.{kind}"].unflatten(0, (PATCH * PATCH, out_channels))[:, CHANNELS:] = 0
    if rms:
        state["final_layer.norm_final.weight"] = 1 + random(DIM)
    if rope:
        state["feat_rope.freqs_cos"], state["feat_rope.freqs_sin"] = rope_tables()
    if reg:  # its class token has zeros in the position table
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, DIM), state["pos_embed"]], dim=1)
        state |= linear("cls_projectors2", DIM, CLASS_WIDTH) | linear("final_layer.linear_cls", CLASS_WIDTH, DIM)
        state |= {"wg_norm.weight": 1 + random(DIM), "wg_norm.bias": random(DIM)}
    for k in range(projectors):
        for j, (rows, columns) in zip((0, 2, 4), ((16, DIM), (16, 16), (12, 16)), strict=True):
            state |= linear(f"projectors.{k}.{j}", rows, columns)
    return state


def reference(state, x, t, labels, class_token=None):
    """The published forward pass: block of DiT Fig. 3, with SiT's inputs, LightningDiT's options and REG's token."""
    s = {name: tensor.double() for name, tensor in state.items()}
    rms = "final_layer.norm_final.weight" in s
    layers = 1 + max(int(name.split(".")[1]) for name in s if name.startswith("blocks."))

    def linear(name, value):
        return value @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(value, name):
        if rms:
            return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * s[f"{name}.weight"]
        return F.layer_norm(value, (value.shape[-1],), eps=1e-6)

    def head_norm(value, name):
        if f"{name}.bias" in s:
            return F.layer_norm(value, (HEAD_DIM,), s[f"{name}.weight"], s[f"{name}.bias"], eps=1e-5)
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * s[f"{name}.weight"]

    x, t = x.double(), t.double()
    batch = len(x)
    patches = (
        x.reshape(batch, CHANNELS, GRID, PATCH, GRID, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(batch, GRID**2, -1)
    )
    h = patches @ s["x_embedder.proj.weight"].reshape(DIM, -1).T + s["x_embedder.proj.bias"]
    if class_token is not None:
        token = linear("cls_projectors2", class_token.double())
        token = F.layer_norm(token, (DIM,), s["wg_norm.weight"], s["wg_norm.bias"], eps=1e-6)
        h = torch.cat([token[:, None], h], dim=1)
    h = h + s["pos_embed"]
    w = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    embedding = torch.cat([(t[:, None] * w).cos(), (t[:, None] * w).sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", embedding)))
    c = F.silu(c + s["y_embedder.embedding_table.weight"][labels])
    for i in range(layers):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation.1", c)[:, None].chunk(
            6, dim=-1
        )
        m = norm(h, f"{block}.norm1") * (1 + scale1) + shift1
        q, k, v = linear(f"{block}.attn.qkv", m).reshape(batch, -1, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        if f"{block}.attn.q_norm.weight" in s:
            q, k = head_norm(q, f"{block}.attn.q_norm"), head_norm(k, f"{block}.attn.k_norm")
        if "feat_rope.freqs_cos" in s:
            q, k = (rotate(value, s["feat_rope.freqs_cos"], s["feat_rope.freqs_sin"]) for value in (q, k))
        attention = (q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)).softmax(-1) @ v
        h = h + gate1 * linear(f"{block}.attn.proj", attention.transpose(1, 2).reshape(batch, -1, DIM))
        m = norm(h, f"{block}.norm2") * (1 + scale2) + shift2
        if f"{block}.mlp.w12.weight" in s:
            a, b = linear(f"{block}.mlp.w12", m).chunk(2, dim=-1)
            m = linear(f"{block}.mlp.w3", F.silu(a) * b)
        else:
            m = linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", m), approximate="tanh"))
        h = h + gate2 * m
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=-1)
    h = norm(h, "final_layer.norm_final") * (1 + scale) + shift
    out = linear("final_layer.linear", h[:, -(GRID**2) :])
    out = out.reshape(batch, GRID, GRID, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4)
    out = out.reshape(batch, -1, GRID * PATCH, GRID * PATCH)
    return out if class_token is None else (out, linear("final_layer.linear_cls", h[:, 0]))


def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, CHANNELS, GRID * PATCH, GRID * PATCH, generator=generator)
    return x, torch.tensor([0.0, 0.043, 0.5, 1.0]), torch.tensor([0, 3, 5, 1])


def relative_error(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


CLASS_WIDTH = 10
HEADS_GIVEN = {"num_attention_heads": HEADS}
SAME_TIME = {
    "repa": {"projectors": 1},
    "erw": {"rope": True, "projectors": 1},
    "erw-qk-norm": {"rope": True, "qk_norm": "layer_norm", "projectors": 2},
    "erw-without-projector": {"rope": True},
}
OTHER_TIME = {
    "sit": {"learn_sigma": True},
    "lightningdit": {"rope": True, "rms": True, "swiglu": True},
    "lightningdit-qk-norm": {"rope": True, "rms": True, "swiglu": True, "qk_norm": "rms_norm"},
}


@pytest.mark.parametrize("variant", SAME_TIME)
def test_parity_of_checkpoints_with_our_time(variant):
    state = state_dict(**SAME_TIME[variant])
    x, t, labels = inputs()
    model = convert_checkpoint(state, HEADS_GIVEN)
    assert isinstance(model, ERWTransformer2DModel) and not model.training
    with torch.no_grad():
        assert relative_error(model(x, t, labels).sample, reference(state, x, t, labels)) < 1e-5


@pytest.mark.parametrize("variant", OTHER_TIME)
def test_parity_of_checkpoints_whose_time_runs_the_other_way(variant):
    """On the whole model: ours at t is minus theirs at 1 - t, their variance channels gone."""
    state = state_dict(**OTHER_TIME[variant])
    x, t, labels = inputs()
    with torch.no_grad():
        ours = convert_checkpoint(state, HEADS_GIVEN)(x, t, labels).sample
    assert relative_error(ours, -reference(state, x, 1 - t.double(), labels)[:, :CHANNELS]) < 1e-5


def test_parity_of_regs_checkpoints():
    state = state_dict(projectors=1, reg=True)
    x, t, labels = inputs()
    class_token = torch.randn(4, CLASS_WIDTH, generator=torch.Generator().manual_seed(2))
    model = convert_checkpoint(state, HEADS_GIVEN)
    assert model.config.class_token_dim == CLASS_WIDTH and model.config.sample_size == GRID * PATCH
    with torch.no_grad():
        ours = model(x, t, labels, class_token=class_token)
    sample, velocity = reference(state, x, t, labels, class_token)
    assert relative_error(ours.sample, sample) < 1e-5 and relative_error(ours.class_token, velocity) < 1e-5
    state["pos_embed"][:, 0] = 1
    with pytest.raises(ValueError, match="'pos_embed' differs from the fixed table"):
        convert_checkpoint(state, HEADS_GIVEN)


def test_the_direction_of_time_can_be_said():
    state = state_dict()
    x, t, labels = inputs()
    with torch.no_grad():
        reversed_time = convert_checkpoint(state, {**HEADS_GIVEN, "time_reversed": True})(x, t, labels).sample
        same_time = convert_checkpoint(state, HEADS_GIVEN)(x, t, labels).sample
    assert relative_error(reversed_time, -reference(state, x, 1 - t.double(), labels)) < 1e-5
    assert relative_error(same_time, reference(state, x, t, labels)) < 1e-5


@pytest.mark.parametrize("reversed_time", [False, True])
def test_a_network_that_predicts_samples_can_be_said(reversed_time):
    """What it predicts has no direction of time, the model's velocity has."""
    state = state_dict()
    x, t, labels = inputs()
    t = t.clamp(min=0.1)
    said = {**HEADS_GIVEN, "prediction_type": "sample", "time_reversed": reversed_time}
    with torch.no_grad():
        velocity = convert_checkpoint(state, said)(x, t, labels).sample
    predicted = reference(state, x, 1 - t.double() if reversed_time else t, labels)
    assert relative_error(velocity, (x - predicted) / t.view(-1, 1, 1, 1)) < 1e-5
    assert "prediction: sample" in read_checkpoint(state, said).facts
    assert (
        "prediction: velocity (tensors do not tell; architecture would)" in read_checkpoint(state, HEADS_GIVEN).facts
    )
    with pytest.raises(ValueError, match='prediction_type must be "velocity" or "sample"'):
        read_checkpoint(state, {**HEADS_GIVEN, "prediction_type": "noise"})


def test_what_files_of_parameters_alone_do_not_tell_can_be_said():
    state = state_dict(rope=True, projectors=1)
    x, t, labels = inputs()
    expected = convert_checkpoint(state, HEADS_GIVEN)(x, t, labels).sample
    alone = {name: value for name, value in state.items() if not name.startswith("feat_rope.")}
    said = convert_checkpoint(alone, {**HEADS_GIVEN, "use_rope": True})
    assert torch.equal(said(x, t, labels).sample, expected)
    assert "positions: sin-cos and rotary" in read_checkpoint(state, HEADS_GIVEN).facts
    exact = read_checkpoint(state, {**HEADS_GIVEN, "activation_fn": "gelu"})
    assert exact.config["activation_fn"] == "gelu" and "activation: gelu" in exact.facts
    assert "activation: gelu-approximate (assumed)" in read_checkpoint(state, HEADS_GIVEN).facts
    parameters = {name: value for name, value in alone.items() if name != "pos_embed"}
    facts = read_checkpoint(parameters, {**HEADS_GIVEN, "sample_size": 8}).facts
    assert any(fact.startswith("positions: sin-cos, none rotary (a file of parameters") for fact in facts)
    with pytest.raises(ValueError, match="the checkpoint's tensors say 'swiglu'"):
        read_checkpoint(state_dict(swiglu=True), {**HEADS_GIVEN, "activation_fn": "gelu"})


def test_odd_containers():
    state = state_dict()
    doubled = {**state, "module.final_layer.linear.bias": state["final_layer.linear.bias"] + 1}
    with pytest.raises(ValueError, match="two tensors 'final_layer.linear.bias'"):
        read_checkpoint(doubled, HEADS_GIVEN)
    plain = read_checkpoint(state, HEADS_GIVEN)
    for odd in (
        {name: value.numpy() for name, value in state.items()},
        {**state, "step": torch.tensor([7])},
        {"model": state, "ema_decay": 0.9999},
    ):
        read = read_checkpoint(odd, HEADS_GIVEN)
        assert all(torch.equal(value, plain.transformer[name]) for name, value in read.transformer.items())
        assert not any("averaged" in fact for fact in read.facts)
    with pytest.raises(ValueError, match="a path or a state dict, not a Linear"):
        read_checkpoint(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "last.pt.gz", "weights.npz"])
def test_files_that_are_no_checkpoints_are_named(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="name a .pt or .safetensors file"):
        read_checkpoint(tmp_path / name)


def test_the_command_does_not_write_over_its_checkpoint(tmp_path, capsys):
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(state_dict(), file)
    before = file.read_bytes()
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(file), "--output_dir", str(tmp_path), "--architecture", json.dumps(HEADS_GIVEN)])
    assert "would replace the checkpoint" in capsys.readouterr().err and file.read_bytes() == before


def test_ema_is_preferred_and_other_entries_are_ignored():
    ema, other = state_dict(projectors=1), {name: tensor + 1 for name, tensor in state_dict(projectors=1).items()}
    checkpoint = {
        "model": other,
        "ema": ema,
        "opt": {"state": {}},
        "args": argparse.Namespace(model="SiT"),
        "steps": 7,
    }
    x, t, labels = inputs()
    with torch.no_grad():
        sample = convert_checkpoint(checkpoint, HEADS_GIVEN)(x, t, labels).sample
    assert relative_error(sample, reference(ema, x, t, labels)) < 1e-5


def test_published_widths_know_their_heads():
    with torch.device("meta"):
        model = ERWTransformer2DModel(num_layers=1)
    converted = read_checkpoint(_xl_state())
    assert converted.config["num_attention_heads"] == 16 and converted.config["attention_head_dim"] == 72
    assert converted.config["sample_size"] == 32 and converted.config["num_classes"] == 1000
    assert set(converted.transformer) == set(model.state_dict())


def _xl_state():
    dim = 1152
    table = ERWTransformer2DModel(num_layers=0).pos_embed.pos_embed
    shapes = {
        "x_embedder.proj": (dim, 4, 2, 2), "t_embedder.mlp.0": (dim, 256), "t_embedder.mlp.2": (dim, dim),
        "blocks.0.attn.qkv": (3 * dim, dim), "blocks.0.attn.proj": (dim, dim), "blocks.0.mlp.fc1": (4 * dim, dim),
        "blocks.0.mlp.fc2": (dim, 4 * dim), "blocks.0.adaLN_modulation.1": (6 * dim, dim),
        "final_layer.linear": (32, dim), "final_layer.adaLN_modulation.1": (2 * dim, dim),
    }  # fmt: skip
    state = {"pos_embed": table, "y_embedder.embedding_table.weight": torch.zeros(1001, dim)}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": torch.zeros(shape), f"{name}.bias": torch.zeros(shape[0])}
    return state


@pytest.mark.parametrize(
    ("change", "architecture", "message"),
    [
        ({"blocks.1.attn.rel_pos": torch.zeros(3)}, HEADS_GIVEN, "unknown tensor 'blocks.1.attn.rel_pos'"),
        ({"blocks.1.attn.proj.bias": None}, HEADS_GIVEN, "missing .*transformer_blocks.1.attn.to_out.0.bias"),
        ({"blocks.1.attn.proj.bias": torch.zeros(3)}, HEADS_GIVEN, r"'blocks.1.attn.proj.bias' is \(3,\)"),
        ({"t_embedder.mlp.0.weight": torch.zeros(DIM, 9)}, HEADS_GIVEN, r"\(24, 9\) in the checkpoint"),
        ({"x_embedder.proj.weight": None}, HEADS_GIVEN, "not hold a SiT, REPA, REG, ERW or LightningDiT checkpoint"),
        ({"pos_embed": torch.ones(1, GRID**2, DIM)}, HEADS_GIVEN, "differs from the fixed table"),
        ({"pos_embed": None}, HEADS_GIVEN, "sample_size"),
        ({}, {}, "no published size"),
        ({}, {"num_attention_heads": 5}, "does not divide"),
        ({}, {**HEADS_GIVEN, "patch_size": 4}, "architecture says patch_size=4"),
        ({}, {"num_atention_heads": 2}, "unknown key 'num_atention_heads', did you mean 'num_attention_heads'?"),
        ({}, {"num_attention_heads": 0}, "num_attention_heads=0, it must be a whole number of at least 1"),
        ({}, {"num_attention_heads": "2"}, "num_attention_heads='2', it must be a whole number"),
        ({}, {**HEADS_GIVEN, "time_reversed": "yes"}, "time_reversed='yes', it must be true or false"),
        ({}, {**HEADS_GIVEN, "num_classes": 7}, "num_classes=7, the checkpoint's table has 6 rows"),
        ({}, ["num_attention_heads"], "must be a dict"),
        ({"y_embedder.embedding_table.weight": None}, HEADS_GIVEN, "no classes, 'y_embedder.*num_classes"),
        ({"x_embedder.proj.weight": torch.zeros(DIM, 16)}, HEADS_GIVEN, r"'x_embedder.proj.weight' is \(24, 16\)"),
        ({"blocks.0.mlp.fc2.weight": None}, HEADS_GIVEN, "'blocks.0.mlp.fc2.weight' is missing"),
        ({"final_layer.linear.bias": None}, HEADS_GIVEN, "missing .*proj_out.bias"),
        ({"pos_embed": torch.zeros(())}, HEADS_GIVEN, r"'pos_embed' is \(\)"),
        ({"t_embedder.mlp.0.weight": torch.zeros(DIM * 256)}, HEADS_GIVEN, r"'t_embedder.mlp.0.weight' is \(6144,\)"),
        ({"blocks.1.attn.qkv.bias": torch.zeros(1)}, HEADS_GIVEN, r"'blocks.1.attn.qkv.bias' is \(1,\)"),
        ({"final_layer.linear.bias": torch.zeros(3)}, HEADS_GIVEN, r"'final_layer.linear.bias' is \(3,\)"),
        ({"y_embedder.embedding_table.weight": torch.zeros(0, DIM)}, HEADS_GIVEN, r"table.weight' is \(0, 24\)"),
        ({"blocks.3000.attn.proj.bias": torch.zeros(DIM)}, HEADS_GIVEN, "4 blocks, numbered up to 3000"),
        ({}, {**HEADS_GIVEN, "noise_scale": "2"}, "noise_scale='2', it must be a number"),
        ({"blocks.0.attn.proj.bias": torch.full((DIM,), torch.nan)}, HEADS_GIVEN, "proj.bias' holds NaN or infinity"),
        ({"blocks.0.attn.proj.weight": torch.zeros(DIM, DIM, dtype=torch.int8)}, HEADS_GIVEN, "quantized"),
    ],
)
def test_what_does_not_fit_raises(change, architecture, message):
    state = state_dict(projectors=1)
    for name, tensor in change.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(state, architecture)


def test_a_warmup_is_no_model():
    state = {name: tensor for name, tensor in state_dict(layers=2, projectors=1).items() if "final_layer" not in name}
    with pytest.raises(ValueError, match="--warmup_from"):
        convert_checkpoint({"model": state, "args": argparse.Namespace()}, HEADS_GIVEN)
    converted = read_checkpoint({"model": state}, HEADS_GIVEN)
    assert converted.is_warmup and converted.config["num_layers"] == 2
    assert "projectors.0.layers.4.bias" in converted.projectors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_checkpoints_of_any_precision_are_read(dtype):
    state = {name: tensor.to(dtype) for name, tensor in state_dict(rope=True, projectors=1).items()}
    exact = convert_checkpoint({name: tensor.float() for name, tensor in state.items()}, HEADS_GIVEN)  # rounded before
    converted = read_checkpoint(state, HEADS_GIVEN)
    assert any(fact.startswith(f"dtype: {str(dtype).removeprefix('torch.')}") for fact in converted.facts)
    assert all(torch.equal(tensor, converted.transformer[name]) for name, tensor in exact.state_dict().items())
    state["pos_embed"] = state["pos_embed"].float().flip(1).to(dtype)
    with pytest.raises(ValueError, match="'pos_embed' differs from the fixed table"):
        convert_checkpoint(state, HEADS_GIVEN)


def renamed(state, function):
    return {function(name): tensor for name, tensor in state.items()}


def inside_blocks(wrapper):
    return lambda name: f"module.{name.replace('.attn.', f'.{wrapper}.attn.')}"


CONTAINERS = {
    "compiled blocks": lambda s, o: renamed(s, inside_blocks("_orig_mod")),
    "fsdp": lambda s, o: {"model": renamed(s, lambda name: f"_fsdp_wrapped_module.{inside_blocks('_fsdp_wrapped_module')(name)}")},
    "checkpointing": lambda s, o: {"state_dict": renamed(s, inside_blocks("_checkpoint_wrapped_module"))},
    "lightning": lambda s, o: {
        "state_dict": renamed(o, lambda n: f"model.{n}") | renamed(s, lambda n: f"ema_model.{n}") | {"vae.x": torch.ones(3)},
        "callbacks": {"ModelCheckpoint": {"best": torch.zeros(())}}, "epoch": 3,
    },
    "ema of a callback": lambda s, o: {"state_dict": renamed(o, lambda n: f"net.{n}"), "callbacks": {"EMA": {"ema_state_dict": s}}},
    "ema_state_dict": lambda s, o: {"model_state_dict": o, "ema_state_dict": s},
    "model_ema": lambda s, o: {"model": o, "model_ema": renamed(s, lambda n: f"module.{n}")},
    "averaged": lambda s, o: {"net": o, "ema": renamed(s, lambda n: f"module.{n}") | {"n_averaged": torch.tensor(7)}},
    "ema without tables": lambda s, o: {"model": o | {"pos_embed": s["pos_embed"]}, "ema": {n: t for n, t in s.items() if n != "pos_embed"}},
    "empty ema": lambda s, o: {"ema": {}, "model": s},
    "partial ema": lambda s, o: {"ema": {n: t for n, t in o.items() if "blocks.2" not in n}, "model": s},
    "empty ema inside": lambda s, o: {"checkpoint": {"ema": {}, "model": s}},
    "ema as a list": lambda s, o: {"ema": {"shadow_params": list(o.values())}, "model": s},
    "a module of that name": lambda s, o: {"schema": o | {"x_embedder.proj.weight": None}, "model": s},
}  # fmt: skip


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_weights_are_found_wherever_they_lie(container):
    """Behind the prefixes of wrappers, under the names of trainers; the average where it is whole."""
    state = state_dict(projectors=1)
    other = {name: tensor + 1 for name, tensor in state.items()}
    converted = read_checkpoint(CONTAINERS[container](state, other), HEADS_GIVEN)
    expected = read_checkpoint(state, HEADS_GIVEN)
    assert all(torch.equal(tensor, expected.transformer[name]) for name, tensor in converted.transformer.items())
    assert converted.transformer.keys() == expected.transformer.keys()
    assert any("averaged weights: not taken" in fact for fact in converted.facts) == (
        container in ("empty ema", "partial ema", "empty ema inside", "ema as a list")
    )


def test_what_was_seen_is_named_where_no_model_is_found():
    with pytest.raises(ValueError, match=r"It holds 'params' \(with 'down.weight', …\), 'step'"):
        convert_checkpoint({"params": {"down.weight": torch.zeros(2)}, "step": 7})
    with pytest.raises(ValueError, match="It holds nothing"):
        convert_checkpoint({})


def test_dit_is_not_taken_for_sit():
    """Its files have the very tensors; what it trains and SiT does not are the variance channels."""
    dit = state_dict(learn_sigma=True, trained_variance=True)
    with pytest.raises(ValueError, match="checkpoint of DiT, since its variance channels.*DiTPipeline.*time_reversed"):
        convert_checkpoint(dit, HEADS_GIVEN)
    with pytest.raises(ValueError, match="checkpoint of DiT-XL/2: .*DDPM"):
        convert_checkpoint({"ema": state_dict(), "args": argparse.Namespace(model="DiT-XL/2")}, HEADS_GIVEN)
    converted = read_checkpoint(dit, {**HEADS_GIVEN, "time_reversed": True})
    assert "time: t = 1 is data, reversed here (as architecture says)" in converted.facts


def test_a_table_without_a_null_class():
    state = state_dict(projectors=1)
    state["y_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"][:CLASSES].clone()
    x, t, labels = inputs()
    assert "classes: 4, and the null class" in read_checkpoint(state, HEADS_GIVEN).facts
    converted = read_checkpoint(state, {**HEADS_GIVEN, "num_classes": CLASSES})
    assert any("no null class" in fact for fact in converted.facts) and converted.config["class_dropout_prob"] == 0
    model = convert_checkpoint(state, {**HEADS_GIVEN, "num_classes": CLASSES})
    with torch.no_grad():
        assert relative_error(model(x, t, labels % CLASSES).sample, reference(state, x, t, labels % CLASSES)) < 1e-5
    del state["y_embedder.embedding_table.weight"]
    unconditional = convert_checkpoint(state, {**HEADS_GIVEN, "num_classes": 0})
    state["y_embedder.embedding_table.weight"] = torch.zeros(1, DIM)
    with torch.no_grad():
        assert relative_error(unconditional(x, t).sample, reference(state, x, t, labels * 0)) < 1e-5


class Hostile:
    def __reduce__(self):
        return (open, ("hostile-was-here", "w"))


def test_command_writes_model_and_projectors(tmp_path):
    state = state_dict(projectors=1)
    torch.save({"ema": state, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "last.pt")
    command = ["-m", "erw_hf.hub.convert", "--checkpoint", "last.pt", "--output_dir", "out"]
    command += ["--architecture", '{"num_attention_heads": 2}']
    result = run_forked(*command, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "dropped on purpose: pos_embed" in result.stdout
    x, t, labels = inputs()
    with torch.no_grad():
        sample = ERWTransformer2DModel.from_pretrained(tmp_path / "out")(x, t, labels).sample
    assert relative_error(sample, reference(state, x, t, labels)) < 1e-5
    projectors = load_file(tmp_path / "out" / "projectors.safetensors")
    assert torch.equal(projectors["projectors.0.layers.0.weight"], state["projectors.0.0.weight"])


def convert_into(folder, *flags):
    main(
        [
            "--checkpoint",
            "last.pt",
            "--output_dir",
            str(folder),
            "--architecture",
            '{"num_attention_heads": 2}',
            *flags,
        ]
    )


def test_command_replaces_an_earlier_conversion_or_leaves_it_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(state_dict(projectors=1), "last.pt")
    convert_into("out")
    assert "time: t = 0 is data (inferred" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # a disk that fills up
        patch.setattr("erw_hf.hub.convert.save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        for folder in ("out", "new"):
            with pytest.raises(SystemExit):
                convert_into(folder)
            assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "new").exists()
    (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    torch.save(state_dict(), "last.pt")
    convert_into("out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("output_dir", ["last.pt", "last.pt/out"])
def test_command_says_where_it_cannot_write(tmp_path, monkeypatch, capsys, output_dir):
    monkeypatch.chdir(tmp_path)
    torch.save(state_dict(projectors=1), "last.pt")
    with pytest.raises(SystemExit) as end:
        convert_into(output_dir)
    printed = capsys.readouterr()
    assert end.value.code == 1 and "last.pt" in printed.err and "wrote" not in printed.out


def test_command_refuses_an_architecture_that_is_not_json(capsys):
    for text in ("num_attention_heads=2", "[2]"):
        with pytest.raises(SystemExit):
            main(["--checkpoint", "last.pt", "--output_dir", "out", "--architecture", text])
        assert "is not " in capsys.readouterr().err


def test_plain_values_beside_the_weights_are_read(tmp_path):
    beside = {"fid": np.float64(2.1), "mean": np.zeros(3, dtype=np.float32), "args": argparse.Namespace(out=tmp_path)}
    torch.save({"ema": state_dict(), **beside}, tmp_path / "last.pt")
    assert read_checkpoint(tmp_path / "last.pt", HEADS_GIVEN).config["num_layers"] == LAYERS


def test_a_file_is_what_it_holds_whatever_its_name(tmp_path):
    save_file(state_dict(), tmp_path / "last.pt")
    torch.save(state_dict(), tmp_path / "last.safetensors")
    for path in tmp_path.iterdir():
        assert read_checkpoint(path, HEADS_GIVEN).config["num_layers"] == LAYERS
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><title>Sign in</title>")
    with pytest.raises(ValueError, match="is a web page"):
        read_checkpoint(tmp_path / "page.pt")
    with pytest.raises(ValueError, match="is a folder: name the file in it"):
        read_checkpoint(tmp_path)


def test_projectors_of_one_storage_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = state_dict(projectors=2)
    state["projectors.1.0.weight"] = state["projectors.0.0.weight"].T.contiguous().T
    state["projectors.1.2.weight"] = state["projectors.0.2.weight"]
    torch.save(state, "last.pt")
    convert_into(tmp_path / "out")
    assert len(load_file("out/projectors.safetensors")) == 12


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    for name in ("last.pt", "model.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        with pytest.raises(ValueError, match="is a pointer of Git LFS.*git lfs pull"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("kind", ["hostile", "truncated", "text", "legacy-hostile", "list", "safetensors", "absent"])
def test_damaged_and_hostile_files_are_refused_and_leave_nothing(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("bad.safetensors" if kind == "safetensors" else "bad.pt")
    if kind == "hostile":
        torch.save({"ema": state_dict(projectors=1), "args": Hostile()}, path)
    elif kind == "legacy-hostile":
        path.write_bytes(pickle.dumps({"ema": Hostile()}))
    elif kind == "truncated":
        torch.save({"ema": state_dict(projectors=1)}, path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    elif kind in ("text", "safetensors"):
        path.write_text("404: Not Found")
    with pytest.raises(SystemExit) as end:
        main(["--checkpoint", str(path), "--output_dir", "out", "--architecture", '{"num_attention_heads": 2}'])
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "weights_only=False" not in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "hostile-was-here").exists()


def test_a_state_dict_of_another_device_is_read_and_one_without_data_named():
    on_meta = {name: tensor.to("meta") for name, tensor in state_dict().items()}
    with pytest.raises(ValueError, match="holds no data: '.*' is on the meta device"):
        convert_checkpoint(on_meta, HEADS_GIVEN)
    trained = {name: torch.nn.Parameter(tensor) for name, tensor in state_dict().items()}
    assert not any(tensor.requires_grad for tensor in read_checkpoint(trained, HEADS_GIVEN).transformer.values())


def test_a_learned_table_of_positions_can_be_said():
    state = state_dict() | {"pos_embed": torch.randn(1, GRID**2, DIM)}
    with pytest.raises(ValueError, match="'pos_embed' differs from the fixed table"):
        convert_checkpoint(state, HEADS_GIVEN)
    model = convert_checkpoint(state, {**HEADS_GIVEN, "pos_embed_type": "learned"})
    assert torch.equal(model.pos_embed.pos_embed, state["pos_embed"])


@pytest.mark.parametrize(("inner", "width"), [(480, 176), (1840, 448), (3680, 896), (4304, 1152), (4096, 1024)])
def test_the_inferred_ratio_gives_the_width_of_the_feed_forward(inner, width):
    assert int(width * mlp_ratio(inner, width)) == inner
