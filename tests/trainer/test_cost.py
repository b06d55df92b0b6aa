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
"""The dry run and the block that a run starts with."""

import json
import re

import pytest
import torch
from helpers import REPOSITORY, train

from erw_hf.provenance import device_name
from erw_hf.trainer.config import parse_config
from erw_hf.trainer.cost import DataSummary, cost_report, start_report
from erw_hf.trainer.run_record import read_metrics


CONFIGS = REPOSITORY / "training" / "configs"


def test_a_run_begins_with_the_block_of_its_dry_run_and_records_its_precision(
    tmp_path, tiny_flags, capsys, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")  # others say how slow bf16 is
    flags = [*tiny_flags, "--mixed_precision=auto", "--gradient_accumulation_steps=2", "--max_train_steps=4"]
    flags.append(f"--output_dir={tmp_path}/run")
    train(*flags, "--dry_run")
    dry = capsys.readouterr().out
    block = dry.split("\n\n")[0]
    for line in (
        "data       digits, split train",
        "images     1438; 8x8 px, 1 channel; no latents",
        "classes    10: 0, 1, 2, 3, 4, ...",
        "model      3 blocks of width 16, 4x4 tokens",
        "batch      1 process x 4 x 2 accumulated = 8",
        "precision  bf16 (set by accelerate launch)",
        f"device     cpu: {device_name('cpu')}",
        "attention  native, torch chooses the kernel",
        "steps      3 warmup + 1 full",
        f"writes to  {tmp_path}/run",
    ):
        assert line in block.splitlines()
    assert "EMA" in dry and "steps behind the weights, 0.0% initial weights" in dry
    train(*flags)
    assert capsys.readouterr().out.count(block) == 1
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["mixed_precision"] == "bf16"


def test_the_dry_run_says_if_the_average_stays_at_its_start(tiny_flags, capsys):
    train(*tiny_flags, "--ema_ramp=false", "--max_train_steps=303", "--dry_run")
    assert (
        "296 steps behind the weights, 97.0% initial weights: too slow" not in capsys.readouterr().out
    )  # preset: 0.98
    train(*tiny_flags, "--ema_ramp=false", "--ema_decay=0.9999", "--max_train_steps=303", "--dry_run")
    assert "296 steps behind the weights, 97.0% initial weights: too slow for this run" in capsys.readouterr().out


def test_the_dry_run_counts_the_processes_of_its_launcher_and_one_prints(tiny_flags, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    train(*tiny_flags, "--dry_run")
    assert "2 processes x 4 x 1 accumulated = 8" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    train(*tiny_flags, "--dry_run")
    assert capsys.readouterr().out == ""


def test_the_block_names_latents_size_and_stream(vae_path):
    flags = [f"--vae={vae_path}", "--model=SiT-B/4", "--encoder=a,b", "--warmup_steps=5", "--output_dir=out"]
    data = DataSummary(None, 0, [], has_features=False, image_size=64, channels=3)
    block = start_report(parse_config(flags), data, ("no", "auto"), torch.device("cpu"), 1).splitlines()
    assert "images     streamed, not counted; 64x64 px, 3 channels; latents 4x32x32" in block
    assert "classes    none: unconditional" in block and "encoder    a, b" in block
    assert "model      SiT-B/4: 12 blocks of width 768, 8x8 tokens" in block
    assert "precision  float32 (auto)" in block and "attention  native, torch chooses the kernel" in block


def test_the_block_says_whether_the_autoencoder_runs_and_in_what(monkeypatch):
    monkeypatch.setattr("erw_hf.trainer.cost.device_name", lambda device_type: "a card")
    flags = parse_config(["--vae=v", "--model=SiT-B/4", "--output_dir=out"])
    for device_type, precision, cached, expected in (
        ("cuda", "bf16", False, "v, in every step in bf16"),
        ("cuda", "fp16", False, "v, in every step in float32"),
        ("cpu", "bf16", False, "v, in every step in float32"),
        ("cuda", "bf16", True, "v, not run: latents are cached"),
    ):
        data = DataSummary(None, 0, [], has_features=False, image_size=64, channels=3, has_latents=cached)
        block = start_report(flags, data, (precision, "auto"), torch.device(device_type), 1).splitlines()
        assert f"vae        {expected}" in block


def test_the_dry_run_and_mfu_count_the_autoencoder(vae_path, tiny_flags, tmp_path, capsys, monkeypatch):
    flags = [
        *tiny_flags,
        f"--vae={vae_path}",
        "--in_channels=4",
        "--max_train_steps=4",
        f"--output_dir={tmp_path}/run",
    ]
    train(*flags, "--dry_run")
    assert "of it autoencoder and encoder, which a latent cache spares" in capsys.readouterr().out
    monkeypatch.setattr("erw_hf.trainer.phase.count_vae_flops", lambda vae, side: 10**12)
    train(*flags)
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")[:2]
    assert second["flops"] - first["flops"] == pytest.approx(4e12, rel=0.01)  # of four images


def test_dry_run_of_xl_in_numbers(vae_path):
    flags = [
        "--dataset_name=digits",
        f"--vae={vae_path}",
        "--encoder=none",
        "--warmup_steps=0",
        "--max_train_steps=400000",
    ]
    report = cost_report(parse_config([f"--config={CONFIGS}/imagenet256-sit.yaml", *flags, "--num_classes=10"]))
    # 3 x 2 x 118.6 GMAC x 32 images; 400 000 steps of them at 40 % of 989 TFLOP/s
    full_step = float(re.search(r"full step +([\d.e+]+)", report)[1])
    assert full_step == pytest.approx(6 * 118.6e9 * 32, rel=0.02)
    hours = float(re.search(r"GPU-hours +([\d.]+)", report)[1])
    assert hours == pytest.approx(6 * 118.6e9 * 32 * 400_000 / (0.4 * 989e12) / 3600, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoder_image_size=20"], "encoder tokens, the latent has 4x4"),
        (["--image_column=photo"], "'photo' is not a column"),
        (["--num_classes=3"], r"is not in \[0, 2\]"),
    ],
)
def test_dry_run_finds_what_is_wrong(small, flags, message):
    with pytest.raises(ValueError, match=message):
        train(f"--config={CONFIGS}/imagenet256-erw-paper.yaml", *small("imagenet256-erw-paper"), *flags, "--dry_run")


def test_dry_run_wants_an_autoencoder_whose_latents_are_scaled(small, vae_path, tmp_path):
    flags = [
        f"--config={CONFIGS}/imagenet256-erw-paper.yaml",
        *small("imagenet256-erw-paper"),
        f"--vae={tmp_path}",
    ]
    config = json.loads((vae_path / "config.json").read_text())
    for changes, message in (
        ({"scaling_factor": 1.0}, "latent_statistics.json"),
        ({"latent_channels": 16}, "set in_chan"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            train(*flags, "--dry_run")
    statistics = {"scaling_factor": 1.0, "latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}
    (tmp_path / "config.json").write_text(json.dumps(config | statistics))
    train(*flags, "--dry_run")
