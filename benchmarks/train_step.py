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
"""What a training step costs, beside a plain PyTorch SiT, diffusers' DiT, and the step as published code has it.

    python benchmarks/train_step.py --output benchmarks/results/train_step.json

All ways of a section are timed in turns in one process (A B A B ...), ratios are medians over the rounds. Sections:
`forward` (forward and backward of the model), `step` (a whole step with encoder, projector, alignment, EMA and
optimizer), `warmup` (a warmup step beside one of full training), `scaling` (batch, tokens, depth against the FLOP count,
and memory with and without gradient checkpointing). Latents are given, so no autoencoder runs. Weights are random.
"""

import argparse
import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import (
    NOT_MEASURED,
    add_flags,
    begin,
    describe,
    draw_bars,
    dtypes,
    finish,
    in_turns,
    matmul,
    ratio,
    seconds_of,
    shown,
    spread,
    table,
    verdict,
    write,
)
from diffusers import DiTTransformer2DModel
from matplotlib.figure import Figure
from plain_sit import PlainSiT, plain_state_dict
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Dinov2Config, Dinov2Model

from erw_hf import ERWTransformer2DModel, RepresentationEncoder
from erw_hf.alignment import MLPProjector, cosine_alignment_loss
from erw_hf.flow import interpolate
from erw_hf.objective import AlignedTransformer, Batch, Objective
from erw_hf.sizes import size_config
from erw_hf.trainer.device import compile_blocks
from erw_hf.trainer.ema import EMA, EMAProfile
from erw_hf.trainer.flops import count_step_flops
from erw_hf.trainer.optimizers import build_optimizer
from erw_hf.warmup import build_warmup_transformer


SECTIONS = ("forward", "step", "warmup", "scaling")
SIZES = ("tiny", "S/2", "B/2", "L/2", "XL/2")
TINY = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
WEIGHT = 0.5  # lambda
DECAY = 0.9999
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Setting:
    """Where and how the measurement runs."""

    device: str
    dtype: torch.dtype  # of matrix products; weights are float32
    batch: int
    repeats: int
    quick: bool = False

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.dtype == torch.float32 else 2e-2


def model_config(size: str, sample_size: int = 32, num_layers: int | None = None) -> dict[str, int]:
    config = {"sample_size": sample_size, "in_channels": 4, **(TINY if size == "tiny" else size_config(f"SiT-{size}"))}
    if size == "tiny":
        config["sample_size"] //= 4
    if num_layers is not None:
        config["num_layers"] = num_layers
    return config


def width(config: dict[str, int]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def build_ours(config: dict[str, int], device: str = "cpu") -> ERWTransformer2DModel:
    """Ours, with a little noise in the weights that adaLN-zero starts at zero: comparing zeros would prove nothing."""
    torch.manual_seed(0)
    with torch.device(device):
        model = ERWTransformer2DModel(**config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def build_plain(ours: ERWTransformer2DModel, config: dict[str, int], device: str = "cpu") -> PlainSiT:
    """The plain model with our weights."""
    model = PlainSiT(**config).to(device)
    model.load_state_dict(plain_state_dict(ours.state_dict()))
    return model.train()


def build_dit(config: dict[str, int]) -> DiTTransformer2DModel:
    """diffusers' DiT of the same shape, which predicts noise and its variance."""
    return DiTTransformer2DModel(**config | {"out_channels": 2 * config["in_channels"], "norm_eps": 1e-6})


def compiled(model: nn.Module, setting: Setting) -> nn.Module:
    """Regional compilation, as training uses it."""
    transformer = getattr(model, "transformer", model)
    if setting.quick:  # without code generation, which takes most of a minute, it still traces whole graphs
        transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:
        compile_blocks(transformer, setting.device)
    return model


def draw_batch(config: dict[str, int], batch: int, device: str, image_side: int = 256) -> dict[str, torch.Tensor]:
    """What a data loader gives: latents, their noise and times, labels, and the images for the encoder."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config["in_channels"], config["sample_size"], config["sample_size"])
    drawn = {
        "x0": torch.randn(shape, generator=generator),
        "noise": torch.randn(shape, generator=generator),
        "t": torch.rand(batch, generator=generator),
        "label": torch.randint(1000, (batch,), generator=generator),
        "drop": (torch.rand(batch, generator=generator) < 0.1).long(),
        "pixels": torch.randint(256, (batch, 3, image_side, image_side), generator=generator, dtype=torch.uint8),
    }
    return {name: tensor.to(device) for name, tensor in drawn.items()}


def training_batch(drawn: dict[str, torch.Tensor], targets: list[torch.Tensor] | None, noised: bool = True) -> Batch:
    t = drawn["t"] if noised else torch.zeros_like(drawn["t"])
    return Batch(drawn["x0"], drawn["noise"], t, drawn["label"], drawn["drop"], targets)


# Forward and backward of the model


def measure_forward(size: str, setting: Setting) -> dict[str, object]:
    """Ours, eager and compiled, beside the plain model and diffusers' DiT, and what share of a large matmul's rate each reaches."""
    config, device = model_config(size), setting.device
    ours = build_ours(config, device)
    flops = setting.batch * count_step_flops(AlignedTransformer(ours, [], 1), [])
    plain = build_plain(ours, config, device)
    ours_compiled = compiled(build_ours(config, device), setting)
    dit = build_dit(config).to(device).train()
    batch = draw_batch(config, setting.batch, device, image_side=8)
    x_t, velocity = interpolate(batch["x0"], batch["noise"], batch["t"])
    steps = (batch["t"] * 1000).long()

    def predict_ours(model: nn.Module) -> torch.Tensor:
        return model(x_t, batch["t"], batch["label"], force_drop_ids=batch["drop"]).sample

    predictions = {
        "PlainSiT": (plain, lambda: plain(x_t, batch["t"], batch["label"], batch["drop"])[0]),
        "ours": (ours, lambda: predict_ours(ours)),
        "ours, compiled": (ours_compiled, lambda: predict_ours(ours_compiled)),
        "diffusers DiT": (dit, lambda: dit(x_t, steps, batch["label"]).sample[:, :4]),
    }

    def forward_backward(model: nn.Module, predict: Callable[[], torch.Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        with setting.autocast():
            loss = (predict().float() - velocity).square().mean()
        loss.backward()

    ways = {name: lambda pair=pair: forward_backward(*pair) for name, pair in predictions.items()}
    for way in ways.values():
        way()
    check_equal(plain, ours, ours_compiled, tolerance=setting.tolerance)
    side = 128 if setting.quick else 8192 if device == "cuda" else 4096
    ways["matmul"], matmul_flops = matmul(side, setting.dtype, device, times=10 if device == "cuda" else 1)
    seconds = in_turns(ways, setting.repeats, 1, device, f"forward {size}")
    ceiling = matmul_flops / statistics.median(seconds.pop("matmul"))
    return {
        "flops": flops,
        "matmul_side": side,
        "ceiling_flops_per_second": ceiling,
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, (model, _) in predictions.items()},
        "seconds": seconds,
        "ratio_to_plain": {name: ratio(values, seconds["PlainSiT"]) for name, values in seconds.items()},
        "flops_per_second": {name: flops / statistics.median(values) for name, values in seconds.items()},
        "share_of_ceiling": {name: flops / statistics.median(values) / ceiling for name, values in seconds.items()},
    }


def check_equal(plain: PlainSiT, *models: nn.Module, tolerance: float) -> None:
    """Checks that the gradients of the same loss agree, weight by weight."""
    theirs = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for model in models:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, gradient in plain_state_dict(gradients).items():
            scale = theirs[name].abs().max()
            torch.testing.assert_close(gradient / scale, theirs[name] / scale, rtol=0, atol=10 * tolerance)


# The whole step


class Step:
    """One of three ways to make a training step of the same function. `losses` computes it, `run` trains on it."""

    def __init__(self, size: str, setting: Setting, encoder: RepresentationEncoder, config: dict[str, int]) -> None:
        self.setting, self.batch = setting, draw_batch(config, setting.batch, setting.device)
        transformer = build_ours(config, setting.device)
        torch.manual_seed(1)
        hidden = 2048 if not setting.quick else 32
        projector = MLPProjector(width(config), encoder.embed_dim, hidden).to(setting.device)
        self.depth = min(8 if size.startswith("XL") else 4, config["num_layers"] - 1)
        self.build(transformer, projector, encoder, config)

    def build(
        self, transformer: nn.Module, projector: nn.Module, encoder: RepresentationEncoder, config: dict[str, int]
    ) -> None:
        raise NotImplementedError

    def losses(self) -> torch.Tensor:
        raise NotImplementedError

    def update(self) -> None:
        """Optimizer, then the average of the weights."""
        raise NotImplementedError

    def run(self) -> torch.Tensor:
        loss = self.losses()
        loss.backward()
        self.grad_norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.update()
        return loss.detach()


class AsPublished(Step):
    """As ERW's released code has it: float32 encoder outside of autocast, a Python loop over the samples for the
    alignment, an EMA parameter by parameter, AdamW with its defaults."""

    def build(self, transformer, projector, encoder, config) -> None:
        self.model, self.projector = build_plain(transformer, config, self.setting.device), projector
        self.encoder = encoder.float()
        self.trained = [*self.model.parameters(), *projector.parameters()]
        self.ema = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0)

    def noised(self) -> tuple[torch.Tensor, torch.Tensor]:
        t = self.batch["t"].reshape(-1, 1, 1, 1)
        return (1 - t) * self.batch["x0"] + t * self.batch["noise"], self.batch["noise"] - self.batch["x0"]

    def losses(self) -> torch.Tensor:
        batch = self.batch
        targets = self.encoder(batch["pixels"].float() / 255)
        x_t, velocity = self.noised()
        with self.setting.autocast():
            predicted, tokens = self.model(x_t, batch["t"], batch["label"], batch["drop"], self.depth)
            projected = self.projector(tokens)
            velocity_loss = (predicted - velocity).square().flatten(1).mean(dim=1).mean()
            alignment = 0.0
            for ours, theirs in zip(projected, targets, strict=True):
                ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
                alignment = alignment + (1 - (ours * theirs).sum(dim=-1)).mean()
            return velocity_loss + WEIGHT * alignment / len(targets)

    @torch.no_grad()
    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, parameter in self.model.named_parameters():
            self.ema[name].mul_(DECAY).add_(parameter, alpha=1 - DECAY)


class WrittenWell(AsPublished):
    """What a good engineer would write around the plain model: encoder in the compute dtype, one vectorised loss, a
    foreach EMA and fused AdamW. Not compiled."""

    def build(self, transformer, projector, encoder, config) -> None:
        super().build(transformer, projector, encoder, config)
        self.encoder = encoder.to(self.setting.dtype)
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.weights = [parameter.detach() for parameter in self.model.parameters()]
        self.averages = list(self.ema.values())

    def losses(self) -> torch.Tensor:
        batch = self.batch
        targets = self.encoder(batch["pixels"].float() / 255)
        x_t, velocity = self.noised()
        with self.setting.autocast():
            predicted, tokens = self.model(x_t, batch["t"], batch["label"], batch["drop"], self.depth)
            projected = self.projector(tokens)
        alignment = (1 - F.cosine_similarity(projected.float(), targets.float(), dim=-1)).mean()
        return (predicted.float() - velocity).square().mean() + WEIGHT * alignment

    @torch.no_grad()
    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.averages, self.weights, 1 - DECAY)


class Ours(Step):
    """The parts that training/train_erw.py is made of, in its order."""

    def build(self, transformer, projector, encoder, config) -> None:
        self.model = AlignedTransformer(transformer, [projector], self.depth)
        self.encoder = encoder.to(self.setting.dtype)
        self.flops = count_step_flops(self.model, [encoder])
        self.trained = list(self.model.parameters())
        self.optimizer = build_optimizer(self.model, "adamw", LEARNING_RATE, (0.9, 0.999), 1e-8, 0.0)
        self.ema = EMA(transformer, [EMAProfile(decay=DECAY)])
        if self.setting.device == "cuda":
            self.encoder.model.compile()
        compiled(self.model, self.setting)

    def losses(self) -> torch.Tensor:
        batch = self.batch
        with self.setting.autocast():
            targets = [self.encoder(batch["pixels"].float() / 255)]
            return Objective().full_loss(self.model, training_batch(batch, targets), WEIGHT).loss

    def update(self) -> None:
        self.optimizer.found_inf = (~self.grad_norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step()


def build_dinov2(grid: int, quick: bool) -> Dinov2Model:
    """DINOv2-B's shape with random weights, for images of 14 px per token."""
    torch.manual_seed(2)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} if quick else {}
    return Dinov2Model(Dinov2Config(image_size=14 * grid, patch_size=14, **small))


def build_encoder(setting: Setting, grid: int) -> RepresentationEncoder:
    network = build_dinov2(grid, setting.quick)
    return RepresentationEncoder(network, IMAGENET_MEAN, IMAGENET_STD, grid).to(setting.device)


def measure_step(size: str, setting: Setting) -> dict[str, object]:
    """The three steps in turns, and the parts of ours that are not the model."""
    config = model_config(size)
    grid = config["sample_size"] // config["patch_size"]
    classes = {"as published": AsPublished, "written well": WrittenWell, "ours": Ours}
    steps = {name: way(size, setting, build_encoder(setting, grid), config) for name, way in classes.items()}
    first = {name: float(step.run()) for name, step in steps.items()}
    for name in ("as published", "written well"):
        for ours, theirs in (
            (first["ours"], first[name]),
            (float(steps["ours"].grad_norm), float(steps[name].grad_norm)),
        ):
            if not math.isclose(ours, theirs, rel_tol=setting.tolerance):
                raise AssertionError(f"ours gives {ours}, the step {name} {theirs}: they do not compute the same")
    ours = steps["ours"]
    norms = {name: float(step.grad_norm) for name, step in steps.items()}

    # The parts beside the model and the encoder, each alone
    targets = ours.encoder(ours.batch["pixels"].float() / 255)
    projected = torch.randn(targets.shape, device=setting.device, dtype=setting.dtype, requires_grad=True)
    gradients = [torch.randn_like(parameter) * 1e-3 for parameter in ours.trained]

    def loss_part() -> None:
        predicted = ours.batch["x0"].detach().clone().requires_grad_()
        _, velocity = interpolate(ours.batch["x0"], ours.batch["noise"], ours.batch["t"])
        alignment = cosine_alignment_loss(projected, targets).mean()
        ((predicted - velocity).square().mean() + WEIGHT * alignment).backward()

    def update_part() -> None:
        # The projector is not in the share, but its weights are part of the optimizer's work.
        for parameter, gradient in zip(ours.trained, gradients, strict=True):
            parameter.grad = gradient
        float(nn.utils.clip_grad_norm_(ours.trained, 1.0))
        ours.optimizer.step()
        ours.optimizer.zero_grad()

    numbers = sum(parameter.numel() for parameter in ours.trained)
    averaged = sum(parameter.numel() for parameter in ours.model.transformer.parameters())
    # AdamW reads weight, gradient and two moments and writes three of them; clipping reads the gradient twice and
    # writes it; the EMA reads weight and average and writes the average. All of 4 bytes.
    moved = 4 * (numbers * (7 + 3) + averaged * 3)
    source, sums = torch.zeros(2, averaged, device=setting.device)  # a sum in place reads twice and writes once
    ways: dict[str, Callable[[], object]] = {name: step.run for name, step in steps.items()}
    ways |= {"loss": loss_part, "optimizer": update_part, "ema": ours.ema.step}
    ways["sum in place"] = lambda: sums.add_(source)
    seconds = in_turns(ways, setting.repeats, 1, setting.device, f"step {size}")
    bandwidth = 12 * averaged / statistics.median(seconds["sum in place"])
    parts = [sum(part) for part in zip(seconds["loss"], seconds["optimizer"], seconds["ema"], strict=True)]
    update = [sum(part) for part in zip(seconds["optimizer"], seconds["ema"], strict=True)]
    return {
        "first_loss": first,
        "first_grad_norm": norms,
        "flops_of_ours": setting.batch * ours.flops,
        "seconds": seconds,
        "ratio_to_as_published": ratio(seconds["ours"], seconds["as published"]),
        "ratio_to_written_well": ratio(seconds["ours"], seconds["written well"]),
        "share_of_loss_ema_optimizer": ratio(parts, seconds["ours"]),
        "bytes_per_second": bandwidth,
        "optimizer_and_ema_over_bandwidth_floor": spread([value / (moved / bandwidth) for value in update]),
    }


# Warmup


def measure_warmup(size: str, setting: Setting) -> dict[str, object]:
    """A warmup step (a third of the blocks, no final layer) beside one of full training, without encoder and projector."""
    config, device = model_config(size), setting.device
    depth = max(1, config["num_layers"] // 3)
    batch = draw_batch(config, setting.batch, device, image_side=8)
    tokens = (config["sample_size"] // config["patch_size"]) ** 2
    targets = [torch.randn(setting.batch, tokens, width(config), device=device)]

    early = build_warmup_transformer(config, depth).to(device).train()
    models = {
        "warmup": AlignedTransformer(early, [nn.Identity()], depth, warmup=True),
        "full": AlignedTransformer(build_ours(config, device), [nn.Identity()], depth),
    }
    flops = {name: count_step_flops(model, []) for name, model in models.items()}
    ways = {name: step_of(compiled(model, setting), batch, targets, setting) for name, model in models.items()}
    seconds = in_turns(ways, setting.repeats, 2, device, f"warmup {size}")
    return {
        "depth": depth,
        "num_layers": config["num_layers"],
        "seconds": seconds,
        "ratio": ratio(seconds["warmup"], seconds["full"]),
        "flops_ratio": flops["warmup"] / flops["full"],
    }


def step_of(
    model: AlignedTransformer, batch: dict[str, torch.Tensor], targets: list[torch.Tensor] | None, setting: Setting
) -> Callable[[], None]:
    """A step of the model's phase on given tokens, or without alignment."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(model, "adamw", LEARNING_RATE, (0.9, 0.999), 1e-8, 0.0)
    ema = None if model.warmup else EMA(model.transformer, [EMAProfile(decay=DECAY)])

    def step() -> None:
        with setting.autocast():
            if model.warmup:
                loss = Objective().warmup_loss(model, training_batch(batch, targets, noised=False)).loss
            else:
                loss = Objective().full_loss(model, training_batch(batch, targets), WEIGHT).loss
        loss.backward()
        float(nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step()

    return step


# Scaling and memory


def measure_scaling(size: str, setting: Setting, memory: bool = True) -> dict[str, object]:
    """Steps with other batch sizes, token counts and depths: one factor of proportion to the FLOPs, fitted to all."""
    base, layers = setting.batch, model_config(size)["num_layers"]
    points = {  # batch, sample_size, num_layers
        f"batch {max(1, base // 2)}": (max(1, base // 2), 32, layers),
        f"batch {base}": (base, 32, layers),
        f"batch {2 * base}": (2 * base, 32, layers),
        f"1024 tokens, batch {max(1, base // 4)}": (max(1, base // 4), 64, layers),
        f"depth {layers // 2 or 1}": (base, 32, layers // 2 or 1),
        f"depth {2 * layers}": (base, 32, 2 * layers),
    }
    ways, flops = {}, {}
    for name, (batch, sample_size, depth) in points.items():
        ways[name], flops[name] = plain_step(model_config(size, sample_size, depth), batch, setting)
    seconds = in_turns(ways, setting.repeats, 1, setting.device, f"scaling {size}")
    rates = {name: flops[name] / statistics.median(values) for name, values in seconds.items()}
    fitted = statistics.geometric_mean(rates.values())
    return {
        "flops": flops,
        "seconds": seconds,
        "fitted_flops_per_second": fitted,
        "deviation": {name: fitted / rate - 1 for name, rate in rates.items()},
        "memory_bytes": measure_memory(size, setting) if memory else {},
    }


def plain_step(
    config: dict[str, int], batch_size: int, setting: Setting, checkpointing: bool = False
) -> tuple[Callable[[], None], int]:
    """A step of full training without alignment, eager, and its FLOPs."""
    model = AlignedTransformer(build_ours(config, setting.device), [], 1)
    flops = batch_size * count_step_flops(model, [])
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    return step_of(model, draw_batch(config, batch_size, setting.device, image_side=8), None, setting), flops


def measure_memory(size: str, setting: Setting) -> dict[str, dict[str, float]]:
    """Peak bytes of tensors in a step: the weights' state (weights, gradients, moments, average) and the rest."""
    ways = {"without checkpointing": False, "with checkpointing": True}
    return {name: memory_of(size, setting, checkpointing) for name, checkpointing in ways.items()}


def memory_of(size: str, setting: Setting, checkpointing: bool) -> dict[str, float]:
    """Peak bytes of one way; its model is freed on return."""
    config, batch = model_config(size), 64 if setting.quick else setting.batch
    if setting.device == "cuda":
        gc.collect()  # a model left in a reference cycle would count in `before`, and not in what follows
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    step, _ = plain_step(config, batch, setting, checkpointing)
    step()  # the optimizer's moments exist from here on
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        state = torch.cuda.memory_allocated() - before
        seconds = seconds_of(step, setting.device)
        return {"peak": torch.cuda.max_memory_allocated() - before, "state": state, "seconds": seconds}
    model = build_ours(config)
    state = 16 * sum(parameter.numel() for parameter in model.parameters())
    seconds = seconds_of(step)
    tracker = MemTracker()
    with tracker:
        step()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    peak = state + next(value for key, value in snapshot.items() if "Total" in str(key))
    return {"peak": peak, "state": state, "seconds": seconds}


# Reporting


def report(result: dict[str, object]) -> str:
    """What was measured, in Markdown; what was not is named."""
    rows_forward, rows_step, rows_targets = [], [], []
    for key, found in result["forward"].items():
        for way, values in found["seconds"].items():
            rows_forward.append(
                (
                    key, way, f"{found['parameters'][way] / 1e6:.1f} M", shown(spread(values), 3),
                    shown(found["ratio_to_plain"][way]), f"{found['flops_per_second'][way] / 1e12:.3f}",
                    f"{found['share_of_ceiling'][way]:.0%}",
                )
            )  # fmt: skip
        rows_forward.append(
            (
                key,
                f"matmul {found['matmul_side']}^3",
                "",
                "",
                "",
                f"{found['ceiling_flops_per_second'] / 1e12:.3f}",
                "100%",
            )
        )
        float32 = "float32" in key and "tiny" not in key
        for way, target in (("ours", 1.05), ("ours, compiled", 0.90)):
            value = found["ratio_to_plain"][way]
            held = verdict(value["median"], target) if float32 else ""
            rows_targets.append((f"{way} / PlainSiT, {key}", shown(value), f"<= {target:.2f}", held))
    for key, found in result["step"].items():
        for way in ("as published", "written well", "ours"):
            rows_step.append((key, way, shown(spread(found["seconds"][way]), 3), f"{found['first_loss'][way]:.6f}"))
        bf16 = "bfloat16" in key and "tiny" not in key
        for name, target in (("as_published", 0.60), ("written_well", 0.90)):
            value = found[f"ratio_to_{name}"]
            held = verdict(value["median"], target) if bf16 else "the target is of bf16"
            rows_targets.append(
                (f"step, ours / {name.replace('_', ' ')}, {key}", shown(value), f"<= {target:.2f}", held)
            )
        share = found["share_of_loss_ema_optimizer"]
        held = verdict(share["median"], 0.10) if key == "B/2 float32" else ""
        rows_targets.append((f"loss, EMA and optimizer in our step, {key}", shown(share, 3), "<= 0.10 (B/2)", held))
        floor = found["optimizer_and_ema_over_bandwidth_floor"]
        rows_targets.append((f"optimizer and EMA / memory-bandwidth floor, {key}", shown(floor), "", ""))
    for key, found in result["warmup"].items():
        name = f"warmup step / full step, depth {found['depth']} of {found['num_layers']}, {key}"
        rows_targets.append(
            (name, shown(found["ratio"]), "<= 0.40", verdict(found["ratio"]["median"], 0.40))
            if key.startswith("B/2")
            else (name, shown(found["ratio"]), "", "")
        )
    for key, found in result["scaling"].items():
        worst = max(map(abs, found["deviation"].values()))
        held = "" if "tiny" in key else verdict(worst, 0.15)
        name = f"step against the FLOP count, largest deviation, {key}"
        rows_targets.append((name, f"{worst:.2f}", "<= 0.15", held))
    for missing in result["not_measured"]:
        rows_targets.append((missing["what"], NOT_MEASURED, "", missing["why"]))
    parts = [table(("figure", "median (min - max)", "target", ""), rows_targets)]
    if rows_forward:
        header = ("model", "way", "parameters", "s, forward + backward", "of PlainSiT", "TFLOP/s", "of a matmul")
        parts.append(table(header, rows_forward))
        parts.append(
            "diffusers' DiT predicts noise and variance (8 channels), takes whole timesteps, drops labels by itself, and "
            "has an embedding of time and class in every block, which is where its further parameters come from. TFLOP/s "
            "are of the FLOPs of our model for all.\n"
        )
    if rows_step:
        parts.append(table(("model", "step", "s", "loss of the first step"), rows_step))
    if result["scaling"]:
        rows = []
        for key, found in result["scaling"].items():
            for name, values in found["seconds"].items():
                gigaflops, deviation = found["flops"][name] / 1e9, found["deviation"][name]
                rows.append((key, name, f"{gigaflops:.0f}", shown(spread(values), 3), f"{deviation:+.0%}"))
        parts.append(table(("model", "step", "GFLOP", "s", "from the fit"), rows))
        rows = [
            (key, name, *(f"{memory[part] / 2**20:.0f}" for part in ("state", "peak")), f"{memory['seconds']:.2f}")
            for key, found in result["scaling"].items()
            for name, memory in found["memory_bytes"].items()
        ]
        parts.append(table(("model", "", "state, MiB", "peak, MiB", "s a step, once"), rows))
    parts.append(
        f"{result['rounds']} rounds. Batch {result['batch']}, latents 4x32x32. {describe(result['environment'])}\n"
    )
    return "\n".join(parts)


def plot(result: dict[str, object]) -> Figure:
    """Medians of every way, as shares of the first of its section, and the steps over their FLOPs."""
    figure = Figure(figsize=(11, 4.5))
    left, right = figure.subplots(1, 2)
    bars = []
    for key, found in result["forward"].items():
        bars += [(f"{key}\n{way}", value["median"]) for way, value in found["ratio_to_plain"].items()]
    for key, found in result["step"].items():
        first = statistics.median(found["seconds"]["as published"])
        for way in ("as published", "written well", "ours"):
            bars.append((f"step {key}\n{way}", statistics.median(found["seconds"][way]) / first))
    if bars:
        draw_bars(left, bars, "time over PlainSiT's, over the published step's")
    for key, found in result["scaling"].items():
        flops = [found["flops"][name] for name in found["seconds"]]
        right.loglog(flops, [statistics.median(values) for values in found["seconds"].values()], "o", label=key)
        ends = [min(flops), max(flops)]
        right.loglog(ends, [end / found["fitted_flops_per_second"] for end in ends], "-", color="0.5")
        right.legend()
    right.set_xlabel("FLOPs of a step")
    right.set_ylabel("seconds")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, SECTIONS, batch=8, repeats=7)
    args = parser.parse_args(arguments)
    if args.quick:
        args.sizes, args.batch, args.repeats = "tiny", 2, 2
    sizes = args.sizes.split(",")
    result = begin(args, SECTIONS)
    measures = {
        "forward": (measure_forward, sizes),
        "step": (measure_step, sizes),
        "warmup": (measure_warmup, sizes[-1:]),
        "scaling": (measure_scaling, sizes[:1]),
    }
    for name in dtypes(args, result):
        setting = Setting(args.device, getattr(torch, name), args.batch, args.repeats, args.quick)
        for section in args.only:
            measure, its_sizes = measures[section]
            for size in its_sizes:
                result[section][f"{size} {name}"] = measure(size, setting)
                torch._dynamo.reset()
                write(args.output, result, report(result))  # what was measured so far
    finish(args.output, result, report, plot)


if __name__ == "__main__":
    main()
