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
"""A model whose first blocks are an encoder's own: exact for each family, in the library and in a run."""

import json
import math

import pytest
import torch
import transformers
from helpers import TINY_MODEL, randomize, train
from safetensors.torch import load_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from erw_hf import ERWTransformer2DModel, RepresentationEncoder
from erw_hf.encoders import vit_blocks
from erw_hf.hub.cards import run_card
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.initialization import load_initial
from erw_hf.trainer.run_record import read_metrics
from erw_hf.trainer.setup import fit_to_encoder
from erw_hf.warmup import build_warmup_transformer, encoder_options, start_from_encoder


VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
FAMILIES = {  # of the config; the activation and epsilon that its blocks have, unless said
    "Dinov2": ({}, "gelu", 1e-6),
    "Dinov2WithRegisters": ({"num_register_tokens": 4}, "gelu", 1e-6),
    "ViT": ({"intermediate_size": 64}, "gelu", 1e-12),  # DINO
    "ViTMAE": ({"intermediate_size": 64}, "gelu", 1e-12),
    "CLIPVision": ({"intermediate_size": 64}, "geglu-approximate", 1e-5),
    "SiglipVision": ({"intermediate_size": 64}, "gelu-approximate", 1e-6),
    "DINOv3ViT": ({"intermediate_size": 64, "num_register_tokens": 4}, "gelu", 1e-5),
}


def vit(family="Dinov2", **changes):
    """Random, norms, LayerScales and biases too."""
    config = getattr(transformers, f"{family}Config")(**{**VIT, **FAMILIES[family][0], **changes})
    return randomize(getattr(transformers, f"{family}Model")(config), seed=1).eval()


def encoder_of(model, grid=4, **options):
    return RepresentationEncoder(model, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], grid, **options)


def model(grid=4, in_channels=3, **changes):
    config = {**TINY_MODEL, "patch_size": 4, "sample_size": 4 * grid, "in_channels": in_channels, **changes}
    return randomize(ERWTransformer2DModel(**config)).eval()


def images(grid=4, channels=3):
    return torch.rand(2, channels, 4 * grid, 4 * grid, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def without_class_token(encoder, pixels, embedded, depth):
    """The encoder's own blocks on patch tokens alone; its table and registers are left to `embedded`."""
    kwargs = {}
    for module in encoder.model.modules():
        if type(module).__name__ == "DINOv3ViTRopePositionEmbedding":
            kwargs["position_embeddings"] = module(pixels)
    states = []
    for block in vit_blocks(encoder.model)[:depth]:
        embedded = block(embedded, attention_mask=None, **kwargs)
        embedded = embedded[0] if isinstance(embedded, tuple) else embedded
        states.append(embedded)
    return states


@torch.no_grad()
def embedded_by(encoder, pixels):
    """Its patch embedding and positions, of the patches alone, by its own embedding module."""
    kwargs = {"interpolate_pos_encoding": True} if encoder._forward_kwargs else {}
    if encoder._shuffles:
        kwargs["noise"] = torch.arange(encoder.token_grid**2).float().expand(len(pixels), -1)
    embedded = encoder.model.embeddings(pixels, **kwargs)
    embedded = embedded[0] if isinstance(embedded, tuple) else embedded
    return embedded[:, encoder.num_prefix_tokens :]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("grid", [4, 6])  # the encoder's own, and one that its positions are resampled to
@pytest.mark.parametrize("family", FAMILIES)
def test_early_tokens_are_the_encoders_without_its_class_token(family, grid, channels):
    encoder = encoder_of(vit(family), grid)
    transformer = model(grid, channels)
    names = start_from_encoder(transformer, encoder, 2)
    x = images(grid, channels)
    pixels = (x.expand(-1, 3, -1, -1) - encoder.image_mean) / encoder.image_std
    if family == "CLIPVision":  # a norm after its patch embedding: the model keeps its own
        assert "pos_embed.proj.weight" not in names
        embedded = transformer.pos_embed(2 * x - 1)
    else:
        embedded = embedded_by(encoder, pixels)
    expected = without_class_token(encoder, pixels, embedded, 2)
    output = transformer(2 * x - 1, torch.rand(2), torch.tensor([1, 2]), hidden_states_depths=(1, 2))
    for ours, theirs in zip(output.hidden_states, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-6
    _, activation, eps = FAMILIES[family]
    config = transformer.config
    assert (config.activation_fn, config.norm_eps, config.pos_embed_type) == (activation, eps, "learned")


def test_an_encoder_without_a_class_token_is_met_whole():
    encoder, depth_2 = encoder_of(vit("SiglipVision")), encoder_of(vit("SiglipVision"), depth=2)
    transformer = model()
    start_from_encoder(transformer, encoder, 2)
    x = images()
    ours = transformer(2 * x - 1, torch.rand(2), hidden_states_depths=(2,), tokens_only=True).hidden_states[0]
    torch.testing.assert_close(ours, depth_2(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_of_some_depth_gives_the_tokens_after_that_block(family):
    x = images()
    whole, cut = encoder_of(vit(family)), encoder_of(vit(family), depth=2)
    pixels = (x - whole.image_mean) / whole.image_std
    kwargs = dict(whole._forward_kwargs)
    if whole._shuffles:
        kwargs["noise"] = torch.arange(16).float().expand(2, -1)
    with torch.no_grad():
        states = whole.model(pixels, output_hidden_states=True, **kwargs).hidden_states
    torch.testing.assert_close(cut(x), states[2][:, whole.num_prefix_tokens :])
    assert len(vit_blocks(cut.model)) == 2
    with pytest.raises(ValueError, match=r"depth 4 must lie in \[1, 3\]"):
        encoder_of(vit(family), depth=4)


def test_only_what_is_the_encoders_changes_and_the_model_is_saved_as_what_it_is(tmp_path):
    transformer = model()
    transformer.proj_out.requires_grad_(False)
    parameters = dict(transformer.named_parameters())
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    names = start_from_encoder(transformer, encoder_of(vit()), 2)
    after = transformer.state_dict()
    assert set(after) - set(before) == {"pos_embed.pos_embed"}
    assert all(torch.equal(after[name], before[name]) for name in set(before) - set(names))
    own = dict(transformer.named_parameters())
    assert all(own[name] is parameter for name, parameter in parameters.items())  # those an optimizer may hold
    assert not own["proj_out.weight"].requires_grad and own["pos_embed.pos_embed"].requires_grad
    assert not transformer.training

    transformer.save_pretrained(tmp_path)
    loaded = ERWTransformer2DModel.from_pretrained(tmp_path)
    x, t = images(), torch.rand(2)
    assert torch.equal(loaded(x, t).sample, transformer(x, t).sample)
    with pytest.raises(ValueError, match="16x16, got 32x32"):
        loaded(images(8), t)


def test_a_model_in_bf16_takes_the_blocks_in_bf16():
    transformer = model().to(torch.bfloat16)
    start_from_encoder(transformer, encoder_of(vit()), 1)
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    assert transformer(images().bfloat16(), torch.rand(2)).sample.dtype == torch.bfloat16


def test_antialiased_positions_and_the_parts_without_a_bias():
    transformer, encoder = model(6), encoder_of(vit(), 6, antialias_positions=True)
    start_from_encoder(transformer, encoder, 1)
    assert torch.equal(transformer.pos_embed.pos_embed, encoder.model.embeddings.position_embeddings[:, 1:])
    start_from_encoder(model(), encoder_of(vit("ViT", qkv_bias=False)), 1)
    bare = {f"{part}_bias": False for part in ("query", "key", "value", "proj", "mlp")}
    start_from_encoder(model(), encoder_of(vit("DINOv3ViT", **bare)), 1)


def test_on_latents_the_patch_embedding_stays():
    transformer = model()
    before = transformer.pos_embed.proj.weight.clone()
    names = start_from_encoder(transformer, encoder_of(vit()), 1, with_patch_embedding=False)
    assert torch.equal(transformer.pos_embed.proj.weight, before) and "pos_embed.pos_embed" in names
    latents = model(4, 4, patch_size=2, sample_size=8)  # other patches: by itself
    assert "pos_embed.proj.weight" not in start_from_encoder(latents, encoder_of(vit()), 1)
    narrow = model(patch_bottleneck_dim=3)  # whose rank the encoder's has not
    assert not any("pos_embed.proj" in name for name in start_from_encoder(narrow, encoder_of(vit()), 1))
    for transformer in (latents, narrow):
        with pytest.raises(ValueError, match="set with_patch_embedding to False"):
            start_from_encoder(transformer, encoder_of(vit()), 1, with_patch_embedding=True)


@pytest.mark.parametrize(
    ("encoder", "changes", "message"),
    [
        ({}, {"num_attention_heads": 4, "attention_head_dim": 4}, "num_attention_heads=2, the model 4.*2 heads of 8"),
        ({"hidden_size": 32}, {}, "attention_head_dim=16"),
        ({"hidden_size": 384, "num_attention_heads": 6}, {}, "fits: SiT-S, 6 heads of 64"),
        ({"mlp_ratio": 2}, {}, "mlp_ratio=2.0, the model 4.0"),
        ({"use_swiglu_ffn": True}, {}, "gated"),
        ({"hidden_act": "relu"}, {}, "activation relu"),
        ({}, {"qk_norm": "rms_norm"}, "qk_norm=None, the model 'rms_norm'"),
        ({}, {"norm_type": "rms_norm"}, "norm_type='layer_norm'"),
        ({}, {"activation_fn": "swiglu"}, "activation_fn='gelu', the model 'swiglu'"),
        ({}, {"use_rope": True}, "use_rope=False, the model True"),
        ({}, {"num_layers": 1}, r"depth 2 must lie in \[1, 1\]"),
        ({}, {"sample_size": 24}, "4x4 tokens, the model has 6"),
    ],
)
def test_what_does_not_fit_says_what_does(encoder, changes, message):
    transformer = model(**changes)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        start_from_encoder(transformer, encoder_of(vit(**encoder)), 2)
    after = transformer.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("width", [1152, 176, 100])  # SigLIP-so400m, and others whose ratio is no short number
def test_the_ratio_that_is_advised_fits(width):
    inner = round(width * 3.736)
    config = transformers.ViTConfig(**VIT | {"hidden_size": width, "num_attention_heads": 2}, intermediate_size=inner)
    given = TINY_MODEL | {"num_attention_heads": 2, "attention_head_dim": width // 2}
    defaults = dict(ERWTransformer2DModel(**TINY_MODEL).config)
    with pytest.raises(ValueError, match="mlp_ratio") as error:
        encoder_options(config, {**defaults, **given})
    advised = float(str(error.value).split("channels, mlp_ratio ")[1].split(",")[0])
    encoder_options(config, {**defaults, **given, "mlp_ratio": advised})
    assert int(width * advised) == inner


def test_adapters_are_not_lost_and_attention_stays_as_it_was_set():
    from peft import LoraConfig

    transformer = model()
    transformer.set_attention_backend("native")
    processors = transformer.attn_processors
    start_from_encoder(transformer, encoder_of(vit()), 1)
    assert transformer.attn_processors == processors
    transformer = model()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="would lose the adapters"):
        start_from_encoder(transformer, encoder_of(vit()), 1)


def test_encoders_of_another_kind_are_refused():
    config = transformers.BeitConfig(**VIT, intermediate_size=64)
    with pytest.raises(ValueError, match="is a beit"):
        start_from_encoder(model(), encoder_of(transformers.BeitModel(config)), 1)
    resnet = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=4, hidden_sizes=[8, 16], depths=[1, 1]))
    with pytest.raises(ValueError, match="is not a ViT"):
        start_from_encoder(model(), RepresentationEncoder(resnet, [0.5] * 3, [0.5] * 3, 4), 1)


# --- A learned table of positions


def test_a_learned_table_starts_as_the_fixed_one_and_is_a_weight():
    fixed, learned = ERWTransformer2DModel(**TINY_MODEL), ERWTransformer2DModel(**TINY_MODEL, pos_embed_type="learned")
    assert "pos_embed.pos_embed" not in fixed.state_dict()
    assert torch.equal(fixed.pos_embed.pos_embed, learned.pos_embed.pos_embed)
    assert "pos_embed.pos_embed" in dict(learned.named_parameters())
    assert "pos_embed.pos_embed" in dict(build_warmup_transformer(learned.config, 1).named_parameters())
    randomize(learned)(torch.rand(1, 1, 8, 8), torch.rand(1)).sample.sum().backward()
    assert learned.pos_embed.pos_embed.grad.abs().sum() > 0


def test_a_learned_table_of_another_size_is_resampled(tmp_path):
    from erw_hf import ERWPipeline, FlowMatchEulerMaruyamaScheduler

    config = {**TINY_MODEL, "pos_embed_type": "learned"}
    transformer = randomize(ERWTransformer2DModel(**config))
    ERWPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler()).save_pretrained(tmp_path)
    state = load_initial(str(tmp_path), dict(transformer.config) | {"sample_size": 16}, None)
    ERWTransformer2DModel(**config | {"sample_size": 16}).load_state_dict(state)
    same = load_initial(str(tmp_path), dict(transformer.config), None)
    torch.testing.assert_close(same["pos_embed.pos_embed"], transformer.pos_embed.pos_embed.detach())


# --- Runs


@pytest.fixture(scope="module")
def pixel_encoder(tmp_path_factory):
    """A DINOv2 whose patches are as large as the tiny model's."""
    folder = tmp_path_factory.mktemp("encoder-2px")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=2, image_size=8)
    randomize(Dinov2Model(config), seed=1).save_pretrained(folder)
    BitImageProcessorPil().save_pretrained(folder)
    return folder


def pipeline_weights(run):
    return load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def losses(run):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def test_a_run_on_pixels_starts_from_the_blocks_without_a_teacher(tmp_path, tiny_flags, pixel_encoder):
    train(*tiny_flags, f"--encoder={pixel_encoder}", "--start_from_encoder=2", "--warmup_steps=0", "--alignment_weight=0",
        "--learning_rate=1e-300", "--ema_decay=0", "--max_train_steps=1", f"--output_dir={tmp_path}/run")  # fmt: skip
    config = json.loads((tmp_path / "run/pipeline/transformer/config.json").read_text())
    expected = ERWTransformer2DModel.from_config(config)
    names = start_from_encoder(expected, RepresentationEncoder.from_pretrained(pixel_encoder, 4), 2)
    assert "pos_embed.proj.weight" in names and config["activation_fn"] == "gelu"
    trained = pipeline_weights(tmp_path / "run")
    assert all(torch.equal(trained[name], expected.state_dict()[name]) for name in names)
    assert "activation_fn: gelu\n" in (tmp_path / "run/config.yaml").read_text()
    card = str(run_card(tmp_path / "run", "someone/run"))
    assert "Its first 2 blocks started as those of `encoder-2px" in card and "without alignment" in card
    assert "whose licence may bind them too" in card and "| `start_from_encoder` | 2 |" in card


def test_tokens_hidden_from_a_projector_are_not_hidden_from_a_warmup_without_one(tmp_path, tiny_flags):
    flags = [*tiny_flags, "--start_from_encoder=2", "--dataloader_num_workers=0", "--max_train_steps=4"]
    train(*flags, f"--output_dir={tmp_path}/plain")
    train(*flags, "--projector=transformer", "--alignment_mask_ratio=0.5", f"--output_dir={tmp_path}/masked")
    assert losses(tmp_path / "masked")[:3] == losses(tmp_path / "plain")[:3]


def test_a_taught_warmup_serves_another_run_whose_projector_is_fresh(tmp_path, tiny_flags):
    flags = [*tiny_flags, "--start_from_encoder=2", "--dataloader_num_workers=0"]
    train(*flags, "--max_train_steps=3", f"--output_dir={tmp_path}/run")
    train(*flags, "--warmup_steps=0", f"--warmup_from={tmp_path}/run", "--max_train_steps=1", "--learning_rate=1e-300",
        "--ema_decay=0", f"--output_dir={tmp_path}/other")  # fmt: skip
    warmed = load_file(tmp_path / "run/warmup/transformer/diffusion_pytorch_model.safetensors")
    ours = pipeline_weights(tmp_path / "other")
    for name in ("pos_embed.pos_embed", "pos_embed.proj.weight", "transformer_blocks.1.modulation.bias"):
        assert torch.equal(ours[name], warmed[name])


@pytest.mark.parametrize("flags", [[], ["--warmup_trains_blocks=false", "--optimizer=muon"]])
def test_on_latents_the_warmup_teaches_the_patch_embedding(tmp_path, tiny_flags, encoder_path, vae_path, flags):
    flags = [*tiny_flags, "--start_from_encoder=2", f"--vae={vae_path}", "--in_channels=4", "--dataloader_num_workers=0",
        "--checkpointing_steps=1", "--checkpoints_total_limit=9", "--warmup_learning_rate=1e-3", *flags]  # fmt: skip
    run = tmp_path / "run"
    train(*flags, f"--output_dir={run}")
    warmed = load_file(run / "warmup" / "transformer" / "diffusion_pytorch_model.safetensors")
    config = json.loads((run / "pipeline/transformer/config.json").read_text())
    expected = ERWTransformer2DModel.from_config(config)
    names = start_from_encoder(expected, RepresentationEncoder.from_pretrained(encoder_path, 4), 2, False)
    moved = [
        name
        for name in names
        if name.startswith("transformer_blocks.") and not torch.equal(warmed[name], expected.state_dict()[name])
    ]
    assert bool(moved) == ("--warmup_trains_blocks=false" not in flags)
    assert load_file(run / "warmup" / "projectors.safetensors") == {}
    record = json.loads((run / "warmup" / "warmup.json").read_text())
    assert record["target"] == "tokens after block 2" and record["start_from_encoder"] == 2
    # Stopped in either phase it goes on bitwise.
    before, final = losses(run), pipeline_weights(run)
    for step in (5, 2):
        train(*flags, f"--output_dir={run}", f"--resume_from_checkpoint=checkpoint-{step}")
        assert losses(run) == before
        assert all(torch.equal(tensor, final[name]) for name, tensor in pipeline_weights(run).items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoder=none", "--warmup_steps=0"], "start_from_encoder needs an encoder"),
        (["--start_from_encoder=4"], "must lie in [0, num_layers=3]"),
        (["--start_from_encoder=3", "--warmup_depth=3"], "has 2 blocks"),
        (["--start_from_encoder=3"], "do not fit in warmup_depth=2"),
        (["--start_from_encoder=1"], "taught by the encoder's tokens after block 1: set warmup_depth=1"),
        (["--warmup_steps=0"], "which only a warmup can teach"),
        (["--class_token_weight=0.03"], "set class_token_weight to 0"),
        (["--warmup_steps=0", "--init_from=pipelines/erw-digits"], "omit start_from_encoder"),
        (["--start_from_encoder=0", "--warmup_trains_blocks=false"], "needs a warmup of start_from_encoder's blocks"),
        (["--activation_fn=swiglu"], "activation_fn='gelu', the model 'swiglu'"),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_starts_that_make_no_sense_are_named_before_anything_is_written(
    tmp_path, tiny_flags, capsys, flags, message, dry_run
):
    with pytest.raises((ValueError, SystemExit)) as error:
        train(*tiny_flags, "--start_from_encoder=2", *flags, *dry_run, f"--output_dir={tmp_path}/run")
    assert message in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_flops_of_a_start_are_the_dry_runs(tmp_path, tiny_flags, capsys):
    flags = [*tiny_flags, "--start_from_encoder=2", "--dataloader_num_workers=0", "--max_train_steps=5"]
    train(*flags, f"--output_dir={tmp_path}/run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    train(*flags, "--dry_run")
    report = capsys.readouterr().out
    assert f"FLOPs of a warmup step  {records[0]['flops']:.3e}" in report
    assert f"FLOPs in all            {records[-1]['flops']:.3e}" in report
    assert "the first 2 blocks of" in report


def test_dinov3_gives_the_rotary_embeddings_and_a_resumed_run_compares_what_was_trained(tmp_path):
    vit("DINOv3ViT").save_pretrained(tmp_path / "encoder")
    keys = {"encoder": str(tmp_path / "encoder"), "start_from_encoder": 2, "sample_size": 16, "patch_size": 4,
            "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3}  # fmt: skip
    config = TrainingConfig(**keys, warmup_steps=0, projector_depth=2)
    fit_to_encoder(config)
    assert config.use_rope and config.rope_theta == 100 and config.rope_scale == math.pi
    config.save(tmp_path / "config.yaml")
    again = TrainingConfig(**keys, warmup_steps=0, projector_depth=2)
    fit_to_encoder(again)
    again.check_resumable(tmp_path / "config.yaml")
