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
"""Exponential moving averages of the weights: of constant decay, or power-function ones chosen after training (EDM2).

    python -m erw_hf.trainer.ema RUN_DIR --sigma_rel 0.08 --output_dir pipeline-0.08

This exists because diffusers' `EMAModel` has neither the power function nor sharded weights.
"""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm

from erw_hf.files import written_whole
from erw_hf.names import resolve_flags
from erw_hf.pipeline_erw import ERWPipeline
from erw_hf.trainer.config import TrainingConfig


SNAPSHOT_SIGMA_RELS = (0.05, 0.10)  # the two averages that EDM2 stores, all others are rebuilt from them (§3.2)


@dataclass(frozen=True)
class EMAProfile:
    """How an average forgets.

    Args:
        decay (`float`, *optional*): Decay, in [0, 1).
        sigma_rel (`float`, *optional*):
            Instead of it, the relative width of a power-function average. Such an average looks back over a share of the
            training so far; a constant decay looks back over a number of steps.
        ramp (`bool`, *optional*, defaults to `False`):
            Whether `decay` is reached along (1 + n) / (10 + n), n the steps before this one, as by diffusers' `EMAModel`.
            The average then looks back over about a ninth of a short training, and forgets its initial weights at once.
    """

    decay: float | None = None
    sigma_rel: float | None = None
    ramp: bool = False

    def decay_at(self, step: int) -> float:
        """Share of the average that stays at a step, from 1 (EDM2, arXiv 2312.02696, Eq. 127); 0 at the first step of
        a power-function or ramped average, which thus forgets the initial weights."""
        if self.sigma_rel is not None:
            return float((1 - 1 / step) ** (power_of(self.sigma_rel) + 1))
        assert self.decay is not None
        if self.ramp:
            return 0.0 if step == 1 else min(self.decay, step / (9 + step))
        return self.decay

    def after(self, steps: int) -> tuple[float, float]:
        """Share of the initial weights in the average after some steps, and how many steps it lies behind the weights."""
        share, behind = 1.0, 0.0
        for step in range(1, steps + 1):
            decay = self.decay_at(step)
            share, behind = share * decay, decay * (behind + 1)
        return share, behind


def ema_profiles(config: TrainingConfig) -> list[EMAProfile]:
    """The averages of a run: first the one that pictures and the pipeline are made with."""
    first = (
        EMAProfile(decay=config.ema_decay, ramp=config.ema_ramp)
        if config.ema_sigma_rel is None
        else EMAProfile(sigma_rel=config.ema_sigma_rel)
    )
    stored = SNAPSHOT_SIGMA_RELS if config.ema_snapshot_steps else ()
    return [first, *(EMAProfile(sigma_rel=width) for width in stored)]


class EMA:
    """Averages of a model's trained parameters in float32, one per profile, which follow it step by step. The model
    has been prepared by accelerate; where FSDP2 shards its parameters the averages are sharded alike, and gathered
    only for checkpoints and pictures."""

    def __init__(self, model: nn.Module, profiles: Sequence[EMAProfile]) -> None:
        self.profiles = tuple(profiles)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # the others stay as they are
        self.names = list(trained)
        self.parameters = [parameter.detach() for parameter in trained.values()]
        self.averages = [[parameter.float().clone() for parameter in self.parameters] for _ in self.profiles]
        self._are_float32 = all(parameter.dtype == torch.float32 for parameter in self.parameters)
        self.step_count = 0

    @torch.no_grad()
    def step(self) -> None:
        """Follows the weights, after an optimizer step."""
        self.step_count += 1
        weights = self.parameters if self._are_float32 else [parameter.float() for parameter in self.parameters]
        for profile, average in zip(self.profiles, self.averages, strict=True):
            torch._foreach_lerp_(average, weights, 1 - profile.decay_at(self.step_count))

    def weights(self, index: int = 0) -> dict[str, torch.Tensor]:
        """Whole float32 weights of one average, by the model's parameter names, where the model is; every rank calls
        it."""
        return {name: whole_tensor(tensor) for name, tensor in zip(self.names, self.averages[index], strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """On the CPU of the main process; the others, which all call it, get averages without tensors."""
        keeps = not dist.is_initialized() or dist.get_rank() == 0
        saved: list[dict[str, torch.Tensor]] = []
        for average in self.averages:
            saved.append({})
            for name, tensor in zip(self.names, average, strict=True):
                whole = whole_tensor(
                    tensor
                )  # one at a time: whole averages would lie on every GPU beside the training
                if keeps:
                    saved[-1][name] = whole.cpu()
        return {"step_count": self.step_count, "averages": saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["averages"]) != len(self.averages):
            raise ValueError(
                f"the checkpoint holds {len(state['averages'])} averages of the weights, this run {len(self.averages)}: "
                "ema_snapshot_steps must be as it was"
            )
        self.step_count = state["step_count"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            for name, tensor in zip(self.names, average, strict=True):
                value = saved[name].to(tensor.device)
                if isinstance(tensor, DTensor):
                    value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
                tensor.copy_(value)


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP2 may have sharded; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy of a model's state on the CPU of every rank; FSDP2 may have sharded it."""
    return {name: whole_tensor(tensor).cpu().clone() for name, tensor in model.state_dict().items()}


@functools.cache
def power_of(sigma_rel: float) -> float:
    """
    gamma, the exponent of a power-function average, whose weight at time t of a training of length T is as `(t / T) **
    gamma`: the root of `sigma_rel ** 2 = (gamma + 1) / ((gamma + 2) ** 2 (gamma + 3))` (EDM2, arXiv 2312.02696, Eq.
    126). `sigma_rel` is the standard deviation of that profile over T.

    Raises:
        ValueError: for a width that no such profile has.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel must lie in (0, {12**-0.5:.3f}), got {sigma_rel}")
    precision = sigma_rel**-2
    return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())


def post_hoc_coefficients(
    steps: Sequence[int], sigma_rels: Sequence[float], step: int, sigma_rel: float
) -> np.ndarray:
    """How averages that were stored at `steps`, `(N,)`, of widths `sigma_rels`, add up to one that was not, which ends
    at `step` (EDM2, arXiv 2312.02696, Alg. 3): the least-squares fit of its profile by theirs. The `(N,)`
    coefficients sum to about 1."""
    ends = np.array([*steps, step], dtype=np.float64)
    powers = np.array([power_of(value) for value in [*sigma_rels, sigma_rel]])
    # Integral of the product of two profiles p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T].
    shorter, longer = np.minimum.outer(ends, ends), np.maximum.outer(ends, ends)
    power_of_longer = np.where(ends[:, None] >= ends[None, :], powers[:, None], powers[None, :])
    products = np.multiply.outer(powers + 1, powers + 1) / (np.add.outer(powers, powers) + 1)
    products = products * (shorter / longer) ** power_of_longer / longer
    return np.linalg.solve(products[:-1, :-1], products[:-1, -1])


def save_snapshots(ema: EMA, folder: Path, is_main_process: bool) -> None:
    """Stores the power-function averages as `step-N-sigma-S.safetensors`, in float16 as EDM2 does; every rank calls
    it."""
    for index, profile in enumerate(ema.profiles):
        if profile.sigma_rel is not None:
            weights = ema.weights(index)
            if is_main_process:
                folder.mkdir(exist_ok=True)
                path = folder / f"step-{ema.step_count:07d}-sigma-{profile.sigma_rel:.3f}.safetensors"
                with written_whole(path) as temporary:
                    save_file({name: tensor.half().cpu() for name, tensor in weights.items()}, temporary)


def later_snapshots(folder: Path, step: int) -> list[Path]:
    """Those that [`save_snapshots`] wrote after a step of the average."""
    return [path for path in folder.glob("step-*-sigma-*.safetensors") if int(path.stem.split("-")[1]) > step]


def rebuild(folder: Path, sigma_rel: float, step: int | None = None) -> dict[str, torch.Tensor]:
    """
    float32 weights, by parameter name, of an average of another width than those that [`save_snapshots`] wrote; it
    ends at `step`, by default the last that was stored.

    Raises:
        ValueError: if there are no snapshots, or none that early or late.
    """
    files = sorted(folder.glob("step-*-sigma-*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no snapshots: train with ema_snapshot_steps")
    steps = [int(path.stem.split("-")[1]) for path in files]
    sigma_rels = [float(path.stem.split("-")[3]) for path in files]
    step = max(steps) if step is None else step
    if not min(steps) <= step <= max(steps):
        raise ValueError(f"the snapshots are of the steps {min(steps)} to {max(steps)}: none can end at {step}")
    weights: dict[str, torch.Tensor] = {}
    coefficients = post_hoc_coefficients(steps, sigma_rels, step, sigma_rel)
    for path, coefficient in tqdm(list(zip(files, coefficients, strict=True)), desc="snapshots"):
        for name, tensor in load_file(path).items():
            weights[name] = weights.get(name, 0) + float(coefficient) * tensor.float()
    return weights


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Choose the width of the weight average after training.")
    parser.add_argument("run_dir", type=Path, help="a finished run that was trained with ema_snapshot_steps")
    parser.add_argument("--sigma_rel", type=float, required=True, help="relative width, 0.01 to 0.25")
    parser.add_argument(
        "--step", type=int, help="step of full training at which the average ends; the last by default"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="where to write the pipeline")
    args = parser.parse_args()
    resolve_flags(parser, args, ["run_dir", "output_dir"])
    try:
        weights = rebuild(args.run_dir / "ema_snapshots", args.sigma_rel, args.step)
    except ValueError as error:
        parser.error(str(error))
    pipeline = ERWPipeline.from_pretrained(args.run_dir / "pipeline")
    pipeline.transformer.load_state_dict(weights, strict=False)  # the averages lack buffers
    pipeline.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
