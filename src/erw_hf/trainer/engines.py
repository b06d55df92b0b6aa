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
"""accelerate's engines (DDP, FSDP2, DeepSpeed): opened, checked, closed."""

import gc
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DynamoBackend,
    InitProcessGroupKwargs,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from erw_hf.trainer.config import TrainingConfig


# How long processes wait for one of them that prepares data, writes a checkpoint or computes metrics alone; NCCL's own limit
# is ten minutes.
PATIENCE = timedelta(hours=2)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def open_accelerator(**kwargs: Any) -> Accelerator:
    """The accelerator of a script, whose ranks wait up to two hours for one another; `close_accelerator` ends it."""
    # A block that is compiled by itself is one graph: torch would cut it where DDP's buckets end, to overlap their reduction
    # with the rest of the graph, which blocks one by one do anyway.
    torch._dynamo.config.optimize_ddp = False
    # Gradients lie in DDP's buckets without a copy beside them; buffers are tables that never change.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    return Accelerator(**kwargs, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), ddp])


def close_accelerator(accelerator: Accelerator) -> None:
    """Ends the trackers and the process group, with its threads, once all ranks are here. No model that it prepared
    may be referred to any more: return from the function that made it."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.free_memory()
    if accelerator.num_processes > 1:
        end_process_group()


def end_process_group() -> None:
    """Destroys the process group and joins its threads; models of DDP or FSDP2 must be gone."""
    # A gloo thread may release its last exchange after the process has moved on. If the interpreter ends first, the thread waits
    # for its lock in vain and aborts. Only an unreferenced group joins its threads, and DTensor's caches keep meshes.
    if dist.is_initialized():
        dist.destroy_process_group()
    for mesh in [o for o in gc.get_objects() if type(o) is DeviceMesh]:
        vars(mesh).clear()
    gc.collect()


def autocast_forward(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Makes a model's forward run under autocast, before `accelerator.prepare`, as accelerate does for every engine
    but FSDP2."""
    dtype = _DTYPES.get(accelerator.mixed_precision)
    if accelerator.distributed_type == "FSDP" and dtype is not None:
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)


def check_engine(config: TrainingConfig, accelerator: Accelerator) -> None:
    """
    Lets DDP, FSDP2 and DeepSpeed's ZeRO 1 and 2 pass; gives them the precision that all have, and DeepSpeed what the
    run's configuration says.

    Raises:
        ValueError: for an engine, a precision or an optimizer that would not train as it should, with what to set.
    """
    if config.optimizer == "muon" and accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        raise ValueError("optimizer muon needs whole matrices on each process: use DDP, or optimizer adamw")
    if config.lora_rank > 0 and accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        raise ValueError("lora_rank needs whole class embeddings on each process: use DDP, or one process")
    if config.gradient_reduction == "bf16":
        if accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
            raise ValueError("gradient_reduction bf16 is for DDP alone: leave it at float32, or use DDP")
        accelerator.ddp_handler.comm_hook = DDPCommunicationHookType.BF16
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 is not supported: set fsdp_version: 2, as training/accelerate/fsdp2.yaml does")
    if accelerator.distributed_type == "FSDP" and accelerator.mixed_precision in _DTYPES:
        # As under DDP: products in bf16, but the times come in as they are, and gradients are added up in float32.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=_DTYPES[accelerator.mixed_precision], reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if accelerator.distributed_type == "DEEPSPEED":
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage > 2:
            raise ValueError(
                f"DeepSpeed ZeRO {plugin.zero_stage} is not supported, 1 and 2 are: to shard the weights themselves, use "
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
    dynamo = accelerator.state.dynamo_plugin.backend
    if dynamo != DynamoBackend.NO:
        raise ValueError(
            f"accelerate launch sets dynamo_backend {dynamo.value.lower()}, which would compile the whole model once more: pass "
            "--dynamo_backend no; the key torch_compile compiles its blocks"
        )
    # The launcher's environment would win over the configuration.
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
