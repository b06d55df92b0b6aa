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
"""FSDP2 trains what DistributedDataParallel trains, and accelerate reads the files that set the engines up."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from helpers import PRESET, REPOSITORY, launch_training
from safetensors.torch import load_file

from erw_hf import ERWPipeline, transformer_erw
from erw_hf.trainer.run_record import read_metrics


def losses(run):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def weights(run):
    return load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def launch_fsdp2(*flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["tests/fsdp2_on_cpu.py", "training/train_erw.py", *PRESET, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr[-5000:]


def test_fsdp2_trains_like_ddp_and_resumes(tmp_path, tiny_flags):
    """The whole run: sharded weights and averages, hand-over, checkpoints, pictures."""
    flags = [*tiny_flags, "--validation_steps=5", "--checkpoints_total_limit=9", "--ema_snapshot_steps=7"]
    flags += ["--ema_decay=0.5"]
    launch_training(*flags, f"--output_dir={tmp_path}/ddp", processes=2)
    launch_fsdp2(*flags, f"--output_dir={tmp_path}/fsdp2")
    sharded = tmp_path / "fsdp2" / "checkpoint-6" / "pytorch_model_fsdp_0"
    assert len(list(sharded.glob("*.distcp"))) == 2  # it was FSDP2 indeed
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-5)
    for name, tensor in weights(tmp_path / "ddp").items():
        torch.testing.assert_close(weights(tmp_path / "fsdp2")[name], tensor, atol=1e-6, rtol=1e-5)
    snapshots = "ema_snapshots/step-0000004-sigma-0.050.safetensors"
    for name, tensor in load_file(tmp_path / "ddp" / snapshots).items():
        torch.testing.assert_close(load_file(tmp_path / "fsdp2" / snapshots)[name], tensor, atol=1e-3, rtol=1e-3)
    assert (tmp_path / "fsdp2" / "samples" / "step-0000005.png").is_file()
    ERWPipeline.from_pretrained(tmp_path / "fsdp2" / "pipeline")

    shutil.copytree(tmp_path / "fsdp2", tmp_path / "cut")
    for step in (6, 7):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{step}")
    shutil.rmtree(tmp_path / "cut" / "pipeline")
    launch_fsdp2(*flags, f"--output_dir={tmp_path}/cut", "--resume_from_checkpoint=latest")
    assert losses(tmp_path / "cut") == losses(tmp_path / "fsdp2")
    for name, tensor in weights(tmp_path / "fsdp2").items():
        assert torch.equal(weights(tmp_path / "cut")[name], tensor), name


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_accelerate_reads_the_engine_files(name):
    config = load_config_from_file(str(REPOSITORY / "training" / "accelerate" / f"{name}.yaml"))
    assert config.mixed_precision == "bf16"
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert hasattr(transformer_erw, config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"])
    if name == "zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", REPOSITORY / "training" / "accelerate" / "slurm.sbatch"], check=True)
