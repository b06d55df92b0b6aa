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
"""AdamW for all weights, or Muon for the matrices of the blocks and AdamW for the others."""

from typing import Any

import torch
import torch.nn as nn


class MuonWithAdamW(torch.optim.Optimizer):
    """
    torch's Muon and AdamW as one optimizer, whose groups a learning-rate schedule moves together.

    Args:
        matrices (`list[nn.Parameter]`): For Muon (Jordan et al., 2024): weights of two dimensions.
        others (`list[nn.Parameter]`): For AdamW.
        lr (`float`): Learning rate of both. Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982, Eq. 4).
        betas (`tuple[float, float]`): Of AdamW.
        eps (`float`): Of AdamW.
        weight_decay (`float`): Of both.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.found_inf: torch.Tensor | None = None  # not 0: leave this step out; what torch's fused AdamW has too
        super().__init__([{"params": matrices}, {"params": others}], {})
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]  # theirs, which a schedule changes

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: neither of the two needs one
        """One step of both."""
        if self.found_inf is not None and self.found_inf.item():  # torch's Muon cannot decide that on the device
            return
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """State of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from it."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]  # loading makes new ones


def build_optimizer(
    model: nn.Module, name: str, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """`"adamw"`, fused, or `"muon"`, for the parameters of a model that are not frozen."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Muon is for hidden matrices: not for embeddings, gains, biases and the output (Jordan et al., 2024).
    matrices = {n for n, parameter in trained.items() if ".transformer_blocks." in n and parameter.ndim == 2}
    if name == "adamw" or not matrices:  # none: a warmup whose blocks are frozen
        return torch.optim.AdamW(trained.values(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    return MuonWithAdamW(
        [parameter for name, parameter in trained.items() if name in matrices],
        [parameter for name, parameter in trained.items() if name not in matrices],
        lr,
        betas,
        eps,
        weight_decay,
    )
