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

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import TINY_MODEL

from erw_hf.objective import AlignedTransformer
from erw_hf.trainer import optimizers
from erw_hf.trainer.ema import EMA, EMAProfile
from erw_hf.trainer.engines import open_accelerator
from erw_hf.trainer.optimizers import (
    Muon,
    MuonWithAdamW,
    build_lr_scheduler,
    build_optimizer,
    clip_gradients,
    clip_in_step,
    orthogonalized,
    orthogonalized_together,
    restore_learning_rate,
)
from erw_hf.transformer_erw import ERWTransformer2DModel


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
    # The floor, torch 2.8, has no Muon to compare with. The pinned version has, so CI never skips.
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


def test_the_hosts_work_beside_the_optimizer_does_not_grow_with_the_parameters():
    """Calls in Python and of C functions from it; torch's own AdamW makes about eleven for each tensor."""

    def calls(function) -> int:
        found = []
        sys.setprofile(lambda frame, event, arg: found.append(event) if event in ("call", "c_call") else None)
        try:
            function()
        finally:
            sys.setprofile(None)
        return len(found)

    counted = []
    for number in (20, 200):
        model = torch.nn.ParameterList(parameters([(2,)] * number))
        optimizer = torch.optim.AdamW(model, fused=True)
        weights, ema = list(model), EMA(model, [EMAProfile(decay=0.9)])
        parts = (lambda o=optimizer, w=weights: clip_in_step(o, w, 1.0), ema.step, optimizer.zero_grad)
        for _ in range(2):  # the first step of a process also imports and caches
            draw_gradients(model)
            found = [calls(part) for part in parts]
        counted.append(found)
    assert counted[0] == counted[1] and max(counted[0]) < 150


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


@pytest.mark.parametrize("alone", [False, True])
def test_muon_moves_the_blocks_matrices_and_adamw_the_rest(alone):
    model = ERWTransformer2DModel(**TINY_MODEL)
    model = model if alone else AlignedTransformer(model, [], 1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, "muon", 1e-2, (0.9, 0.999), 1e-8, 0.0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    for name, parameter in model.named_parameters():
        step = parameter.detach() - before[name]
        if "transformer_blocks." in name and parameter.ndim == 2:  # orthogonalised: all singular values alike
            values = torch.linalg.svdvals(step)
            assert values.min() > 0.4 * values.max(), name
        else:  # AdamW's first step has the size of the learning rate
            torch.testing.assert_close(step.abs(), torch.full_like(step, 1e-2), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0, 0.5, 1, 0.853553, 0.5, 0.146447, 0]),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_schedule_rises_to_the_peak_and_restores_at_another(name, rates, optimizer):
    def start(rate):
        model = AlignedTransformer(ERWTransformer2DModel(**TINY_MODEL), [], 1)
        found = build_optimizer(model, optimizer, rate, (0.9, 0.999), 1e-8, 0.0)
        return found, build_lr_scheduler(found, name, 2, 6)

    first, schedule = start(0.2)
    seen = []
    for step in range(7):
        seen.append({group["lr"] for group in first.param_groups})
        if step == 3:
            saved = first.state_dict(), schedule.state_dict()
        first.step()
        schedule.step()
    assert [sorted(rate) for rate in seen] == [[pytest.approx(0.2 * rate, abs=1e-6)] for rate in rates]

    second, schedule = start(0.1)
    second.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    restore_learning_rate(second, schedule, 0.1)
    for rate in rates[3:]:
        assert [group["lr"] for group in second.param_groups] == pytest.approx(
            [0.1 * rate] * len(second.param_groups), abs=1e-6
        )
        second.step()
        schedule.step()
