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
"""The engines of accelerate that a run takes, as `training/accelerate/*.yaml` sets them up."""

from accelerate import Accelerator

from erw_hf.trainer.config import TrainingConfig


def check_engine(config: TrainingConfig, accelerator: Accelerator) -> None:
    """
    Lets DDP, FSDP2 and DeepSpeed's ZeRO 1 and 2 pass, and gives DeepSpeed what the run's configuration says.

    Args:
        config ([`TrainingConfig`]): The run.
        accelerator (`Accelerator`): As accelerate's configuration and the launcher made it.

    Raises:
        ValueError: for an engine, a precision or an optimizer that would not train as it should, with what to set.
    """
    if config.optimizer == "muon" and accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        raise ValueError("optimizer muon needs whole matrices on each process: use DDP, or optimizer adamw")
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 is not supported: set fsdp_version: 2, as training/accelerate/fsdp2.yaml does")
    if accelerator.distributed_type == "DEEPSPEED":
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage > 2:
            raise ValueError(
                f"DeepSpeed ZeRO {plugin.zero_stage} is not supported, 1 and 2 are: to shard the weights themselves, take "
                "FSDP2 (training/accelerate/fsdp2.yaml)"
            )
        # Weights stay float32, as everywhere: DeepSpeed's own bf16 would round what the EMA averages.
        if accelerator.mixed_precision == "fp16":
            raise ValueError("mixed_precision fp16 is not supported with DeepSpeed: set bf16")
        autocast = {"enabled": accelerator.mixed_precision == "bf16", "dtype": "bfloat16"}
        plugin.deepspeed_config.update(bf16={"enabled": False}, torch_autocast=autocast)
        # accelerate takes the batch from the loader that it prepares, and the rest from its own file.
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=config.train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_clipping=config.max_grad_norm,
        )
    # The launcher's environment would win over the configuration.
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
