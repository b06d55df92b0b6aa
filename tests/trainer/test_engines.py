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

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from helpers import REPOSITORY, TINY_MODEL, TRAINING, check_ended, launch_training, randomize, run_ranks
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from erw_hf import ERWPipeline, ERWTransformer2DModel, transformer_erw
from erw_hf.trainer import engines
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.engines import check_engine, open_accelerator
from erw_hf.trainer.run_record import read_metrics


def losses(run):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def weights(run):
    return load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def launch_fsdp2(*flags):
    check_ended(run_ranks(2, "tests/fsdp2_on_cpu.py", *TRAINING, *flags))


def test_fsdp2_trains_like_ddp_and_resumes(tmp_path, tiny_flags):
    """The whole run: sharded weights and averages, hand-over, checkpoints, pictures."""
    flags = [*tiny_flags, "--validation_steps=5", "--checkpoints_total_limit=9", "--ema_snapshot_steps=7"]
    flags += ["--ema_decay=0.5", "--pos_embed_type=learned"]  # a table (1, N, D), of which one process holds all
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


def test_the_slurm_script_leaves_time_for_a_checkpoint():
    script = REPOSITORY / "training" / "accelerate" / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    notice = int(re.search(r"--signal=TERM@(\d+)", script.read_text())[1])
    grace = int(re.search(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script.read_text(), flags=re.M)[1])
    assert 180 <= grace <= notice - 30  # torch's own is 30: an XL checkpoint has 10 GiB


def test_the_engines_train_alike_in_bf16_and_leave_no_thread(tmp_path):
    """Exact times, gradients added up in float32, one patience; at the end no thread of gloo, which could abort."""
    results = {}
    for engine in ((), ("tests/fsdp2_on_cpu.py",)):
        check_ended(run_ranks(2, *engine, "tests/engine_steps.py", tmp_path / "result.json"))
        result = json.loads((tmp_path / "result.json").read_text())
        results[result.pop("engine")] = result
    ddp, fsdp2 = results["DistributedType.MULTI_CPU"], results["DistributedType.FSDP"]
    for result in (ddp, fsdp2):
        assert result["times"] == [True, True]
        assert result["orthogonalised_alike"]  # Muon's shares
        assert result["gradients_of_bf16"] < 0.9  # sums in bf16 would be bf16 numbers, all of them
        assert result["timeout"] == engines.PATIENCE.total_seconds() >= 3600
        assert result["threads"][1] == 0
    assert fsdp2["losses"] == pytest.approx(ddp["losses"], rel=1e-5)
    if sys.platform == "linux":
        assert ddp["threads"][0] > 0 and fsdp2["threads"][0] > 0  # the count sees them


def test_a_compiled_block_is_one_graph_under_ddp():
    open_accelerator()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        transformer = randomize(ERWTransformer2DModel(**TINY_MODEL))
        transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        model = DistributedDataParallel(transformer, bucket_cap_mb=0.001)
        model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([1, 2])).sample.square().mean().backward()
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
    assert len(graphs) == 1  # which all blocks share


@pytest.mark.parametrize("reduction", ["float32", "bf16"])
def test_gradients_are_added_up_in_float32_unless_told(reduction):
    accelerator = open_accelerator(cpu=True)
    check_engine(TrainingConfig(vae="v", gradient_reduction=reduction), accelerator)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(torch.nn.Linear(8, 8), **accelerator.ddp_handler.to_dict())
        accelerator.ddp_handler.register_comm_hook(model)  # what `prepare` does
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
        gradient = model.module.weight.grad
    finally:
        dist.destroy_process_group()
    assert torch.equal(gradient, gradient.bfloat16().float()) == (reduction == "bf16")


def test_a_launcher_that_compiles_the_model_is_refused(monkeypatch):
    """Its wrapper's names would be lost at the hand-over, after the whole warmup."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(ValueError, match="sets dynamo_backend inductor.* pass --dynamo_backend no"):
            check_engine(TrainingConfig(vae="v"), open_accelerator(cpu=True))
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_a_reduction_in_bf16_is_ddps_alone(engine):
    accelerator = SimpleNamespace(distributed_type=engine)
    with pytest.raises(ValueError, match="gradient_reduction bf16 is for DDP alone"):
        check_engine(TrainingConfig(vae="v", gradient_reduction="bf16"), accelerator)
