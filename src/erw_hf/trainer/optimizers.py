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
"""The optimizer (AdamW, or Muon with AdamW) and its learning-rate schedule.

An optimizer here must skip its step where `found_inf` is non-zero.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from erw_hf.trainer.ema import whole_tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised (Jordan et al., 2024), what torch's own does, in fewer and larger
    kernels: matrices of one shape are one stack, and each rank orthogonalises its share of it. Ranks must hold the
    same gradients. `lr` is scaled to the size of AdamW's updates (arXiv 2502.16982, Eq. 4), `weight_decay` is
    decoupled, `momentum` is Nesterov's."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        self._stacks = list(shapes.values())

    @torch.no_grad()
    def step(self, skip: torch.Tensor | None = None) -> None:  # type: ignore[override]  # no closure
        """One step; none where `skip`, of one element, is not 0, which the host does not wait for."""
        (group,) = self.param_groups
        for stack in self._stacks:
            matrices: list[torch.Tensor] = [matrix for matrix in stack if matrix.grad is not None]
            if not matrices:
                continue
            gradients = torch.stack(
                [matrix.grad for matrix in matrices if matrix.grad is not None]
            )  # (n, rows, columns)
            state = [self.state[matrix] for matrix in matrices]
            for of_matrix, matrix in zip(state, matrices, strict=True):
                of_matrix.setdefault("momentum_buffer", torch.zeros_like(matrix))
            buffers = [of_matrix["momentum_buffer"] for of_matrix in state]
            averages = torch.stack(buffers)
            decay: Any = group["lr"] * group["weight_decay"]
            if skip is not None:  # averaged with itself, it stays as it is
                gradients, decay = torch.where(skip.bool(), averages, gradients), decay * (1 - skip)
            averages.lerp_(gradients, 1 - group["momentum"])
            updates = orthogonalized_together(gradients.lerp_(averages, group["momentum"]))
            if skip is not None:
                updates = torch.where(skip.bool(), 0, updates)
            rate = group["lr"] * 0.2 * math.sqrt(max(stack[0].shape))
            weights = torch.stack(matrices).mul_(1 - decay).add_(updates, alpha=-rate)
            torch._foreach_copy_(buffers, averages.unbind())
            torch._foreach_copy_(matrices, weights.unbind())


def orthogonalized_together(matrices: torch.Tensor) -> torch.Tensor:
    """[`orthogonalized`] of matrices (n, rows, columns) that all ranks hold; each computes its share. bfloat16, the same on
    all."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1:
        return orthogonalized(matrices)
    share = math.ceil(len(matrices) / processes)
    start = share * dist.get_rank()
    mine = matrices.new_zeros(share, *matrices.shape[1:], dtype=torch.bfloat16)
    if start < len(matrices):
        found = orthogonalized(matrices[start : start + share])
        mine[: len(found)] = found
    gathered = mine.new_empty(processes * share, *matrices.shape[1:])
    dist.all_gather_into_tensor(gathered.view(torch.uint8), mine.view(torch.uint8))  # not every backend has bfloat16
    return gathered[: len(matrices)]


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Five quintic Newton-Schulz iterations of each of (n, rows, columns) towards U V^T of M = U S V^T, with the
    coefficients of Jordan et al., whose singular values end near 1; bfloat16."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the others as one optimizer, whose groups a learning-rate schedule moves
    together."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.muon = Muon(matrices, lr, weight_decay)
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.found_inf: torch.Tensor | None = None  # not 0: skip this step, as torch's fused AdamW does
        super().__init__([{"params": matrices}, {"params": others}], {})
        self.param_groups = [
            *self.muon.param_groups,
            *self.adamw.param_groups,
        ]  # theirs, so that a schedule changes them

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: neither of the two needs one
        """One step of both."""
        self.muon.step(self.found_inf)
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """State of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]  # loading makes new ones


def clip_gradients(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_norm: float
) -> torch.Tensor:
    """Clips gradients by their norm, and returns the norm before, on the device; `nan` or `inf` for gradients that
    are. Where the optimizer is AdamW on a GPU and nothing is sharded or scaled, its step clips, which saves a pass
    over the gradients. There a gradient is divided where it was multiplied, so its last bit may differ."""
    fused = isinstance(optimizer, torch.optim.AdamW) and accelerator.scaler is None
    if fused and accelerator.device.type == "cuda" and accelerator.distributed_type in ("NO", "MULTI_GPU"):
        return clip_in_step(optimizer, parameters, max_norm)
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    return torch.as_tensor(whole_tensor(norm), device=accelerator.device)


def clip_in_step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Has the next step of a fused AdamW clip the gradients as it reads them; returns their norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # torch's `get_total_norm`, whose loop over the norms would take the host a millisecond for XL.
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    # The kernel divides gradients by it, as GradScaler's; 1e-6 is `clip_grad_norm_`'s.
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)  # type: ignore[attr-defined]
    return norm


def muon_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """What Muon steps: trained hidden matrices, not embeddings, gains, biases and the output (Jordan et al., 2024)."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "transformer_blocks." in name and parameter.ndim == 2
    }


def build_optimizer(
    model: nn.Module, name: str, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`"adamw"`, fused, or `"muon"`, for the parameters of a model that are not frozen."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = muon_matrices(model)
    if name == "adamw" or not matrices:  # none: a warmup whose blocks are frozen
        return torch.optim.AdamW(trained.values(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    return MuonWithAdamW(
        list(matrices.values()),
        [parameter for name, parameter in trained.items() if name not in matrices],
        lr,
        betas,
        eps,
        weight_decay,
    )


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, name: str, warmup_steps: int, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The course of the learning rate over the `steps` of a phase: it rises linearly to the peak in `warmup_steps`,
    then stays (`"constant"`) or falls to 0 (`"linear"`, `"cosine"`)."""
    name = "constant_with_warmup" if name == "constant" else name
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps)


def restore_learning_rate(
    optimizer: torch.optim.Optimizer, lr_scheduler: torch.optim.lr_scheduler.LambdaLR, peak: float
) -> None:
    """Gives a loaded optimizer and schedule another peak rate than that of their checkpoint; the schedule's step
    holds."""
    lr_scheduler.base_lrs = [peak] * len(lr_scheduler.base_lrs)
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = peak
        group["lr"] = peak * factor(lr_scheduler.last_epoch)
