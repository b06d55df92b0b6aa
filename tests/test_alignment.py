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
import math

import pytest
import torch

from erw_hf.alignment import (
    ConvProjector,
    MLPProjector,
    TransformerProjector,
    alignment_weight,
    cosine_alignment_loss,
    hidden_count,
    nt_xent_alignment_loss,
    seen_tokens,
    spatial_normalize,
    structural_alignment_loss,
)


def test_loss_by_hand():
    projected = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[0.0, 2.0], [-1.0, 0.0]]])
    target = torch.tensor([[[3.0, 0.0], [1.0, 0.0]], [[0.0, -1.0], [1.0, 0.0]]])
    expected = torch.tensor([(0 + 1 - 1 / math.sqrt(2)) / 2, (2 + 2) / 2])
    torch.testing.assert_close(cosine_alignment_loss(projected, target), expected)


def test_loss_sees_every_sample():
    """The published code took the last sample of each batch alone: this test fails on it."""
    torch.manual_seed(0)
    projected, target = torch.randn(5, 4, 8), torch.randn(5, 4, 8)
    order = torch.tensor([3, 1, 4, 0, 2])
    loss = cosine_alignment_loss(projected, target).mean()
    torch.testing.assert_close(cosine_alignment_loss(projected[order], target[order]).mean(), loss)

    projected.requires_grad_()
    cosine_alignment_loss(projected, target).mean().backward()
    assert (projected.grad.flatten(1).norm(dim=1) > 1e-4).all()
    # Each sample's gradient is 1/B of the one that it has alone: no sample is weighted above another.
    for i in range(5):
        alone = projected[i : i + 1].detach().clone().requires_grad_()
        cosine_alignment_loss(alone, target[i : i + 1]).mean().backward()
        torch.testing.assert_close(projected.grad[i : i + 1], alone.grad / 5)


def test_nt_xent_by_hand():
    torch.manual_seed(0)
    projected, target = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    expected = []
    for i in range(3):
        total = 0.0
        for n in range(2):
            similarity = [torch.cosine_similarity(projected[i, n], target[j, n], dim=0) / 0.5 for j in range(3)]
            total += -math.log(math.exp(similarity[i]) / sum(math.exp(s) for s in similarity))
        expected.append(total / 2)
    torch.testing.assert_close(nt_xent_alignment_loss(projected, target, temperature=0.5), torch.tensor(expected))


def test_structural_loss_by_hand_and_blind_to_rotation():
    torch.manual_seed(0)
    projected, target = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    expected = []
    for a, b in zip(projected, target, strict=True):
        squares = [
            (torch.cosine_similarity(a[i], a[j], dim=0) - torch.cosine_similarity(b[i], b[j], dim=0)) ** 2
            for i in range(3)
            for j in range(3)
        ]
        expected.append(sum(squares) / 9)
    torch.testing.assert_close(structural_alignment_loss(projected, target), torch.stack(expected))
    rotation, _ = torch.linalg.qr(torch.randn(5, 5))
    assert structural_alignment_loss(projected, 3 * projected @ rotation).max() < 1e-10


@pytest.mark.parametrize("loss", [nt_xent_alignment_loss, structural_alignment_loss])
def test_other_losses_see_every_sample(loss):
    torch.manual_seed(0)
    projected, target = torch.randn(5, 4, 8), torch.randn(5, 4, 8)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(loss(projected[order], target[order]), loss(projected, target)[order])
    projected.requires_grad_()
    loss(projected, target).mean().backward()
    assert (projected.grad.flatten(1).norm(dim=1) > 1e-5).all()


@pytest.mark.parametrize("loss", [nt_xent_alignment_loss, structural_alignment_loss])
def test_other_losses_are_float32_under_autocast(loss):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, 9, 16, generator=generator)
    projected = target + 0.01 * torch.randn(4, 9, 16, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(projected, target)
    assert cast.dtype == torch.float32 and torch.equal(cast, loss(projected, target))


def test_spatial_normalisation():
    target = torch.randn(2, 9, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + 7
    normalised = spatial_normalize(target)
    torch.testing.assert_close(normalised.mean(dim=1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std(dim=1), torch.ones(2, 4), atol=1e-4, rtol=0)


def test_conv_projector_keeps_the_grid():
    projector = ConvProjector(3, 5)
    tokens = torch.randn(1, 16, 3, requires_grad=True)
    projected = projector(tokens)
    assert projected.shape == (1, 16, 5)
    projected[0, 5].sum().backward()  # row 1, column 1 of a 4x4 grid sees the 3x3 tokens around it
    seen = (tokens.grad[0].abs().sum(dim=1) > 0).nonzero().flatten().tolist()
    assert seen == [0, 1, 2, 4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("step", [0, 1, 777, 50_000, 123_456])
def test_half_life_schedule_has_the_papers_closed_form(step):
    # lambda(k) = c0 exp(-k / tau) with tau = half_life / ln 2
    expected = 0.5 * math.exp(-step / (50_000 / math.log(2)))
    assert alignment_weight(step, "half_life", 0.5, half_life=50_000) == pytest.approx(expected, rel=1e-12)


def test_constant_and_stop_schedules():
    assert alignment_weight(10**6, "constant", 0.5) == 0.5
    assert alignment_weight(249, "stop", 0.5, stop_step=250) == 0.5
    assert alignment_weight(250, "stop", 0.5, stop_step=250) == 0.0


def test_schedule_errors_say_what_is_missing():
    with pytest.raises(ValueError, match="alignment_half_life"):
        alignment_weight(0, "half_life", 0.5)
    with pytest.raises(ValueError, match="alignment_stop_step"):
        alignment_weight(0, "stop", 0.5)
    with pytest.raises(ValueError, match="constant"):
        alignment_weight(0, "linear", 0.5)


def test_projector_maps_each_token_alone():
    projector = MLPProjector(6, 10, hidden_dim=12)
    tokens = torch.randn(2, 5, 6)
    projected = projector(tokens)
    assert projected.shape == (2, 5, 10)
    torch.testing.assert_close(projector(tokens[:, 3:4]), projected[:, 3:4])


def test_seen_tokens_are_the_others_in_their_order():
    tokens = torch.arange(2 * 5 * 1.0).reshape(2, 5, 1)  # a class token, then a grid of 4
    hidden = torch.tensor([[False, True, False, False], [False, False, False, True]])
    assert seen_tokens(tokens, hidden, 0.25).squeeze(-1).tolist() == [[0, 1, 3, 4], [5, 6, 7, 8]]
    assert seen_tokens(tokens[:, 1:], hidden, 0.25).squeeze(-1).tolist() == [[1, 3, 4], [6, 7, 8]]


@pytest.mark.parametrize(
    ("tokens", "ratio", "count"),
    [(256, 0.2, 51), (16, 0.0, 0), (16, 0.01, 0), (4, 0.99, 3), (1, 0.9, 0), (10, 0.25, 2)],
)
def test_at_least_one_token_is_seen(tokens, ratio, count):
    assert hidden_count(tokens, ratio) == count


@pytest.mark.parametrize("lead", [0, 1])  # a class token
def test_the_transformer_projector_predicts_a_hidden_token_from_the_others(lead):
    torch.manual_seed(0)
    projector, tokens = TransformerProjector(16, 12, heads=2, num_tokens=4), torch.randn(3, lead + 4, 16)
    projected = projector(tokens)
    assert projected.shape == (3, lead + 4, 12)
    empty = projector(torch.zeros_like(tokens))
    assert (empty[:, lead] - empty[:, lead + 1]).abs().max() > 1e-3  # a hidden token knows where it is
    changed = tokens.clone()
    changed[:, lead + 1] = torch.randn(3, 16)
    assert (projector(changed)[:, lead] - projected[:, lead]).abs().max() > 1e-3
    assert set(projector.state_dict()) == {
        name for name, _ in projector.named_parameters()
    }  # positions are not weights
    blocks = [block.linear1.weight for block in projector.blocks]
    assert len(blocks) == 2 and not torch.equal(*blocks)
