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
"""Kills training at random moments, starts it again, and compares with the run that nobody disturbed, bit for bit.

    python tests/soak.py --kills 30

Each trial is killed twice: at a random step, at the hand-over, or while a checkpoint is being written; with 1 and 2
processes, 0 and 2 loader workers, data at hand and streamed.
"""

import argparse
import itertools
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from helpers import REPOSITORY, kill_trees, launch_command, launch_training
from safetensors.torch import load_file
from tqdm.auto import tqdm

from erw_hf.trainer.run_record import read_metrics


WARMUP_STEPS, STEPS = 12, 30


def make_assets(folder: Path) -> list[str]:
    """A tiny encoder and a set of shards; flags of a run that takes seconds."""
    from helpers import write_shards
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=16)
    Dinov2Model(config).save_pretrained(folder / "encoder")
    size = {"height": 16, "width": 16}
    BitImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder / "encoder")
    write_shards(folder / "shards")
    values = {
        "encoder": folder / "encoder", "dataset_name": folder / "shards", "sample_size": 8, "patch_size": 2,
        "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "projector_dim": 16, "warmup_depth": 2,
        "projector_depth": 2, "warmup_steps": WARMUP_STEPS, "max_train_steps": STEPS, "train_batch_size": 4, "lr_warmup_steps": 4,
        "validation_steps": 0, "num_validation_images": 4, "num_inference_steps": 2, "checkpointing_steps": 3,
        "checkpoints_total_limit": 2, "report_to": "none", "mixed_precision": "no",
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def run_and_kill(flags: list[str], processes: int, moment: str, chance: random.Random) -> str:
    """Starts training and kills all its processes at a moment; returns where it was."""
    run = Path(next(flag for flag in flags if flag.startswith("--output_dir=")).split("=", 1)[1])
    command, environment = launch_command(tuple(flags), processes)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = psutil.Popen(command, cwd=REPOSITORY, env=environment, **quiet)
    begun = run.stat().st_mtime_ns if run.exists() else 0
    done = len(read_metrics(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0
    wanted = (
        WARMUP_STEPS
        if moment == "hand-over" and done < WARMUP_STEPS
        else chance.randint(min(done + 1, STEPS - 1), STEPS - 1)
    )
    while launcher.poll() is None:
        metrics = run / "metrics.jsonl"
        steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        started = run.exists() and run.stat().st_mtime_ns > begun
        if moment == "checkpoint" and started and steps >= wanted and list(run.glob(".writing-*")):
            break
        if moment != "checkpoint" and started and steps >= wanted:
            time.sleep(chance.uniform(0, 0.05))
            break
        time.sleep(0.005)
    if launcher.poll() is None:
        kill_trees([launcher])
    return f"{moment} at step {len(read_metrics(run / 'metrics.jsonl'))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    settings = list(itertools.product((1, 2), (0, 2), (False, True)))
    moments = ["step", "checkpoint", "hand-over"]
    with tempfile.TemporaryDirectory() as folder:
        flags = make_assets(Path(folder))
        whole: dict[tuple, Path] = {}
        for trial in tqdm(range((args.kills + 1) // 2), desc="trials of 2 kills"):
            processes, workers, streaming = setting = settings[trial % len(settings)]
            own = [*flags, f"--dataloader_num_workers={workers}", *(["--streaming"] if streaming else [])]
            if setting not in whole:
                whole[setting] = Path(folder) / f"whole-{len(whole)}"
                launch_training(*own, f"--output_dir={whole[setting]}", processes=processes)
            cut = Path(folder) / f"cut-{trial}"
            resume = [*own, f"--output_dir={cut}", "--resume_from_checkpoint=latest"]
            killed = [run_and_kill(resume, processes, moments[(trial + i) % 3], chance) for i in range(2)]
            launch_training(*resume, processes=processes)
            same = [(record["step"], record["loss"]) for record in read_metrics(cut / "metrics.jsonl")] == [
                (record["step"], record["loss"]) for record in read_metrics(whole[setting] / "metrics.jsonl")
            ]
            name = "pipeline/transformer/diffusion_pytorch_model.safetensors"
            ours, theirs = load_file(cut / name), load_file(whole[setting] / name)
            same = same and all(torch.equal(ours[key], theirs[key]) for key in theirs)
            tqdm.write(
                f"{processes} processes, {workers} workers, {'streamed' if streaming else 'at hand'}; killed "
                f"{' and '.join(killed)}: {'same losses and weights' if same else 'DIFFERENT'}"
            )
            if not same:
                sys.exit(1)


if __name__ == "__main__":
    main()
