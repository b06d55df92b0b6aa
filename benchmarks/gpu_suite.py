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
"""What only a GPU can tell of this code: two calls of ten minutes, for one GPU, without a network.

    PYTHONPATH=src python benchmarks/gpu_suite.py --call 1
    PYTHONPATH=src python benchmarks/gpu_suite.py --call 2

Weights are random, the data are made here. The stages that decide most come first. Each is a process with a limit of its own; none
begins that the call's ten minutes would cut short, and what a stage found is in `--output` (JSON, and Markdown beside it)
as soon as it ends. The same command goes on with what is missing or failed. `--device cpu --quick` runs all stages in tiny sizes,
to see that they work.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from common import (
    NOT_MEASURED,
    describe,
    environment,
    in_turns,
    matmul,
    ratio,
    seconds_of,
    shown,
    some_of,
    spread,
    table,
    verdict,
    write,
)

from erw_hf.provenance import device_name
from erw_hf.trainer.flops import peak_flops
from erw_hf.trainer.run_record import read_metrics


REPOSITORY = Path(__file__).resolve().parent.parent
MARGIN = 20  # seconds of a call that are left for what follows its last stage
Found = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """What the stages share."""

    work: Path
    device: str
    quick: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def size(self, name: str) -> str:
        return "tiny" if self.quick else name

    def folder(self, name: str) -> Path:
        """An empty one."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        return self.work / name


# Stages. Each returns what the JSON holds, with a line that says what it decides. Imports are inside: a stage needs not what another
# one lacks.


def stage_attention(suite: Suite) -> Found:
    """A block of XL/2, forward and backward in bf16, by each kernel of attention: finite? near float32's gradient? how fast?"""
    batches, lengths = ((2,), (16, 17)) if suite.quick else ((32, 128, 256), (256, 257))
    cases = [attention_case(suite, batch, tokens) for batch, tokens in itertools.product(batches, lengths)]
    found = [(name, kernel) for case in cases for name, kernel in case["kernels"].items()]
    broken = sorted({name for name, kernel in found if "error" not in kernel and not kernel["difference"] < 0.05})
    last = {name: statistics.median(values) for name, values in cases[-1]["seconds"].items()}
    fastest = min((name for name in last if name not in broken), key=lambda name: last[name])
    gain = last["torch's choice"] / last[fastest]
    times = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in last.items())
    advice = "torch's choice: keep"
    if gain > 1.03 or broken:
        backend = BACKENDS.get(fastest, "native")
        advice = f"set DIFFUSERS_ATTN_BACKEND={backend}, {gain:.2f}x as fast a block as torch's choice"
    line = f"not finite or more than 5 % off: {', '.join(broken) or 'none'}; a block, {cases[-1]['batch']}x{cases[-1]['tokens']} "
    return {"cases": cases, "line": f"{line}tokens: {times}; {advice}"}


BACKENDS = {  # by torch's names
    "CUDNN_ATTENTION": "_native_cudnn",
    "FLASH_ATTENTION": "_native_flash",
    "EFFICIENT_ATTENTION": "_native_efficient",
    "MATH": "_native_math",
}


def attention_case(suite: Suite, batch: int, tokens: int) -> Found:
    """A block with so many tokens; the kernel that torch chooses, as the profiler names it, and each of the others."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from train_step import build_ours, model_config

    block = build_ours(model_config(suite.size("XL/2"), num_layers=1), suite.device).transformer_blocks[0]
    torch.manual_seed(0)
    width = block.attn.to_q.in_features
    hidden = torch.randn(batch, tokens, width, device=suite.device)
    temb = torch.randn(batch, width, device=suite.device)

    def gradient(dtype: torch.dtype, name: str | None) -> torch.Tensor:
        """Of the tokens and the weights, as one vector."""
        inputs = [hidden.clone().requires_grad_(), *block.parameters()]
        kernel = contextlib.nullcontext() if name is None else sdpa_kernel(getattr(SDPBackend, name))
        with kernel, torch.autocast(suite.device, dtype, enabled=dtype != torch.float32):
            output = block(inputs[0].to(dtype), temb)
        return torch.cat([g.flatten().float() for g in torch.autograd.grad(output.float().square().sum(), inputs)])

    exact = gradient(torch.float32, "MATH")
    case: Found = {"batch": batch, "tokens": tokens, "kernels": {}}
    for name in BACKENDS:
        if name == "MATH" and not suite.quick:
            continue  # holds all scores, 34 GB of them at 256 images
        try:
            found = gradient(torch.bfloat16, name)
        except RuntimeError as error:  # a kernel that does not take this shape, or not this device
            case["kernels"][name] = {"error": str(error).splitlines()[0][:200]}
        else:
            case["kernels"][name] = {"difference": float((found - exact).norm() / exact.norm())}  # NaN if it holds one
    ways = {
        name: lambda n=name: gradient(torch.bfloat16, n) for name, k in case["kernels"].items() if "error" not in k
    }
    ways["torch's choice"] = lambda: gradient(torch.bfloat16, None)
    case["seconds"] = in_turns(ways, 2 if suite.quick else 7, 1, suite.device, f"attention {batch}x{tokens}")
    with torch.profiler.profile() as trace:
        ways["torch's choice"]()
    names = {event.key for event in trace.key_averages()}
    case["chosen"] = sorted(name[:100] for name in names if any(word in name.lower() for word in KINDS["attention"]))
    return case


def stage_train_xl(suite: Suite) -> Found:
    """XL/2 from cached latents, batch 256, by the trainer itself, with ten profiled steps: MFU, memory, where the time goes."""
    return trained(suite, "XL/2", target=0.45)


def stage_train_xl_budget(suite: Suite) -> Found:
    """The same in one pass with `activation_memory_budget` 0.7."""
    return trained(suite, "XL/2", target=0.45, budget=0.7)


def stage_ddp(suite: Suite) -> Found:
    """B/2, its blocks compiled, under DDP with one process: graphs and seconds with torch's cuts of a block and without."""
    import torch.distributed as dist
    from torch._dynamo.utils import counters
    from torch.nn.parallel import DistributedDataParallel
    from train_step import build_ours, draw_batch, model_config

    config = model_config(suite.size("B/2"))
    batch = draw_batch(config, 2 if suite.quick else 64, suite.device, image_side=8)
    ways: Found = {}
    dist.init_process_group("nccl" if suite.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for cut in (True, False):
            torch._dynamo.reset()
            counters.clear()
            with torch._dynamo.config.patch(optimize_ddp=cut):
                transformer = build_ours(config, suite.device)
                compile_blocks(suite, transformer)
                model = DistributedDataParallel(transformer, gradient_as_bucket_view=True, broadcast_buffers=False)

                def step(model=model) -> None:
                    with torch.autocast(suite.device, suite.dtype, enabled=suite.dtype != torch.float32):
                        sample = model(batch["x0"], batch["t"], batch["label"], force_drop_ids=batch["drop"]).sample
                    sample.float().square().mean().backward()

                step(), step()
                seconds = [seconds_of(step, suite.device) for _ in range(2 if suite.quick else 15)]
                name = "cut" if cut else "whole"
                ways[name] = {"graphs": counters["stats"]["unique_graphs"], "seconds": spread(seconds)}
    finally:
        dist.destroy_process_group()
    cut, whole = ways["cut"], ways["whole"]
    gain = cut["seconds"]["median"] / whole["seconds"]["median"]
    line = f"DDP: {whole['graphs']} graph a block in {whole['seconds']['median'] * 1e3:.1f} ms a step, {cut['graphs']} in "
    line += (
        f"{cut['seconds']['median'] * 1e3:.1f} ms; optimize_ddp off: {'keep' if gain > 0.98 else 'turn it on again'}"
    )
    return {"batch": len(batch["x0"]), **ways, "line": line}


def stage_vae(suite: Suite) -> Found:
    """Encoding with Stable Diffusion's autoencoder (random weights) in two ways."""
    from diffusers import AutoencoderKL
    from sampling import tiny_autoencoder

    from erw_hf.data.latents import encode_moments

    images, side = (1, 32) if suite.quick else (32, 256)
    if suite.quick:
        vae = tiny_autoencoder()
    else:
        torch.manual_seed(0)
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **kinds)
    vae = vae.to(suite.device).eval().requires_grad_(False)
    pixels = torch.randint(256, (images, 3, side, side), dtype=torch.uint8, device=suite.device)
    encode = vae.encoder.forward

    def plain() -> torch.Tensor:
        with torch.no_grad():
            posterior = vae.encode(pixels.float() / 255 * 2 - 1).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    fast_encode = encode if suite.quick else torch.compile(encode)

    def fast() -> torch.Tensor:
        with mock.patch.object(vae.encoder, "forward", fast_encode), torch.autocast(suite.device, torch.bfloat16):
            return encode_moments(pixels, vae)

    exact, rounded = plain(), fast()
    difference = float((rounded - exact).norm() / exact.norm())
    ways = {"float32, NCHW, eager": plain, "bf16, channels last, compiled": fast}
    seconds = in_turns(ways, 2 if suite.quick else 7, 1, suite.device, "autoencoder")
    each = {name: 1e3 * statistics.median(values) / images for name, values in seconds.items()}
    gain = ratio(*seconds.values())
    sound = bool(rounded.isfinite().all()) and difference < 0.05
    advice = "keep" if sound and gain["median"] > 1 else "encode in float32"
    times = " against ".join(f"{ms:.2f} ms an image ({name})" for name, ms in reversed(each.items()))
    line = f"bf16 autoencoder: {times}, {shown(gain)}x, relative difference {difference:.1e}: {advice}"
    return {"images": images, "seconds": seconds, "difference": difference, "finite": sound, "line": line}


def stage_fsdp2(suite: Suite) -> Found:
    """The trainer in bf16 under FSDP2 with one process: does the model see the times as they were drawn?"""
    if suite.device == "cpu":
        return {"skipped": True, "line": "skipped: CUDA only; on CPUs the tests run FSDP2 with two processes"}
    from diffusers.models.embeddings import Timesteps

    flags = {
        "config": REPOSITORY / "training/configs/digits.yaml", "warmup_steps": 0, "lr_warmup_steps": 1,
        "num_validation_images": 4, "validation_steps": 0, "report_to": "none", "output_dir": suite.folder("fsdp2"),
    }  # fmt: skip
    exact = []
    embed = Timesteps.forward

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        if times.device.type == "cuda":
            exact.append(times.dtype == torch.float32 and not torch.equal(times, times.bfloat16().float()))
        return embed(self, times)

    with mock.patch.object(Timesteps, "forward", forward):
        lines, _, state = run_trainer(suite, flags | {"torch_compile": "no"}, steps=4)
    if "FSDP" not in state or not exact or not all(exact):
        raise AssertionError(f"under {state}, batches whose times came in float32: {sum(exact)} of {len(exact)}")
    losses = [line["loss"] for line in lines]
    line = f"FSDP2 in bf16: times exact in {len(exact)} of {len(exact)} forwards, losses {losses[0]:.3f} to {losses[-1]:.3f}: sound"
    return {"losses": losses, "exact": exact, "line": line}


def stage_resume(suite: Suite) -> Found:
    """A run that is killed twice, in either phase, and resumed, beside one that is left alone."""
    folder = suite.folder("resume")
    flags = {
        "config": REPOSITORY / "training/configs/digits.yaml",
        "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "projector_dim": 32, "warmup_depth": 2,
        "projector_depth": 2, "warmup_steps": 4, "max_train_steps": 12, "train_batch_size": 4, "lr_warmup_steps": 2,
        "validation_steps": 0, "num_validation_images": 4, "num_inference_steps": 2, "checkpointing_steps": 2,
        "report_to": "none", "torch_compile": "no",
    }  # fmt: skip
    killed = {**flags, "output_dir": folder / "killed"}
    alone = {**flags, "output_dir": folder / "alone"}
    kills = (7,) if suite.quick else (3, 7)
    for step in kills:
        train(suite, killed | {"resume_from_checkpoint": "latest"}, kill_at=step)
    train(suite, killed | {"resume_from_checkpoint": "latest"})
    train(suite, alone)
    ours, theirs = (read_metrics(run["output_dir"] / "metrics.jsonl") for run in (killed, alone))
    if [line["step"] for line in ours] != list(range(1, len(theirs) + 1)):
        raise AssertionError(f"steps of the resumed run: {[line['step'] for line in ours]}")
    deviation = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True))
    # Kernels that add in any order let a GPU's last bits differ; a resume that lost anything is off by far more.
    if deviation > (1e-2 if suite.device == "cuda" else 0):
        raise AssertionError(f"losses differ by {deviation:.2e} from those of the run that was left alone")
    line = f"killed at steps {', '.join(map(str, kills))} and resumed: losses within {deviation:.1e} of a run left alone: sound"
    return {"killed_at": kills, "steps": len(ours), "largest_relative_difference_of_losses": deviation, "line": line}


def stage_train_b(suite: Suite) -> Found:
    """B/2 from cached latents, batch 256."""
    return trained(suite, "B/2", target=0.40)


def stage_sampling(suite: Suite) -> Found:
    """The SDE in bf16, compiled, beside a plain SiT in float32 (TF32 on), both with guidance in the interval."""
    from train_step import build_ours, build_plain, model_config

    from erw_hf import FlowMatchEulerMaruyamaScheduler

    config, steps = model_config(suite.size("XL/2")), 4 if suite.quick else 250
    labels = list(range(2 if suite.quick else 8))
    plain = build_plain(build_ours(config, suite.device), config, suite.device).eval()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def draw(pipe, steps: int = steps) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(labels, num_inference_steps=steps, generator=generator, output_type="latent").images

    @torch.no_grad()
    def draw_plain(steps: int = steps) -> torch.Tensor:
        scheduler, generator = FlowMatchEulerMaruyamaScheduler(), torch.Generator().manual_seed(0)
        scheduler.set_timesteps(steps, device=suite.device)
        shape = (len(labels), 4, config["sample_size"], config["sample_size"])
        x = torch.randn(shape, generator=generator).to(suite.device)
        y = torch.tensor(labels, device=suite.device)
        for timestep in scheduler.timesteps:
            t = float(timestep) / 1000
            if t <= 0.7 + 1e-6:
                both = torch.cat([y, torch.full_like(y, 1000)])
                times = torch.full((len(both),), t, device=suite.device)
                v, null = plain(torch.cat([x, x]), times, both, torch.zeros_like(both))[0].chunk(2)
                v = null + 1.8 * (v - null)
            else:
                v = plain(x, torch.full((len(y),), t, device=suite.device), y, torch.zeros_like(y))[0]
            x = scheduler.step(v, timestep, x, generator=generator, return_dict=False)[0]
        return x

    theirs = draw_plain(4)
    difference = float((draw(latent_pipe(build_ours(config, suite.device)), 4) - theirs).norm() / theirs.norm())
    if difference > 1e-3:
        raise AssertionError(f"the plain sampler and ours differ by {difference:.2e} in float32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    names = ("ours, eager", "ours, compiled")
    pipes = {name: latent_pipe(build_ours(config, suite.device).to(suite.dtype)) for name in names}
    compile_blocks(suite, pipes["ours, compiled"].transformer)
    ways = {"PlainSiT, float32 (TF32), eager": draw_plain}
    ways |= {name: lambda p=pipe: draw(p) for name, pipe in pipes.items()}
    seconds = in_turns(ways, 2, 1, suite.device, "sampling")
    reference = seconds["PlainSiT, float32 (TF32), eager"]
    gains = {name: ratio(reference, values) for name, values in seconds.items()}
    gain = gains["ours, compiled"]
    line = f"{steps}-step SDE of {len(labels)} pictures, bf16 compiled: {shown(gain)}x a plain SiT in float32 (TF32); "
    line += f"at least 3x: {verdict(gain['median'], 3, at_least=True)}"
    return {
        "steps": steps, "batch": len(labels), "difference_in_float32": difference, "seconds": seconds, "speed_up": gains,
        "line": line,
    }  # fmt: skip


def stage_muon(suite: Suite) -> Found:
    """A step of the optimizer and of the average alone, with XL's weights."""
    from train_step import build_ours, model_config

    from erw_hf.objective import AlignedTransformer
    from erw_hf.trainer.ema import EMA, EMAProfile
    from erw_hf.trainer.optimizers import build_optimizer

    model = AlignedTransformer(build_ours(model_config(suite.size("XL/2")), suite.device), [], 1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    names = ("adamw", "muon")
    optimizers = {name: build_optimizer(model, name, 1e-6, (0.9, 0.999), 1e-8, 0.0) for name in names}
    ways = {name: optimizer.step for name, optimizer in optimizers.items()}
    ways["average"] = EMA(model, [EMAProfile(decay=0.9999)]).step
    seconds = in_turns(ways, 2 if suite.quick else 10, 1, suite.device, "optimizers")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    milliseconds = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    rate = 28 * numbers / statistics.median(seconds["adamw"])
    line = f"a step of AdamW at XL takes {milliseconds['adamw']:.1f} ms ({rate / 1e12:.2f} TB/s), of Muon "
    line += f"{milliseconds['muon']:.1f} ms, of the average {milliseconds['average']:.1f} ms, which every k steps would save at most"
    return {"parameters": numbers, "seconds": seconds, "bytes_per_second_of_adamw": rate, "line": line}


def stage_train_xl_encoder(suite: Suite) -> Found:
    """XL/2, batch 256, latents and images from the cache, aligned with a DINOv2-B, budget 0.7."""
    return trained(suite, "XL/2", target=0.45, budget=0.7, encoder=True)


def stage_ceiling(suite: Suite) -> Found:
    """What a large product of matrices and a large copy reach."""
    side, numbers = (128, 2**16) if suite.quick else (8192, 2**28)
    multiply, flops = matmul(side, suite.dtype, suite.device, times=10)
    source = torch.zeros(numbers, device=suite.device)
    destination = torch.empty_like(source)
    ways = {
        "matmul": multiply,
        "copy": lambda: [destination.copy_(source) for _ in range(10)],
    }
    seconds = in_turns(ways, 5, 2, suite.device, "ceiling")
    rate, copied = flops / statistics.median(seconds["matmul"]), 80 * numbers / statistics.median(seconds["copy"])
    peak = peak_flops(torch.device(suite.device))
    share = (
        "whose peak is not known"
        if peak is None
        else f"{rate / peak:.0%} of the {peak / 1e12:.0f} that MFU is a share of"
    )
    line = f"a large matmul: {rate / 1e12:.3g} TFLOP/s, {share}; a large copy: {copied / 1e12:.2g} TB/s"
    return {"flops_per_second": rate, "bytes_per_second": copied, "seconds": seconds, "line": line}


def stage_paths(suite: Suite) -> Found:
    """Each path of the model and the optimizers, against a plainer one."""
    from train_step import build_ours, build_plain, draw_batch, model_config, training_batch

    from erw_hf.objective import AlignedTransformer, Objective
    from erw_hf.trainer.ema import EMA, EMAProfile
    from erw_hf.trainer.optimizers import build_optimizer

    device = suite.device
    config = model_config("tiny") if suite.quick else model_config("B/2", num_layers=4)
    batch = draw_batch(config, 8, device, image_side=8)

    def loss_of(model, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        where = next(model.parameters()).device.type
        data = {name: tensor.to(where) for name, tensor in batch.items()}
        with torch.autocast(where, dtype, enabled=dtype != torch.float32):
            return Objective().full_loss(AlignedTransformer(model, [], 1), training_batch(data, None), 0.0).loss

    def gradient_of(model, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss_of(model, dtype).backward()
        return torch.cat([parameter.grad.flatten().float().cpu() for parameter in model.parameters()])

    def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
        difference = float((found - expected).norm() / expected.norm())
        if not difference <= tolerance:
            raise AssertionError(f"relative difference {difference:.2e}, expected at most {tolerance:.0e}")
        return f"relative difference {difference:.1e}"

    def trained(optimizer_of: Callable, fresh) -> list[torch.Tensor]:
        model = fresh()
        optimizer = optimizer_of(AlignedTransformer(model, [], 1))
        ema = EMA(model, [EMAProfile(decay=0.9)])
        losses = []
        for _ in range(5):
            loss = loss_of(model, suite.dtype)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.step()
            losses.append(loss.detach().cpu())
        if not losses[-1] < losses[0]:
            raise AssertionError(f"the loss does not fall: {[float(loss) for loss in losses]}")
        return losses

    def fresh():
        return build_ours(config, device)

    def build(name: str) -> Callable:
        return lambda model: build_optimizer(model, name, 1e-3, (0.9, 0.999), 1e-8, 0.0)

    expected = gradient_of(build_ours(config))

    def float32_as_on_the_cpu() -> str:
        return near(gradient_of(build_ours(config).to(device)), gradient_of(build_ours(config)), 1e-3)

    def plain_model() -> str:
        model = build_ours(config)
        plain = build_plain(model, config, device)
        inputs = (batch["x0"], batch["t"], batch["label"])
        return near(
            model.to(device)(*inputs, force_drop_ids=batch["drop"]).sample.detach(),
            plain(*inputs, batch["drop"])[0].detach(), 1e-3,
        )  # fmt: skip

    def bf16() -> str:
        return near(gradient_of(build_ours(config).to(device), torch.bfloat16), expected, 0.05)

    def compiled_bf16() -> str:
        model = build_ours(config).to(device)
        model.compile_repeated_blocks(fullgraph=True, backend="eager" if suite.quick else "inductor")
        return near(gradient_of(model, suite.dtype), expected, 0.05)

    def gradient_checkpointing() -> str:
        model = build_ours(config).to(device)
        model.enable_gradient_checkpointing()
        return near(gradient_of(model, suite.dtype), expected, 0.05)

    def fused_adamw() -> str:
        unfused = trained(lambda m: torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=0.0, foreach=False), fresh)
        return near(torch.stack(trained(build("adamw"), fresh)), torch.stack(unfused), 0.02)

    def muon() -> str:
        losses = trained(build("muon"), fresh)
        return f"loss {float(losses[0]):.4f}, after 4 steps {float(losses[-1]):.4f}"

    def flash_attention() -> str:
        if device == "cpu":
            return "skipped: CUDA only"
        model = build_ours(config).to(device)
        model.set_attention_backend("_native_flash")
        return near(gradient_of(model, suite.dtype), expected, 0.05)

    def cuda_graphs() -> str:
        if device == "cpu":
            return "skipped: CUDA only"
        pipe = latent_pipe(fresh().to(suite.dtype))

        def draw() -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            return pipe([1, 2], num_inference_steps=8, generator=generator, output_type="latent").images

        eager = draw()
        pipe.transformer.compile(mode="reduce-overhead", fullgraph=True)
        draw(), draw()  # compiled, then recorded
        return near(draw(), eager, 0.05)

    checks = (
        float32_as_on_the_cpu, plain_model, bf16, compiled_bf16, gradient_checkpointing, fused_adamw, muon,
        flash_attention, cuda_graphs,
    )  # fmt: skip
    found = {}
    # TF32 would hide what float32 gives.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            found[name] = {"passed": True, "note": check()}
        except Exception:
            found[name] = {"passed": False, "note": traceback.format_exc()[-2000:]}
        print(f"{name}: {found[name]['note'].splitlines()[-1]}", flush=True)
    failed = [name for name, check in found.items() if not check["passed"]]
    if failed:
        raise AssertionError(
            "\n".join(f"{name}: {found[name]['note']}" for name in failed) + f"\ndiffer: {', '.join(failed)}"
        )
    return {"checks": found, "line": f"{len(found)} paths of model and optimizers agree with plainer ones: sound"}


def stage_cuda_graphs(suite: Suite) -> Found:
    """Sampling of B/2, two pictures at a time, where launching kernels takes longer than running them."""
    from train_step import build_ours, model_config

    config, steps = model_config(suite.size("B/2")), 4 if suite.quick else 250
    ways = {}
    for name in ("eager", "compiled by block", "CUDA graphs"):
        if name == "CUDA graphs" and suite.device == "cpu":
            continue
        pipe = latent_pipe(build_ours(config, suite.device).to(suite.dtype))
        if name == "compiled by block":
            compile_blocks(suite, pipe.transformer)
        if name == "CUDA graphs":
            pipe.transformer.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
        ways[name] = lambda p=pipe: p([1, 2], num_inference_steps=steps, output_type="latent")
    seconds = in_turns(ways, 2 if suite.quick else 5, 2, suite.device, "cuda graphs")
    gains = {name: ratio(seconds["eager"], values) for name, values in seconds.items()}
    best = max(gains, key=lambda name: gains[name]["median"])
    times = ", ".join(f"{name} {shown(gain)}x" for name, gain in gains.items())
    line = f"two pictures of B/2: {times} eager's: recommend {best}"
    return {"steps": steps, "batch": 2, "seconds": seconds, "speed_up": gains, "line": line}


def stage_step(suite: Suite) -> Found:
    """benchmarks/train_step.py's forward and whole step, at B/2 in bf16."""
    from train_step import Setting, measure_forward, measure_step

    setting = Setting(suite.device, suite.dtype, 2 if suite.quick else 64, 2 if suite.quick else 7, suite.quick)
    size = suite.size("B/2")
    forward, step = measure_forward(size, setting), measure_step(size, setting)
    compiled, published = forward["ratio_to_plain"]["ours, compiled"], step["ratio_to_as_published"]
    line = f"B/2: forward and backward, compiled, {shown(compiled)} of a plain SiT's time; a step {shown(published)} of the "
    line += f"published one's (at most 0.6: {verdict(published['median'], 0.6)})"
    return {"batch": setting.batch, "forward": forward, "step": step, "line": line}


def stage_evaluate(suite: Suite) -> Found:
    """training/evaluate.py on the shipped digits."""
    folder = suite.folder("evaluate")
    flags = {
        "model": REPOSITORY / "pipelines/erw-digits",
        "reference": "digits",
        "extractor": REPOSITORY / "pipelines/digits-classifier",
        "metrics": "fid",
        "num_samples": 4 if suite.quick else 500,
        "batch_size": 4 if suite.quick else 100,
        "num_inference_steps": 2 if suite.quick else 50,
        "mixed_precision": "no" if suite.device == "cpu" else "bf16",
        "output_dir": folder,
    }
    run_script(suite, "training/evaluate.py", flags)
    record = json.loads((folder / "evaluation.json").read_text())
    line = f"evaluate.py: FID {record['metrics']['fid']:.3g} of {flags['num_samples']} digits: runs"
    return {**{name: record[name] for name in ("metrics", "hardware", "seconds")}, "line": line}


# By call, in order; with the seconds after which a stage is ended.
CALLS: dict[int, dict[Callable[[Suite], Found], int]] = {
    1: {
        stage_attention: 90, stage_train_xl: 200, stage_train_xl_budget: 160, stage_ddp: 120, stage_vae: 120, stage_fsdp2: 90,
        stage_resume: 150, stage_ceiling: 60,
    },
    2: {
        stage_train_b: 150, stage_sampling: 150, stage_muon: 60, stage_train_xl_encoder: 180, stage_paths: 120,
        stage_cuda_graphs: 120, stage_step: 120, stage_evaluate: 90,
    },
}  # fmt: skip
STAGES = {
    function.__name__.removeprefix("stage_"): (function, limit)
    for call in CALLS.values()
    for function, limit in call.items()
}
ENOUGH = 45  # seconds that a stage must have at least, to be begun


def latent_pipe(transformer):
    """Our pipeline without an autoencoder."""
    from erw_hf import ERWPipeline, FlowMatchEulerMaruyamaScheduler

    pipe = ERWPipeline(transformer.eval(), None, FlowMatchEulerMaruyamaScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compile_blocks(suite: Suite, transformer) -> None:
    backend = "eager" if suite.quick else "inductor"
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)


# The trainer on data that are made here


def synthetic_data(suite: Suite) -> Path:
    """A latent cache with its images, an autoencoder and an encoder of random weights, made once."""
    folder = suite.work / "data"
    if (folder / "done").exists():
        return folder
    from data import photographs, write_cache
    from sampling import tiny_autoencoder
    from train_step import build_dinov2
    from transformers import BitImageProcessorPil

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "cache").mkdir(parents=True)
    side = 8 if suite.quick else 32
    files = photographs(8 if suite.quick else 200, seed=0)
    write_cache(folder / "cache", 64 if suite.quick else 20_000, files, side=side)
    tiny_autoencoder().save_pretrained(folder / "vae")
    build_dinov2(side // 2, suite.quick).save_pretrained(folder / "encoder")
    pixels = 14 * side // 2
    crop = {"height": pixels, "width": pixels}
    BitImageProcessorPil(size={"shortest_edge": pixels}, crop_size=crop).save_pretrained(folder / "encoder")
    (folder / "done").touch()
    return folder


def trained(suite: Suite, size: str, target: float, budget: float = 1.0, encoder: bool = False) -> Found:
    """Some steps of training/train_erw.py from a latent cache, and what it says of itself."""
    from train_step import model_config

    data = synthetic_data(suite)
    batch, skipped, measured, profiled = (4, 2, 3, 1) if suite.quick else (256, 10, 20, 10)
    # 80 GB hold the activations of half of XL's batch, or of all with a budget.
    small = suite.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 100e9
    parts = 2 if small and size == "XL/2" and budget == 1 else 1
    flags = {
        "output_dir": suite.folder("train"), "dataset_name": data / "cache", "vae": data / "vae",
        **model_config(suite.size(size)), "train_batch_size": batch // parts, "gradient_accumulation_steps": parts,
        "dataloader_num_workers": 0 if suite.quick else min(12, os.cpu_count() or 1), "max_train_steps": 10**6,
        "checkpointing_steps": 10**6, "validation_steps": 0, "report_to": "none", "alignment_weight": 0.0,
        "activation_memory_budget": budget, "num_validation_images": 4,
    }  # fmt: skip
    if encoder:
        flags |= {
            "encoder": data / "encoder", "alignment_weight": 0.5, "projector_depth": 2 if suite.quick else 8,
            "projector_dim": 32 if suite.quick else 2048,
        }  # fmt: skip
    estimate = estimated_memory(flags)
    lines, shares, _ = run_trainer(suite, flags, skipped + measured, profiled)
    shutil.rmtree(flags["output_dir"])
    lines = lines[skipped:]
    rates = spread([line["images_per_second"] for line in lines])
    wait = spread([line["data_wait"] for line in lines])
    known = lines[0]["mfu"] is not None  # of this card
    mfu = spread([line["mfu"] for line in lines]) if known else None
    peak = lines[-1]["peak_memory_gib"]
    name = f"{size}, batch {batch}{f' in {parts} passes' * (parts > 1)}{f', budget {budget}' * (budget < 1)}"
    name += ", DINOv2-B in the step" * encoder
    reached = "MFU unknown: the table of cards lacks this one"
    if mfu is not None:
        reached = f"MFU {shown(mfu, 3)}, at least {target:.2f}: {verdict(mfu['median'], target, at_least=True)}"
    parts_of = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    line = f"{name}: {rates['median']:.0f} images/s, {reached}; waits for data {wait['median']:.1%} "
    line += f"(below 2 %: {verdict(wait['median'], 0.02)}); peak {peak:.1f} GiB, estimated {estimate:.1f}; {parts_of}"
    return {
        "batch": batch, "gradient_accumulation_steps": parts, "images_per_second": rates, "mfu": mfu, "data_wait": wait,
        "peak_memory_gib": peak, "estimated_memory_gib": estimate, "shares_of_a_step": shares,
        "losses": [line["loss"] for line in lines], "line": line,
    }  # fmt: skip


def estimated_memory(flags: Found) -> float:
    """GiB of tensors in a step, as the dry run estimates them."""
    from erw_hf.encoders import RepresentationEncoder
    from erw_hf.trainer.config import parse_config
    from erw_hf.trainer.memory import GIB, step_memory
    from erw_hf.trainer.setup import build_full_model

    config = parse_config(as_flags(flags))
    encoders = [RepresentationEncoder.from_pretrained(name, config.token_grid) for name in config.encoders]
    with torch.device("meta"):
        model = build_full_model(config, 1000, encoders)
    numbers = [sum(p.numel() for p in module.parameters()) for module in (model.transformer, model, *encoders)]
    memory = step_memory(config, numbers[0], numbers[1], 2 * numbers[1], sum(numbers[2:]), None, 256)
    return (sum(memory.values()) - memory["context"]) / GIB  # which the allocator does not see


class Enough(Exception):
    """The trainer has made the steps that were asked for."""


def run_trainer(
    suite: Suite, flags: Found, steps: int, profiled: int = 0
) -> tuple[list[Found], dict[str, float], str]:
    """
    Some steps of training/train_erw.py in this process, then some profiled ones. Returns the lines of its metrics, the shares of
    a profiled step's time by what was computed, and the engine.
    """
    spec = importlib.util.spec_from_file_location("train_erw", REPOSITORY / "training" / "train_erw.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    train_step, engine = script.train_step, []
    kinds = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[kinds.CUDA if suite.device == "cuda" else kinds.CPU])
    started = 0.0

    def now() -> float:
        if suite.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def counted(phase, batches, step: int):
        nonlocal started
        if profiled and step == steps + 1:  # a step's line is written in the next one
            started = now()
            profiler.start()
        if step == steps + 1 + profiled:
            engine.append(str(phase.inputs.accelerator.distributed_type))
            raise Enough
        return train_step(phase, batches, step)

    script.train_step = counted
    shares = {}
    with in_place_of_a_process(suite, ["train_erw.py", *as_flags(flags)]):
        try:
            script.main()
        except Enough:
            if profiled:
                seconds = now() - started
                profiler.stop()
                shares = shares_of(profiler, seconds, suite.device)
    return read_metrics(flags["output_dir"] / "metrics.jsonl")[:steps], shares, engine[0]


KINDS = {  # by words in the names of kernels, or of operations on a CPU; the first that fits
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": (
        "gemm",
        "nvjet",
        "cutlass",
        "cublas",
        "xmma",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
    ),
    "optimizer and average": ("adam", "multi_tensor", "foreach", "lerp"),
    "generated kernels": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
}


def shares_of(profiler: torch.profiler.profile, seconds: float, device: str) -> dict[str, float]:
    """Of so many seconds."""
    sums: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other kernels")
        sums[kind] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
    shares = {
        kind: microseconds / 1e6 / seconds for kind, microseconds in sorted(sums.items(), key=lambda item: -item[1])
    }
    return shares | {"idle": max(0.0, 1 - sum(shares.values()))}


def as_flags(flags: Found) -> list[str]:
    flags = dict(flags)
    first = ["--config", str(flags.pop("config"))] if "config" in flags else []
    return first + [f"--{name}={value}" for name, value in flags.items()]


def child_environment(suite: Suite) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return environment | ({"ACCELERATE_USE_CPU": "true"} if suite.device == "cpu" else {})


def checked(result: subprocess.CompletedProcess) -> None:
    if result.returncode != 0:
        raise RuntimeError(f"status {result.returncode}:\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}")


def train(suite: Suite, flags: Found, kill_at: int | None = None) -> None:
    """Runs training/train_erw.py to its end, or ends it with SIGKILL once it has written a step."""
    if suite.quick:  # in this process, and without the end, whose pictures would take longest
        run_trainer(suite, flags, kill_at or flags["max_train_steps"] - 2)
        return
    if kill_at is None:
        run_script(suite, "training/train_erw.py", flags)
        return
    command = [sys.executable, "training/train_erw.py", *as_flags(flags)]
    metrics = flags["output_dir"] / "metrics.jsonl"
    before = metrics.read_text() if metrics.exists() else None
    with (suite.work / "train.log").open("w+") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=child_environment(suite), stdout=log, stderr=log)
        try:
            while not (metrics.exists() and (text := metrics.read_text()) != before and f'"step": {kill_at},' in text):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"training ended before step {kill_at}:\n{log.read()[-3000:]}")
                time.sleep(0.05)
        finally:
            kill_tree(process)


def kill_tree(process: subprocess.Popen) -> None:
    """Ends a process and its children, loader workers among them, with SIGKILL."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
                member.kill()
    process.wait()


def run_script(suite: Suite, script: str, flags: Found) -> None:
    """A script of training/; in quick mode in this process, since importing takes longer than the work."""
    if not suite.quick:
        command = [sys.executable, script, *as_flags(flags)]
        checked(subprocess.run(command, cwd=REPOSITORY, env=child_environment(suite), capture_output=True, text=True))
        return
    with in_place_of_a_process(suite, [script, *as_flags(flags)]):
        runpy.run_path(script, run_name="__main__")


@contextlib.contextmanager
def in_place_of_a_process(suite: Suite, arguments: list[str]) -> Iterator[None]:
    """What a script finds when it is started, put back afterwards."""
    from accelerate.state import AcceleratorState, GradientState

    before, environment, folder = sys.argv, os.environ.copy(), os.getcwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    output = io.StringIO() if suite.quick else sys.stdout
    try:
        sys.argv = arguments
        os.environ.update(child_environment(suite))
        os.chdir(REPOSITORY)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield
    finally:
        os.chdir(folder)
        sys.argv = before
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# Running and reporting


def run_stage(suite: Suite, name: str) -> Found:
    started = time.perf_counter()
    found = STAGES[name][0](suite)
    return {**found, "device": device_name(suite.device), "wall_seconds": time.perf_counter() - started}


def run_all(suite: Suite, names: list[str], output: Path, until: float) -> Found:
    """Every stage that has no result yet, whatever becomes of the others, until a time on `time.monotonic`'s clock."""
    result = json.loads(output.read_text()) if output.exists() else {"stages": {}}
    result |= {"quick": suite.quick, "environment": environment(suite.device) | {"cuda": torch.version.cuda}}
    stages = result["stages"]
    for name in names:
        if name in stages and "line" in stages[name]:
            print(f"{name}: is there", flush=True)
            continue
        left = until - time.monotonic()
        if left < ENOUGH:
            print(
                f"{name}: not begun, {left:.0f} s of this call are left; the same command goes on with it", flush=True
            )
            continue
        stages[name] = run_here(suite, name) if suite.quick else run_apart(suite, name, min(left, STAGES[name][1]))
        write(output, result, report(result))
        print(f"{name}: {told(stages[name])}", flush=True)
    return result


def run_here(suite: Suite, name: str) -> Found:
    try:
        return run_stage(suite, name)
    except (Exception, SystemExit):
        return {"failed": traceback.format_exc(), "device": device_name(suite.device)}


def run_apart(suite: Suite, name: str, limit: float) -> Found:
    """In a process of its own, which gives its memory back and can be ended."""
    path = suite.work / f"{name}.json"
    path.unlink(missing_ok=True)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(REPOSITORY / "training/accelerate/fsdp2.yaml")]
    launch += ["--num_processes", "1", "--main_process_port", "0"]
    command = [sys.executable, *(launch if name == "fsdp2" else []), __file__]
    command += ["--work", str(suite.work), "--device", suite.device, "--stage", name]
    # A file, not a pipe: what a stage leaves behind could hold a pipe open.
    log = suite.work / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=child_environment(suite), stdout=file, stderr=subprocess.STDOUT)
        late = False
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            late = True
            kill_tree(process)
    if path.exists():  # whatever became of the process afterwards
        return json.loads(path.read_text())
    ended = f"\nended after {limit:.0f} s" if late else f"\nstatus {process.returncode}"
    return {"failed": log.read_text()[-4000:] + ended, "device": device_name(suite.device)}


def told(found: Found) -> str:
    """A stage's result in a line."""
    if "failed" in found:
        lines = [line for line in found["failed"].strip().splitlines() if line.strip()]
        return f"FAILED: {lines[-1]}"
    return found["line"]


def report(result: Found) -> str:
    """Markdown: what each stage decides."""
    rows = []
    for call, stages in CALLS.items():
        for function in stages:
            name = function.__name__.removeprefix("stage_")
            found = result["stages"].get(name)
            line = NOT_MEASURED if found is None else told(found).replace("|", "\\|")
            rows.append((call, name.replace("_", " "), line, "" if found is None else found["device"]))
    cuda = result["environment"]["cuda"]
    small = "Tiny sizes, no measurement. " * result["quick"]
    return (
        table(("call", "stage", "what it says", "measured on"), rows)
        + f"\n{small}Medians (smallest - largest). Last call: {describe(result['environment'])} CUDA {cuda}.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--call", type=int, choices=tuple(CALLS), help="the first or the second ten minutes; both without it"
    )
    parser.add_argument("--minutes", type=float, default=10, help="length of a call")
    results = REPOSITORY / "benchmarks/results/gpu_suite.json"
    parser.add_argument("--output", type=Path, default=results, help="JSON of all stages; Markdown beside it")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "outputs/gpu_suite", help="folder of data and logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, all stages in this process")
    parser.add_argument("--only", type=some_of(STAGES), help="stages, separated by commas, instead of a call's")
    parser.add_argument(
        "--stage", choices=tuple(STAGES), help="run one stage in this process; the suite itself calls this"
    )
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: --device cpu --quick shows that the suite works")
    if args.quick and args.output == results:
        parser.error("--quick measures nothing: name another --output")
    suite = Suite(args.work.resolve(), args.device, args.quick)
    suite.work.mkdir(parents=True, exist_ok=True)
    if args.stage is not None:
        write(suite.work / f"{args.stage}.json", run_stage(suite, args.stage))
        sys.stdout.flush()
        os._exit(0)  # a trainer that was left in the middle may hold threads that wait for ever
    calls = CALLS if args.call is None else [args.call]
    names = args.only or [stage.__name__.removeprefix("stage_") for call in calls for stage in CALLS[call]]
    result = run_all(suite, names, args.output.resolve(), begun + 60 * args.minutes * len(calls) - MARGIN)
    print(report(result))
    if any("failed" in found for found in result["stages"].values()):
        sys.exit("something failed: see above")


if __name__ == "__main__":
    main()
