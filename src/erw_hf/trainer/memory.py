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
"""What a step takes of a GPU's memory. A block's activations are counted on the meta device; the rest is worked out from the configuration."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.ema import ema_profiles
from erw_hf.trainer.run_record import split_names
from erw_hf.transformer_erw import ERWTransformer2DModel


GIB = 2**30
REST = 10  # bytes in bf16 for each token and channel outside the blocks, as counted
# Four tensors of the 128 channels that Stable Diffusion's autoencoder has at the images' own size, in float32.
BYTES_OF_PIXEL = 4 * 128 * 4
CONTEXT = 0.8 * GIB  # CUDA's own, cuBLAS's and cuDNN's workspaces: an assumption, not measured


def step_memory(
    config: TrainingConfig,
    parameters: int,
    trained: int,
    moments: int,
    frozen: int,
    vae: ModelMixin | None,
    image_size: int,
    under: int = 0,
) -> dict[str, float]:
    """
    Bytes of one GPU in a step of full training in bf16 (in float32 for `mixed_precision` `"no"`), without sharding.

    Args:
        config ([`TrainingConfig`]): The run.
        parameters (`int`): Of the transformer; beside an adapter those that are trained.
        trained (`int`): Parameters that are trained: the transformer's and the projectors'.
        moments (`int`): Numbers that the optimizer keeps.
        frozen (`int`): Parameters of the encoders.
        vae (a diffusers autoencoder, *optional*): What a step encodes images with; on the meta device.
        image_size (`int`): Side of those images, in pixels.
        under (`int`, *optional*, defaults to 0): Parameters under an adapter, which are not trained.

    Returns:
        `dict[str, float]`: `state` (weights, gradients in DDP's buckets, the optimizer's moments, averages, all float32), `copies` (the
        weights in bf16), `frozen` (encoders and autoencoder), `activations`, of the largest forward, and `context`.
    """
    size = 4 if config.mixed_precision == "no" else 2
    encoding = 0.0
    if vae is not None:
        frozen += 2 * sum(p.numel() for p in vae.parameters())  # float32, where encoders are in bf16
        encoding = config.train_batch_size * image_size**2 * BYTES_OF_PIXEL
    return {
        "state": 4.0 * (2 * trained + moments + len(ema_profiles(config)) * parameters + under),
        "copies": 2.0 * (trained + under) if size == 2 else 0.0,
        "frozen": float(size * frozen),
        # Images are encoded before the model keeps anything.
        "activations": max(activation_bytes(config), encoding),
        "context": CONTEXT,
    }


def activation_bytes(config: TrainingConfig) -> float:
    """Bytes that the blocks keep for the backward pass of one forward, and one block's while it goes back."""
    width = config.num_attention_heads * config.attention_head_dim
    numbers = config.train_batch_size * (config.token_grid**2 + (config.class_token_weight > 0)) * width
    block = kept_by_block(config)
    if config.gradient_checkpointing:
        size = 4 if config.mixed_precision == "no" else 2
        return numbers * (size * config.num_layers + block + size / 2 * REST)
    return numbers * block * (config.num_layers + 1)


def kept_by_block(config: TrainingConfig) -> float:
    """Bytes that a block keeps for each token and channel, eager or compiled, counted in a second on the meta device. With a budget
    below 1 torch's choice depends on the batch."""
    options = config.model_config(0, 1 if config.class_token_weight > 0 else None)
    lora = (config.lora_rank, config.lora_targets) if config.lora_rank > 0 else None
    if lora is None:
        options["num_layers"] = 1  # a target may be a layer of one block
    budget = None if config.torch_compile == "no" else config.activation_memory_budget
    batch = 2 if budget in (None, 1) else config.train_batch_size
    dtype = torch.float32 if config.mixed_precision == "no" else torch.bfloat16
    return _counted(tuple(options.items()), lora, batch, budget, dtype)


@functools.lru_cache
def _counted(
    options: tuple[tuple[str, Any], ...],
    lora: tuple[int, str] | None,
    batch: int,
    budget: float | None,
    dtype: torch.dtype,
) -> float:
    with torch.device("meta"):
        model = ERWTransformer2DModel(**dict(options))
        if lora is not None:
            from peft import LoraConfig

            model.requires_grad_(False)
            model.add_adapter(LoraConfig(r=lora[0], target_modules=split_names(lora[1])))
    processor = model.transformer_blocks[0].attn.processor
    processor._attention_backend = AttentionBackendName.NATIVE  # whatever the environment says
    processor._projects_once = lambda *_: lora is None  # as on a GPU
    return kept_when_eager(model, dtype) if budget is None else trace_block(model, batch, budget, dtype).kept


class CudaAutocast(TorchFunctionMode):
    """CUDA's autocast, which torch lacks without a driver, and flash attention, on any device."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.dtypes = {
            F.linear: dtype,
            F.conv2d: dtype,
            F.layer_norm: torch.float32,
            F.rms_norm: torch.float32,
            F.scaled_dot_product_attention: dtype,
        }

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        dtype = self.dtypes.get(function)
        if function is F.scaled_dot_product_attention:
            query, key, value = (kwargs[name].to(dtype) for name in ("query", "key", "value"))
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        if dtype is not None:
            args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        return function(*args, **kwargs)


def block_inputs(
    model: ERWTransformer2DModel, batch: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Tokens, conditioning and rotary tables of a block in training."""
    config = model.config
    tokens = (config.sample_size // config.patch_size) ** 2 + (config.class_token_dim is not None)
    width = config.num_attention_heads * config.attention_head_dim
    hidden = torch.empty(batch, tokens, width, dtype=dtype, device=model.device, requires_grad=True)
    temb = torch.empty(batch, width, dtype=dtype, device=model.device, requires_grad=True)
    return hidden, temb, None if model.rope is None else model.rope(hidden)


def kept_when_eager(model: ERWTransformer2DModel, dtype: torch.dtype = torch.bfloat16) -> float:
    """Bytes for each token and channel that autograd keeps of a model's first block; the model is on the meta device."""
    totals = []
    for batch in (2, 4):  # the difference is without the weights' copies
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        hidden, temb, rotary = block_inputs(model, batch, dtype)
        with CudaAutocast(dtype), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.transformer_blocks[0](hidden, temb, rotary)
        totals.append((sum(storage.nbytes() for storage in kept.values()), output.numel()))
    (few, half), (many, whole) = totals
    return (many - few) / (whole - half)


@dataclass(frozen=True)
class TracedBlock:
    """A compiled block's graphs, and the bytes that lie between them for each token and channel, without the weights' copies."""

    forward: torch.fx.GraphModule
    backward: torch.fx.GraphModule
    kept: float


def trace_block(
    model: ERWTransformer2DModel, batch: int, budget: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> TracedBlock:
    """
    What torch.compile makes of a model's first block in training, by its own partitioner.

    Args:
        model ([`ERWTransformer2DModel`]): On the meta device.
        batch (`int`): Samples of a forward pass.
        budget (`float`, *optional*, defaults to 1.0): torch's `activation_memory_budget`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Of autocast.

    Returns:
        [`TracedBlock`]: Before Inductor's own passes.
    """
    # Private to torch, and needed by no training.
    from torch._functorch import config as functorch_config
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.compilers import nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    block, (hidden, temb, rotary) = model.transformer_blocks[0], block_inputs(model, batch, dtype)
    names, parameters = zip(*block.named_parameters(), strict=True)
    found: list[torch.fx.GraphModule] = []

    def run(parameters: list[torch.Tensor], hidden: torch.Tensor, temb: torch.Tensor, *rotary: torch.Tensor) -> Any:
        with CudaAutocast(dtype):
            return functional_call(block, dict(zip(names, parameters, strict=True)), (hidden, temb, rotary or None))

    def partition(*args: Any, **kwargs: Any) -> Any:
        found.extend(min_cut_rematerialization_partition(*args, **kwargs))
        return tuple(found)

    with functorch_config.patch(activation_memory_budget=budget):
        aot_function(run, nop, nop, partition_fn=partition, decompositions=select_decomp_table())(
            list(parameters), hidden, temb, *(rotary or ())
        )
    forward, backward = found
    inputs = [node for node in forward.graph.nodes if node.op == "placeholder"]
    of_samples = set(inputs[len(names) : len(names) + 2])
    for node in forward.graph.nodes:
        if of_samples.intersection(node.all_input_nodes):
            of_samples.add(node)
    outputs: Any = forward.graph.output_node().args[0]
    kept = [node.meta["val"] for node in dict.fromkeys(outputs[1:]) if node in of_samples]
    return TracedBlock(forward, backward, sum(t.numel() * t.element_size() for t in kept) / hidden.numel())
