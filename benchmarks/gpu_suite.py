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
"""Every path that only a GPU takes, checked, and every figure of one GPU, measured: one command, ten minutes.

    PYTHONPATH=src python benchmarks/gpu_suite.py --output_dir outputs/gpu_suite

For one H100 or H200. Needs no network: weights are random, the data are made here. Each stage is a process of its own with a
time limit; its result is a JSON file in `--output_dir`, and a stage whose file is there is not run again. A stage that
fails leaves its traceback and the next one goes on; the same command tries it again. `results.json` and `results.md` say
what was found, and "not measured" of the rest. `--device cpu --quick` runs every stage in tiny sizes, to see that it works.
"""

import argparse
import contextlib
import io
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from common import (
    NOT_MEASURED,
    describe,
    environment,
    in_turns,
    matmul,
    ratio,
    shown,
    some_of,
    spread,
    table,
    verdict,
    write,
)

from erw_hf.trainer.flops import CARDS
from erw_hf.trainer.run_record import read_metrics


REPOSITORY = Path(__file__).resolve().parent.parent
PEAK = CARDS["H100"].flops  # and an H200's
LIMIT = 180  # seconds of a stage


@dataclass(frozen=True)
class Suite:
    """What the stages share."""

    output_dir: Path
    device: str
    quick: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def size(self, name: str) -> str:
        return "tiny" if self.quick else name


# Stages. Each returns what its JSON holds. Imports are inside: a stage needs not what another one lacks.


def stage_ceiling(suite: Suite) -> dict[str, object]:
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
    return {
        "environment": environment(suite.device),
        "cuda": torch.version.cuda,
        "flops_per_second": flops / statistics.median(seconds["matmul"]),
        "bytes_per_second": 10 * 8 * numbers / statistics.median(seconds["copy"]),
        "seconds": seconds,
    }


def stage_paths(suite: Suite) -> dict[str, object]:
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
    return {"checks": found}


def stage_train_xl(suite: Suite) -> dict[str, object]:
    """XL/2, batch 256, from cached latents: the trainer itself."""
    return train_from_cache(suite, "XL/2", encoder=False)


def stage_train_b(suite: Suite) -> dict[str, object]:
    """B/2, batch 256, from cached latents."""
    return train_from_cache(suite, "B/2", encoder=False)


def stage_train_xl_encoder(suite: Suite) -> dict[str, object]:
    """XL/2, batch 256, latents and images from the cache, aligned with a DINOv2-B."""
    return train_from_cache(suite, "XL/2", encoder=True)


def stage_resume(suite: Suite) -> dict[str, object]:
    """A run that is killed twice, in either phase, and resumed, beside one that is left alone."""
    folder = suite.output_dir / "work" / "resume"
    shutil.rmtree(folder, ignore_errors=True)
    flags = {
        "config": REPOSITORY / "training/configs/digits.yaml",
        "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "projector_dim": 32, "warmup_depth": 2,
        "projector_depth": 2, "warmup_steps": 4, "max_train_steps": 12, "train_batch_size": 4, "lr_warmup_steps": 2,
        "validation_steps": 0, "num_validation_images": 4, "num_inference_steps": 2, "checkpointing_steps": 2,
        "report_to": "none",
    }  # fmt: skip
    killed = {**flags, "output_dir": folder / "killed"}
    alone = {**flags, "output_dir": folder / "alone"}
    kills = (7,) if suite.quick else (3, 7)
    for step in kills:
        train(suite, killed | {"resume_from_checkpoint": "latest"}, kill_at=step)
    train(suite, killed | {"resume_from_checkpoint": "latest"})
    train(suite, alone)
    ours, theirs = (read_metrics(run["output_dir"] / "metrics.jsonl") for run in (killed, alone))
    if [line["step"] for line in ours] != list(range(1, 13)):
        raise AssertionError(f"steps of the resumed run: {[line['step'] for line in ours]}")
    deviation = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True))
    # Kernels that add in any order let a GPU's last bits differ; a resume that lost anything is off by far more.
    if deviation > (1e-2 if suite.device == "cuda" else 0):
        raise AssertionError(f"losses differ by {deviation:.2e} from those of the run that was left alone")
    return {"killed_at": kills, "steps": len(ours), "largest_relative_difference_of_losses": deviation}


def stage_evaluate(suite: Suite) -> dict[str, object]:
    """training/evaluate.py on the shipped digits."""
    folder = suite.output_dir / "work" / "evaluate"
    shutil.rmtree(folder, ignore_errors=True)
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
    return {name: record[name] for name in ("metrics", "hardware", "seconds")}


def stage_fsdp2(suite: Suite) -> dict[str, object]:
    """Two steps under FSDP2 with one process."""
    if suite.device == "cpu":
        return {"skipped": "CUDA only; on CPUs the tests run FSDP2 with two processes"}
    folder = suite.output_dir / "work" / "fsdp2"
    flags = {
        "config": "training/configs/digits.yaml", "warmup_steps": 2, "max_train_steps": 4, "lr_warmup_steps": 1,
        "checkpointing_steps": 2, "num_validation_images": 4, "num_inference_steps": 2, "validation_steps": 0,
        "report_to": "none", "output_dir": folder, "overwrite_output_dir": True,
    }  # fmt: skip
    launch = ["--config_file", "training/accelerate/fsdp2.yaml", "--num_processes", "1", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "training/train_erw.py", *as_flags(flags)]
    checked(subprocess.run(command, cwd=REPOSITORY, env=child_environment(suite), capture_output=True, text=True))
    losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]
    if len(losses) != 4:
        raise AssertionError(f"{len(losses)} steps of 4")
    return {"losses": losses}


def stage_step(suite: Suite) -> dict[str, object]:
    """benchmarks/train_step.py's forward and whole step, at B/2 in bf16."""
    from train_step import Setting, measure_forward, measure_step

    setting = Setting(suite.device, suite.dtype, 2 if suite.quick else 64, 2 if suite.quick else 10, suite.quick)
    size = suite.size("B/2")
    return {"batch": setting.batch, "forward": measure_forward(size, setting), "step": measure_step(size, setting)}


def stage_memory(suite: Suite) -> dict[str, object]:
    """Memory of an XL/2 step with and without gradient checkpointing."""
    from train_step import Setting, measure_memory

    setting = Setting(suite.device, suite.dtype, 2 if suite.quick else 64, 1, suite.quick)
    return {"batch": setting.batch, "memory_bytes": measure_memory(suite.size("XL/2"), setting)}


def stage_scaling(suite: Suite) -> dict[str, object]:
    """Steps of B/2 over batch, tokens and depth."""
    from train_step import Setting, measure_scaling

    setting = Setting(suite.device, suite.dtype, 4 if suite.quick else 64, 2 if suite.quick else 5, suite.quick)
    return {"batch": setting.batch, **measure_scaling(suite.size("B/2"), setting, memory=False)}


def stage_sampling(suite: Suite) -> dict[str, object]:
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
    return {
        "steps": steps,
        "batch": len(labels),
        "difference_in_float32": difference,
        "seconds": seconds,
        "speed_up": {name: ratio(reference, values) for name, values in seconds.items()},
    }


def stage_cuda_graphs(suite: Suite) -> dict[str, object]:
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
    found: dict[str, object] = {"steps": steps, "batch": 2, "seconds": seconds}
    found["speed_up"] = {name: ratio(seconds["eager"], values) for name, values in seconds.items()}
    if suite.device == "cpu":
        found["skipped"] = "CUDA graphs: CUDA only"
    return found


STAGES: dict[str, Callable[[Suite], dict[str, object]]] = {
    function.__name__.removeprefix("stage_"): function
    for function in (
        stage_ceiling, stage_paths, stage_train_xl, stage_train_b, stage_resume, stage_sampling, stage_train_xl_encoder,
        stage_step, stage_evaluate, stage_fsdp2, stage_memory, stage_scaling, stage_cuda_graphs,
    )
}  # fmt: skip


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
    folder = suite.output_dir / "work" / "data"
    if (folder / "done").exists():
        return folder
    from data import photographs, write_cache
    from sampling import tiny_autoencoder
    from train_step import build_dinov2
    from transformers import BitImageProcessorPil

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "cache").mkdir(parents=True)
    side = 8 if suite.quick else 32
    files = photographs(4 if suite.quick else 200, seed=0)
    write_cache(folder / "cache", 64 if suite.quick else 20_000, files, side=side)
    tiny_autoencoder().save_pretrained(folder / "vae")
    build_dinov2(side // 2, suite.quick).save_pretrained(folder / "encoder")
    pixels = 14 * side // 2
    crop = {"height": pixels, "width": pixels}
    BitImageProcessorPil(size={"shortest_edge": pixels}, crop_size=crop).save_pretrained(folder / "encoder")
    (folder / "done").touch()
    return folder


def train_from_cache(suite: Suite, size: str, encoder: bool) -> dict[str, object]:
    """Runs training/train_erw.py for some steps and reads what it says of itself."""
    from train_step import model_config

    data = synthetic_data(suite)
    model = model_config(suite.size(size))
    batch, steps, skipped = (4, 6, 2) if suite.quick else (256, 30, 10)
    # 80 GB hold the activations of half of XL's batch.
    halves = 2 if suite.device == "cuda" and total_memory() < 100e9 and size == "XL/2" else 1
    folder = suite.output_dir / "work" / f"train-{size.replace('/', '')}{'-encoder' if encoder else ''}"
    flags = {
        "output_dir": folder, "overwrite_output_dir": True, "dataset_name": data / "cache", "vae": data / "vae",
        **model, "train_batch_size": batch // halves, "gradient_accumulation_steps": halves,
        "dataloader_num_workers": 0 if suite.quick else min(12, os.cpu_count() or 1), "max_train_steps": 10**6,
        "checkpointing_steps": 10**6, "validation_steps": 0, "report_to": "none", "alignment_weight": 0.0,
        "num_inference_steps": 2, "num_validation_images": 4,
    }  # fmt: skip
    if suite.quick:  # in this process, so to its end
        flags |= {"max_train_steps": steps, "guidance_scale": 1.0}
    if encoder:
        flags |= {
            "encoder": data / "encoder", "alignment_weight": 0.5, "projector_depth": 2 if suite.quick else 8,
            "projector_dim": 32 if suite.quick else 2048,
        }  # fmt: skip
    train(suite, flags, kill_at=None if suite.quick else steps)
    lines = read_metrics(folder / "metrics.jsonl")[:steps]
    flops = (lines[-1]["flops"] - lines[0]["flops"]) / (len(lines) - 1) / batch
    rates = [line["images_per_second"] for line in lines[skipped:]]
    mfu = flops * statistics.median(rates) / PEAK
    return {
        "batch": batch,
        "gradient_accumulation_steps": halves,
        "flops_per_image": flops,
        "images_per_second": spread(rates),
        "flops_per_second": flops * statistics.median(rates),
        "mfu": mfu,
        "data_wait": spread([line["data_wait"] for line in lines[skipped:]]),
        "losses": [line["loss"] for line in lines],
    }


def total_memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def as_flags(flags: dict[str, object]) -> list[str]:
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


def train(suite: Suite, flags: dict[str, object], kill_at: int | None = None) -> None:
    """Runs training/train_erw.py to its end, or ends it with SIGKILL once it has written a step."""
    if kill_at is None:
        run_script(suite, "training/train_erw.py", flags)
        return
    command = [sys.executable, "training/train_erw.py", *as_flags(flags)]
    metrics = flags["output_dir"] / "metrics.jsonl"
    before = metrics.read_text() if metrics.exists() else None
    with (suite.output_dir / "work" / "train.log").open("w+") as log:
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


def run_script(suite: Suite, script: str, flags: dict[str, object]) -> None:
    """A script of training/; in quick mode in this process, since importing takes longer than the work."""
    if not suite.quick:
        command = [sys.executable, script, *as_flags(flags)]
        checked(subprocess.run(command, cwd=REPOSITORY, env=child_environment(suite), capture_output=True, text=True))
        return
    from accelerate.state import AcceleratorState, GradientState

    arguments, environment, folder = sys.argv, os.environ.copy(), os.getcwd()
    log = io.StringIO()
    try:
        sys.argv = [script, *as_flags(flags)]
        os.environ.update(child_environment(suite))
        os.chdir(REPOSITORY)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            runpy.run_path(script, run_name="__main__")
    finally:
        os.chdir(folder)
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# Running and reporting


def run_stage(suite: Suite, name: str) -> None:
    """Writes the stage's JSON, or raises."""
    started = time.perf_counter()
    found = STAGES[name](suite)
    found["wall_seconds"] = time.perf_counter() - started
    write(suite.output_dir / f"{name}.json", found)


def run_all(suite: Suite, names: list[str]) -> None:
    """Every stage that has no result yet, whatever becomes of the others."""
    for name in names:
        path, failure = suite.output_dir / f"{name}.json", suite.output_dir / f"{name}.failed.txt"
        if path.exists():
            print(f"{name}: is there", flush=True)
            continue
        started = time.perf_counter()
        error = run_here(suite, name) if suite.quick else run_apart(suite, name)
        if error is None:
            failure.unlink(missing_ok=True)
        else:
            failure.write_text(error)
        state = "done" if error is None else f"FAILED: {error.strip().splitlines()[-1]}"
        print(f"{name}: {state}, {time.perf_counter() - started:.0f} s", flush=True)
        write_results(suite)


def run_here(suite: Suite, name: str) -> str | None:
    try:
        run_stage(suite, name)
    except (Exception, SystemExit):
        return traceback.format_exc()
    return None


def run_apart(suite: Suite, name: str) -> str | None:
    """In a process of its own, which gives its memory back and can be ended."""
    flags = ["--output_dir", str(suite.output_dir), "--device", suite.device, "--stage", name]
    command = [sys.executable, __file__, *flags]
    # A file, not a pipe: what a stage leaves behind could hold a pipe open.
    path = suite.output_dir / f"{name}.log"
    with path.open("w") as log:
        process = subprocess.Popen(command, env=child_environment(suite), stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            kill_tree(process)
    output = path.read_text()
    if process.returncode == -signal.SIGKILL:
        output += f"\nended after {LIMIT} s, or killed"
    return None if process.returncode == 0 else output[-4000:]


def write_results(suite: Suite) -> bool:
    """`results.json` and `results.md`; whether nothing has failed."""
    results = {}
    for name in STAGES:
        path, failure = suite.output_dir / f"{name}.json", suite.output_dir / f"{name}.failed.txt"
        if path.exists():
            results[name] = json.loads(path.read_text())
        elif failure.exists():
            results[name] = {"failed": failure.read_text()}
    write(suite.output_dir / "results.json", results, report(results, suite.quick))
    checks = results.get("paths", {}).get("checks", {}).values()
    return not any("failed" in found for found in results.values()) and all(check["passed"] for check in checks)


def report(results: dict[str, dict], quick: bool) -> str:
    """Markdown of all figures and checks."""

    def of(stage: str, *keys: str):
        found = results.get(stage)
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    ceiling = of("ceiling", "flops_per_second")
    rows = []

    def row(figure: str, value: str | None, target: str = "", held: str = "") -> None:
        rows.append((figure, NOT_MEASURED if value is None else value, target, "" if quick or value is None else held))

    row("matmul, dense, TFLOP/s", None if ceiling is None else f"{ceiling / 1e12:.3g} of {PEAK / 1e12:.0f}")
    for stage, name in (
        ("train_xl", "XL/2, cached latents"),
        ("train_b", "B/2, cached latents"),
        ("train_xl_encoder", "XL/2, cached latents, DINOv2-B in the step"),
    ):
        batch, halves = of(stage, "batch") or 256, of(stage, "gradient_accumulation_steps")
        name = f"{name}, batch {batch}{'' if halves in (None, 1) else f' in {halves} parts'}"
        mfu, images = of(stage, "mfu"), of(stage, "images_per_second")
        row(f"{name}: images/s", None if images is None else shown(images, 0))
        row(f"{name}: MFU of {PEAK / 1e12:.0f} TFLOP/s", None if mfu is None else f"{mfu:.3f}")
        share = None if mfu is None or ceiling is None else f"{of(stage, 'flops_per_second') / ceiling:.3f}"
        row(f"{name}: share of the measured matmul", share)
        wait = of(stage, "data_wait")
        row(f"{name}: share of a step that waits for data", None if wait is None else shown(wait, 4))
    speed_up = of("sampling", "speed_up", "ours, compiled")
    name = f"{of('sampling', 'steps') or 250}-step SDE, XL/2, bf16 compiled: times PlainSiT's in float32 (TF32)"
    held = "" if speed_up is None else verdict(speed_up["median"], 3, at_least=True)
    row(name, None if speed_up is None else shown(speed_up), ">= 3", held)
    for way in ("compiled by block", "CUDA graphs"):
        value = of("cuda_graphs", "speed_up", way)
        row(f"SDE, B/2, 2 pictures, {way}: times eager's", None if value is None else shown(value))
    for way in ("ours", "ours, compiled"):
        value = of("step", "forward", "ratio_to_plain", way)
        row(f"forward and backward, B/2, {way} / PlainSiT", None if value is None else shown(value))
    for name, target in (("as_published", 0.60), ("written_well", 0.90)):
        value = of("step", "step", f"ratio_to_{name}")
        held = "" if value is None else verdict(value["median"], target)
        row(
            f"step, B/2, ours / {name.replace('_', ' ')}",
            None if value is None else shown(value),
            f"<= {target}",
            held,
        )
    for way in ("without checkpointing", "with checkpointing"):
        memory = of("memory", "memory_bytes", way)
        text = None
        if memory is not None:
            text = f"{memory['peak'] / 2**30:.2f} GiB, {memory['state'] / 2**30:.2f} of it state"
        row(f"memory of a step, XL/2, batch {of('memory', 'batch') or 64}, {way}", text)
    deviation = of("scaling", "deviation")
    worst = None if deviation is None else max(map(abs, deviation.values()))
    held = "" if worst is None else verdict(worst, 0.15)
    row(
        "step against the FLOP count, B/2, largest deviation",
        None if worst is None else f"{worst:.2f}",
        "<= 0.15",
        held,
    )

    checks = []
    for name, check in (of("paths", "checks") or {"model and optimizers": None}).items():
        note = "" if check is None else check["note"].strip().splitlines()[-1]
        state = NOT_MEASURED if check is None else "passed" if check["passed"] else "FAILED"
        checks.append((name, "skipped" if note.startswith("skipped") else state, note))
    for stage, name in (
        ("resume", "kill -9 and resume"), ("evaluate", "evaluation"), ("fsdp2", "FSDP2, one process"),
    ):  # fmt: skip
        found = results.get(stage)
        state, note = NOT_MEASURED, ""
        if found is not None:
            state = "FAILED" if "failed" in found else "skipped" if "skipped" in found else "passed"
            note = found.get("skipped") or (found["failed"].strip().splitlines()[-1] if "failed" in found else "")
        if stage == "resume" and state == "passed":
            note = f"losses within {found['largest_relative_difference_of_losses']:.1e} of a run that was left alone"
        checks.append((name, state, note))
    failed = [name for name, found in results.items() if "failed" in found]
    parts = [table(("figure", "median (min - max)", "target", ""), rows), table(("path", "", ""), checks)]
    if failed:
        parts.append(f"Stages that failed, see their `.failed.txt`: {', '.join(failed)}.\n")
    record = of("ceiling", "environment")
    if record is not None:
        cuda = of("ceiling", "cuda")
        parts.append(f"{'Tiny sizes, no measurement. ' if quick else ''}{describe(record)} CUDA {cuda}.\n")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, all stages in this process")
    parser.add_argument("--only", type=some_of(STAGES), default=list(STAGES), help="stages, separated by commas")
    parser.add_argument(
        "--stage", choices=tuple(STAGES), help="run one stage in this process; the suite itself calls this"
    )
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: --device cpu --quick shows that the suite works")
    suite = Suite(args.output_dir.resolve(), args.device, args.quick)
    (suite.output_dir / "work").mkdir(parents=True, exist_ok=True)
    if args.stage is not None:
        run_stage(suite, args.stage)
        return
    run_all(suite, args.only)
    succeeded = write_results(suite)
    print((suite.output_dir / "results.md").read_text())
    if not succeeded:
        sys.exit("something failed: see above")


if __name__ == "__main__":
    main()
