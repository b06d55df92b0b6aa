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
import pytest
import torch
from helpers import TINY_MODEL, randomize
from torch.utils._python_dispatch import TorchDispatchMode

from erw_hf import ERWTransformer2DModel
from erw_hf.sizes import size_config
from erw_hf.transformer_erw import ERWAttnProcessor


VARIANTS = {
    "sit": {},
    "lightningdit": {"use_rope": True, "norm_type": "rms_norm", "activation_fn": "swiglu", "qk_norm": "rms_norm"},
    "erw-qk-norm": {"use_rope": True, "qk_norm": "layer_norm"},
}


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 1, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_and_save_load(variant, tmp_path):
    model = randomize(ERWTransformer2DModel(**{**TINY_MODEL, **VARIANTS[variant]})).eval()
    x, t, labels = inputs()
    sample = model(x, t, labels).sample
    assert sample.shape == x.shape
    model.save_pretrained(tmp_path)
    loaded = ERWTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(x, t, labels).sample, sample)


def test_query_key_and_value_start_as_the_published_models_one_matrix():
    """Of SiT and REPA: Xavier over a matrix (3 D, D), so uniform within (6 / (D + 3 D)) ** 0.5."""
    model = ERWTransformer2DModel(**{**TINY_MODEL, "attention_head_dim": 32})
    width = 64
    for layer in (model.transformer_blocks[0].attn.to_q, model.transformer_blocks[2].attn.to_v):
        assert layer.weight.abs().max().item() == pytest.approx((6 / (4 * width)) ** 0.5, rel=0.01)
    square = model.transformer_blocks[0].attn.to_out[0]
    assert square.weight.abs().max().item() == pytest.approx((6 / (2 * width)) ** 0.5, rel=0.01)


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity():
    model = ERWTransformer2DModel(**TINY_MODEL)
    x, t, labels = inputs()
    output = model(x, t, labels, hidden_states_depths=(1, 3))
    assert torch.equal(output.sample, torch.zeros_like(x))
    torch.testing.assert_close(output.hidden_states[0], model.pos_embed(x))
    torch.testing.assert_close(output.hidden_states[1], model.pos_embed(x))


def test_tokens_come_out_at_the_depths_asked_for(transformer):
    x, t, labels = inputs()
    seen = {}
    for depth, block in enumerate(transformer.transformer_blocks, start=1):
        block.register_forward_hook(lambda _, __, output, depth=depth: seen.update({depth: output}))
    output = transformer(x, t, labels, hidden_states_depths=(3, 1))
    assert output.hidden_states[0].shape == (3, 16, 16)
    assert torch.equal(output.hidden_states[0], seen[3]) and torch.equal(output.hidden_states[1], seen[1])
    sample, tokens = transformer(x, t, labels, hidden_states_depths=(3, 1), return_dict=False)
    assert torch.equal(sample, output.sample) and torch.equal(tokens[1], seen[1])


def test_tokens_only_skips_the_later_blocks(transformer):
    x, t, labels = inputs()
    ran = []
    for depth, block in enumerate(transformer.transformer_blocks, start=1):
        block.register_forward_hook(lambda *_, depth=depth: ran.append(depth))
    output = transformer(x, t, labels, hidden_states_depths=(2,), tokens_only=True)
    assert ran == [1, 2] and output.sample is None
    torch.testing.assert_close(
        output.hidden_states[0], transformer(x, t, labels, hidden_states_depths=(2,)).hidden_states[0]
    )


def test_dropped_labels_are_the_null_class(transformer):
    x, t, labels = inputs()
    null = transformer(x, t, torch.full((3,), 10)).sample
    torch.testing.assert_close(transformer(x, t, labels, force_drop_ids=torch.ones(3)).sample, null)
    torch.testing.assert_close(transformer(x, t).sample, null)
    mixed = transformer(x, t, labels, force_drop_ids=torch.tensor([0, 1, 0])).sample
    torch.testing.assert_close(mixed[1], null[1])
    torch.testing.assert_close(mixed[[0, 2]], transformer(x, t, labels).sample[[0, 2]])


def test_labels_drop_at_random_only_in_training_and_only_when_not_told(transformer):
    x, t, labels = (torch.cat([tensor] * 40) for tensor in inputs())
    expected = transformer(x, t, labels).sample
    transformer.train()
    torch.manual_seed(0)
    dropped = (transformer(x, t, labels).sample - expected).flatten(1).norm(dim=1) > 1e-6
    assert 0 < dropped.sum() < 40
    torch.testing.assert_close(transformer(x, t, labels, force_drop_ids=torch.zeros(120)).sample, expected)


def test_time_is_kept_in_float32(transformer):
    x, _, labels = inputs(1)
    model = transformer.to(torch.bfloat16)
    near, nearer = torch.tensor([0.0430]), torch.tensor([0.04297])  # one number in bf16
    seen = []
    model.time_class_embed.time_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(x.bfloat16(), near, labels)
    model(x.bfloat16(), nearer, labels)
    assert seen[0].dtype == torch.float32 and seen[0] != seen[1]


def test_gradient_checkpointing_changes_nothing(transformer):
    x, t, labels = inputs()
    gradients = []
    for checkpointing in (False, True):
        transformer.zero_grad()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer(x, t, labels).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in transformer.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


class AttentionTypes(TorchDispatchMode):
    """Collects the dtype of each attention of few tokens."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [True, False])
def test_training_in_bf16_attends_in_float32_on_a_cpu(transformer, autocast):
    # whose kernel needs 88 ms in bf16 for the backward pass of 64 tokens that it does in 15 ms in float32
    sample, timestep, labels = inputs()
    if not autocast:
        transformer, sample = transformer.to(torch.bfloat16), sample.bfloat16()
    for training in (True, False):
        with AttentionTypes() as types, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            velocity = transformer.train(training)(sample, timestep, labels)[0]
        velocity.float().sum().backward()
        assert types.seen == [torch.float32 if training else torch.bfloat16] * transformer.config.num_layers


def test_fused_qkv_changes_nothing(transformer):
    x, t, labels = inputs()
    expected = transformer(x, t, labels).sample
    transformer.fuse_qkv_projections()
    assert transformer.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(transformer(x, t, labels).sample, expected, atol=1e-5, rtol=1e-5)


class OnCuda(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_on_a_gpu_projects_once_and_changes_nothing(variant, monkeypatch):
    model = randomize(ERWTransformer2DModel(**{**TINY_MODEL, **VARIANTS[variant]}))
    attn = model.transformer_blocks[0].attn
    x, rotary = torch.randn(2, 16, attn.to_q.in_features), None if model.rope is None else model.rope(torch.empty(0))
    products, gradients = [], []
    linear = torch.nn.functional.linear
    for cls in (torch.Tensor, OnCuda):
        calls = []
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(1) or linear(*args))  # noqa: B023
        model.zero_grad()
        output = attn(x.as_subclass(cls), rotary).as_subclass(torch.Tensor)
        output.square().sum().backward()
        products.append(len(calls))
        gradients.append([output, *(parameter.grad for parameter in attn.parameters())])
    assert products == [4, 2]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_not_torchs_own_layer_is_called_itself(transformer):
    """LoRA, hooks of diffusers and torch, packed weights: their work would be left out."""
    attn = transformer.train().transformer_blocks[0].attn
    x = torch.empty(0).as_subclass(OnCuda)

    def plain(attn):
        return ERWAttnProcessor._projects_once(attn, x)

    assert plain(attn) and not plain(attn.eval())
    attn.train()
    handle = attn.to_k.register_forward_hook(lambda *_: None)
    assert not plain(attn)
    handle.remove()
    handle = attn.to_v.register_forward_pre_hook(lambda *_: None)
    assert not plain(attn)
    handle.remove()
    assert plain(attn)
    attn.to_q.forward = attn.to_q.forward  # diffusers' hooks
    assert not plain(attn)
    del attn.to_q.forward
    attn.to_q.weight = torch.nn.Parameter(attn.to_q.weight.detach().as_subclass(OnCuda))  # DTensor, torchao
    assert not plain(attn)
    lora = randomize(ERWTransformer2DModel(**TINY_MODEL)).train()
    pytest.importorskip("peft")
    from peft import LoraConfig

    lora.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert not plain(lora.transformer_blocks[0].attn)


def test_blocks_compile_without_a_recompile_between_steps(transformer):
    x, t, labels = inputs()
    expected = transformer(x, t, labels).sample
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for step in range(3):
            transformer(x, t * 0.5**step, labels)
        torch.testing.assert_close(transformer(x, t, labels).sample, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 9}, "not a multiple of patch_size"),
        ({"sample_size": 0}, "sample_size must be at least 1, got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"num_classes": -1}, "num_classes and norm_eps must be at least 0"),
        ({"class_dropout_prob": 5}, "class_dropout_prob between 0 and 1"),
        ({"norm_type": "batch_norm"}, "batch_norm"),
        ({"qk_norm": "l2"}, "l2"),
        ({"activation_fn": "relu"}, "relu"),
        ({"use_rope": True, "attention_head_dim": 6}, "divisible by 4"),
    ],
)
def test_impossible_configurations_raise(change, message):
    with pytest.raises(ValueError, match=message):
        ERWTransformer2DModel(**{**TINY_MODEL, **change})


def test_a_size_that_is_no_whole_number_of_patches_is_named():
    model = ERWTransformer2DModel(**TINY_MODEL)  # patches of 2
    with pytest.raises(ValueError, match="9x9 is not a whole number of patches of 2"):
        model(torch.zeros(1, 1, 9, 9), torch.tensor([0.5]), torch.tensor([0]))


def test_rotary_positions_have_one_grid():
    """Another of as many tokens would get the positions of this one."""
    model = ERWTransformer2DModel(**TINY_MODEL, use_rope=True)
    with pytest.raises(ValueError, match="has one size: 8x8, got 4x16"):
        model(torch.zeros(1, 1, 4, 16), torch.tensor([0.5]), torch.tensor([0]))


def test_attention_kwargs_hold_the_scale_alone(transformer):
    x, t, labels = inputs()
    with pytest.raises(ValueError, match="'scale' alone, not 'foo'"):
        transformer(x, t, labels, attention_kwargs={"foo": 1})


def test_impossible_depths_raise(transformer):
    x, t, labels = inputs()
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        transformer(x, t, labels, hidden_states_depths=(4,))
    with pytest.raises(ValueError, match="needs hidden_states_depths"):
        transformer(x, t, labels, tokens_only=True)


SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sample_size", [32, 64])
def test_every_published_size_builds_and_maps_its_shapes(size, patch_size, sample_size):
    layers, heads, head_dim = SIZES[size]
    with torch.device("meta"):
        model = ERWTransformer2DModel(sample_size=sample_size, **size_config(f"SiT-{size}/{patch_size}"))
        output = model(torch.empty(2, 4, sample_size, sample_size), torch.empty(2), hidden_states_depths=(layers,))
    assert output.sample.shape == (2, 4, sample_size, sample_size)
    assert output.hidden_states[0].shape == (2, (sample_size // patch_size) ** 2, heads * head_dim)


def test_latents_of_an_encoder():
    """RAE trains on DINOv2's own tokens: 768 channels, one token a cell."""
    model = ERWTransformer2DModel(**{**TINY_MODEL, "in_channels": 768, "patch_size": 1, "sample_size": 4})
    assert model(torch.randn(1, 768, 4, 4), torch.rand(1)).sample.shape == (1, 768, 4, 4)


def test_a_bottleneck_is_a_patch_embedding_of_low_rank(tmp_path):
    """JiT's: the two layers are one matrix, of no more rank than the bottleneck has channels."""
    whole = randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()
    narrow = randomize(ERWTransformer2DModel(**TINY_MODEL, patch_bottleneck_dim=3)).eval()
    first, second = narrow.pos_embed.proj
    assert (first.weight.shape, second.weight.shape) == ((3, 1, 2, 2), (16, 3, 1, 1))
    assert first.bias is None and second.bias is not None
    product = second.weight.flatten(1) @ first.weight.flatten(1)  # (D, p * p * C)
    assert torch.linalg.matrix_rank(product) == 3
    others = {name: tensor for name, tensor in narrow.state_dict().items() if "pos_embed" not in name}
    whole.load_state_dict(others, strict=False)
    whole.pos_embed.proj.weight.data, whole.pos_embed.proj.bias.data = product.view(16, 1, 2, 2), second.bias
    x, t, labels = inputs()
    torch.testing.assert_close(narrow(x, t, labels).sample, whole(x, t, labels).sample, atol=1e-5, rtol=1e-5)
    narrow.save_pretrained(tmp_path)
    assert torch.equal(
        ERWTransformer2DModel.from_pretrained(tmp_path)(x, t, labels).sample, narrow(x, t, labels).sample
    )


def test_a_bottleneck_starts_as_two_linear_layers():
    torch.manual_seed(0)
    first, second = ERWTransformer2DModel(
        sample_size=64, patch_size=16, in_channels=3, num_layers=0, patch_bottleneck_dim=128
    ).pos_embed.proj
    for layer, fan_in, fan_out in ((first, 768, 128), (second, 128, 1152)):
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert second.bias.abs().max() == 0


def test_lora_trains_apart_from_the_model(transformer):
    from peft import LoraConfig

    x, t, labels = inputs()
    expected = transformer(x, t, labels).sample
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = transformer(x, t, labels).sample
    assert not torch.allclose(adapted, expected)
    off = transformer(x, t, labels, attention_kwargs={"scale": 0.0}).sample
    torch.testing.assert_close(off, expected)


def test_published_sizes():
    with torch.device("meta"):
        xl = ERWTransformer2DModel()
    # SiT-XL/2 counts 675 129 632: with its position table, which is a buffer here, and 4 more output channels.
    position_table, more_channels = 256 * 1152, (1152 + 1) * 2 * 2 * 4
    assert sum(p.numel() for p in xl.parameters()) + position_table + more_channels == 675_129_632
