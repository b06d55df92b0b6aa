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
from diffusers import AutoencoderKL

from erw_hf import ERWTransformer2DModel
from erw_hf.alignment import MLPProjector
from erw_hf.objective import AlignedTransformer
from erw_hf.trainer.flops import card_of, count_step_flops, count_vae_flops, peak_flops
from erw_hf.warmup import build_warmup_transformer


# Multiply-adds of a forward pass on a 32x32x4 latent in patches of 2, as the DiT and SiT papers give them (in 10^9).
PUBLISHED = {"S": (12, 6, 64, 6.06), "B": (12, 12, 64, 23.0), "L": (24, 16, 64, 80.7), "XL": (28, 16, 72, 118.6)}


def config(size):
    layers, heads, head_dim, _ = PUBLISHED[size]
    names = ("num_layers", "num_attention_heads", "attention_head_dim")
    defaults = dict(ERWTransformer2DModel(num_layers=0, num_attention_heads=1, attention_head_dim=8).config)
    defaults = {k: v for k, v in defaults.items() if not k.startswith("_") and k != "class_token_dim"}
    return {**defaults, **dict(zip(names, (layers, heads, head_dim), strict=True))}


@pytest.mark.parametrize("size", PUBLISHED)
def test_training_costs_three_published_forward_passes(size):
    with torch.device("meta"):
        model = AlignedTransformer(ERWTransformer2DModel(**config(size)), [], 1)
    multiply_adds = count_step_flops(model, []) / 3 / 2
    assert multiply_adds / 1e9 == pytest.approx(PUBLISHED[size][3], rel=0.02)


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_class_token_costs_one_token_of_257(size):
    """REG (arXiv 2507.01467) says below 0.5 % for XL/2; two thin layers of the encoder's width come on top."""
    with torch.device("meta"):
        plain, more = (
            AlignedTransformer(ERWTransformer2DModel(**config(size), **option), [], 1)
            for option in ({}, {"class_token_dim": 768})
        )
    before, after = count_step_flops(plain, []), count_step_flops(more, [])
    assert after / 6e9 == pytest.approx(PUBLISHED[size][3], rel=0.03)
    if size == "XL":
        assert 1 / 256 < after / before - 1 < 0.005


@pytest.mark.parametrize("depth", [4, 5])
def test_a_warmup_step_costs_a_fifth_of_a_full_one(depth):
    with torch.device("meta"):
        full = AlignedTransformer(ERWTransformer2DModel(**config("XL")), [MLPProjector(1152, 768)], 18)
        warmup = AlignedTransformer(
            build_warmup_transformer(config("XL"), depth), [MLPProjector(1152, 768)], depth, True
        )
    assert count_step_flops(warmup, []) / count_step_flops(full, []) <= 0.22


def test_checkpointing_is_left_as_it_was_and_not_counted():
    with torch.device("meta"):
        model = AlignedTransformer(ERWTransformer2DModel(**config("S")), [], 1)
    plain = count_step_flops(model, [])
    model.transformer.enable_gradient_checkpointing()
    assert count_step_flops(model, []) == plain
    assert model.transformer.gradient_checkpointing


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", (989, 80)), ("NVIDIA H100 PCIe", (756, 80)), ("NVIDIA H100 NVL", (835, 94)),
        ("NVIDIA H800", (989, 80)), ("NVIDIA H20", (148, 96)), ("NVIDIA H20-3e", (148, 96)), ("NVIDIA H200", (989, 141)),
        ("NVIDIA GH200 480GB", (989, 96)), ("NVIDIA A100-SXM4-80GB", (312, 40)), ("NVIDIA A800-SXM4-80GB", (312, 40)),
        ("NVIDIA RTX A6000", (155, 48)), ("NVIDIA RTX 6000 Ada Generation", (364, 48)),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (504, 96)), ("NVIDIA GeForce RTX 5090", (210, 32)),
        ("NVIDIA GeForce RTX 4090", (165, 24)), ("NVIDIA L4", (121, 24)), ("NVIDIA L40S", (362, 48)),
        ("NVIDIA A10G", (70, 24)), ("NVIDIA A10", (125, 24)), ("Tesla T4", (65, 16)), ("AMD Instinct MI300X", (1307, 192)),
        # Not what a part of their name says
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None), ("NVIDIA T400", None),
        ("NVIDIA RTX A4000", None), ("NVIDIA GeForce GTX 1080", None), ("", None),
    ],
)  # fmt: skip
def test_cards_are_known_by_whole_words_of_their_names(name, expected):
    card = card_of(name)
    assert (None if card is None else (card.flops / 1e12, card.memory)) == expected


def test_mfu_is_a_share_of_the_cards_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 5090")
    assert peak_flops(torch.device("cuda")) == 210e12
    assert peak_flops(torch.device("cpu")) is None


def test_the_autoencoder_of_stable_diffusion_is_counted():
    """A third of XL's step: 2.73e11 an image of 256 px."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        )  # fmt: skip
    assert count_vae_flops(vae, 256) == pytest.approx(272.7e9, rel=1e-3)
    assert count_vae_flops(vae, 512) > 4 * count_vae_flops(vae, 256)
    assert count_vae_flops(None, 256) == 0
