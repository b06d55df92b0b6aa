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
"""The optimizers are torch's: Muon in stacks and shares, clipping inside of AdamW's step."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from erw_hf.trainer import optimizers
from erw_hf.trainer.engines import open_accelerator
from erw_hf.trainer.optimizers import (
    Muon,
    MuonWithAdamW,
    clip_gradients,
    clip_in_step,
    orthogonalized,
    orthogonalized_together,
)


SHAPES = [(16, 16)] * 5 + [(24, 8)] * 2 + [(8, 24)]


def parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def draw_gradients(*models):
    for same in zip(*models, strict=True):
        gradient = torch.randn_like(same[0])
        for parameter in same:
            parameter.grad = gradient.clone()


def test_stacked_muon_is_torchs():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch 2.9 brought its Muon")
    torch.manual_seed(0)
    ours, theirs = parameters(), parameters()
    stacked = Muon(ours, 1e-2, 0.1)
    one_by_one = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        draw_gradients(ours, theirs)
        stacked.step()
        one_by_one.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)  # products in bf16
    # A checkpoint of the other goes on
    stacked.load_state_dict(one_by_one.state_dict())
    draw_gradients(ours, theirs)
    stacked.step()


def test_muon_needs_no_newer_torch_than_the_package_names(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    optimizer = MuonWithAdamW(parameters(), parameters([(4,)]), 1e-2, (0.9, 0.999), 1e-8, 0.0)
    for group in optimizer.param_groups:
        draw_gradients(group["params"])
    optimizer.step()


def test_a_non_finite_step_changes_nothing_and_no_one_waits_to_learn_it(monkeypatch):
    matrices, others = parameters(), parameters([(4,)])
    optimizer = MuonWithAdamW(matrices, others, 1e-2, (0.9, 0.999), 1e-8, 0.1)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("waited for the device"))
    draw_gradients([*matrices, *others])
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    before = [tensor.detach().clone() for tensor in (*matrices, *others)]
    buffers = [optimizer.muon.state[matrix]["momentum_buffer"].clone() for matrix in matrices]
    for matrix in (*matrices, *others):
        matrix.grad.fill_(float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, (*matrices, *others), strict=True))
    for matrix, buffer in zip(matrices, buffers, strict=True):
        assert torch.equal(optimizer.muon.state[matrix]["momentum_buffer"], buffer)
    assert "grad_scale" not in vars(optimizer.adamw)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_processes_share_the_orthogonalisation(count, monkeypatch):
    """Three processes and one, three, five matrices: shares may be uneven or empty. test_engines does it with two real ones."""
    matrices = torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(0))
    expected, sizes, parts = orthogonalized(matrices), [], []
    monkeypatch.setattr(optimizers, "orthogonalized", lambda m: sizes.append(len(m)) or orthogonalized(m))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda gathered, mine: parts.append(mine.view(torch.bfloat16)))
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert orthogonalized_together(matrices).shape == matrices.shape
    assert max(sizes) == -(-count // 3) and sum(sizes) == count
    torch.testing.assert_close(torch.cat(parts)[:count], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("norm", [0.01, 1.0, 1e9])
def test_clipping_inside_of_the_step_is_clipping(norm):
    ours, theirs = parameters([(9, 7), (5,)]), parameters([(9, 7), (5,)])
    inside, before = (torch.optim.AdamW(p, lr=1e-2, fused=True) for p in (ours, theirs))
    for _ in range(3):
        draw_gradients(ours, theirs)
        found = clip_in_step(inside, ours, norm)
        expected = torch.nn.utils.clip_grad_norm_(theirs, norm)
        assert torch.equal(found, expected)
        inside.found_inf = torch.zeros(())
        inside.step()
        before.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # A step without finite gradients
    ours[0].grad.fill_(float("nan"))
    kept = [parameter.detach().clone() for parameter in ours]
    inside.found_inf = (~clip_in_step(inside, ours, norm).isfinite()).float()
    inside.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, ours, strict=True))


@pytest.mark.parametrize(
    ("device", "engine", "scaler", "inside"),
    [
        ("cuda", "NO", None, True), ("cuda", "MULTI_GPU", None, True), ("cpu", "NO", None, False),
        ("cuda", "FSDP", None, False), ("cuda", "DEEPSPEED", None, False), ("cuda", "NO", object(), False),
    ],
)  # fmt: skip
def test_where_the_step_clips(device, engine, scaler, inside, monkeypatch):
    accelerator = SimpleNamespace(
        device=SimpleNamespace(type=device), distributed_type=engine, scaler=scaler, clip_grad_norm_=lambda *_: 7.0
    )
    accelerator.device = (
        accelerator.device if inside else torch.device("cpu") if device == "cpu" else torch.device("meta")
    )
    weights = parameters([(3,)])
    draw_gradients(weights)
    optimizer = torch.optim.AdamW(weights, fused=True)
    clip_gradients(accelerator, optimizer, weights, 1.0)
    assert hasattr(optimizer, "grad_scale") == inside


def test_gradients_lie_in_ddps_buckets_and_buffers_stay_where_they_are():
    accelerator = open_accelerator(cpu=True)
    assert accelerator.ddp_handler.gradient_as_bucket_view and not accelerator.ddp_handler.broadcast_buffers
