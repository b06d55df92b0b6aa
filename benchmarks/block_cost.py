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
"""Kernels, bytes and saved activations of a block in bf16, counted without a GPU: what Inductor would launch on an H100.

    PYTHONPATH=src python benchmarks/block_cost.py --output benchmarks/results/block_cost.json

The block runs on fake tensors through torch's own partitioner and, moved to an imaginary GPU, Inductor's scheduler; no kernel is
generated or run. A lost fusion, a tensor kept in float32, or a split product shows in the counts. They depend on torch's version:
compare within one.
"""

import argparse
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from common import describe, environment, table, write
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erw_hf import ERWTransformer2DModel
from erw_hf.sizes import size_config
from erw_hf.trainer.memory import CudaAutocast, block_inputs, kept_when_eager, trace_block
from erw_hf.transformer_erw import ERWAttnProcessor


MODERN = {"use_rope": True, "norm_type": "rms_norm", "activation_fn": "swiglu"}
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85 * 10**9, multi_processor_count=132, warp_size=32,
    L2_cache_size=50 * 2**20, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, clock_rate=1980000, memory_clock_rate=2619000,
    memory_bus_width=5120,
)  # fmt: skip


@contextmanager
def an_h100() -> Iterator[None]:
    """Makes torch believe that there is a GPU; only its properties are asked for."""
    answers = {
        "get_device_properties": lambda *_, **__: H100, "current_device": lambda: 0, "is_available": lambda: True,
        "device_count": lambda: 1,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, answer in answers.items():
            for owner in (torch.cuda, CudaInterface):
                as_method = answer if owner is torch.cuda else staticmethod(answer)
                stack.enter_context(mock.patch.object(owner, name, as_method))
        for name in ("get_device_properties", "current_device"):
            stack.enter_context(mock.patch.object(CudaInterface.Worker, name, staticmethod(answers[name])))
        capability = staticmethod(lambda *_: "90")
        stack.enter_context(mock.patch.object(CudaInterface, "get_compute_capability", capability))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_name", lambda *_: H100.name))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", lambda *_: True))
        yield


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write, without products, attention and views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and "attention" not in name and name not in ("mm", "addmm", "_unsafe_view"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        return result


def moved_when_eager(model: ERWTransformer2DModel, batch: int) -> dict[str, int]:
    """Bytes that a block moves which is not compiled, forward and backward."""
    block, inputs = model.transformer_blocks[0], block_inputs(model, batch, torch.bfloat16)
    with CudaAutocast(), Traffic() as forward:
        output = block(*inputs)
    gradient = torch.empty_like(output)
    with Traffic() as backward:
        output.backward(gradient)
    return {"forward": forward.bytes, "backward": backward.bytes}


def onto_cuda(module: torch.fx.GraphModule) -> list[torch.Tensor]:
    """The same graph on fake CUDA tensors, with CUDA's attention for the CPU's; returns its inputs."""
    aten, graph = torch.ops.aten, module.graph
    for node in graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = node.kwargs | {"device": torch.device("cuda:0")}
        if node.target is aten._scaled_dot_product_flash_attention_for_cpu.default:
            node.target = aten._scaled_dot_product_flash_attention.default
        if node.target is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            tokens = node.args[1].meta["val"].shape[2]
            with graph.inserting_before(node):
                options = {"dtype": torch.uint64, "device": torch.device("cuda:0")}
                seed = graph.call_function(
                    aten.empty.memory_format, ([2],), options
                )  # of a dropout with probability 0
            node.target = aten._scaled_dot_product_flash_attention_backward.default
            node.args = (*node.args[:6], None, None, tokens, tokens, 0.0, False, seed, seed)
            node.kwargs = {}
    module.recompile()
    values = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    with values[0].fake_mode as mode:
        inputs = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0") for value in values
        ]
        FakeTensorProp(module, mode).propagate(*inputs)
    return inputs


def scheduled(graph: torch.fx.GraphModule, part: str) -> dict[str, int]:
    """Inductor's kernels for a graph: products, attention, and generated ones with the bytes that they move."""
    inputs = onto_cuda(graph)
    mode = inputs[0].fake_mode
    with an_h100(), V.set_fake_mode(mode), torch.no_grad():
        post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=inputs, is_backward=part == "backward", graph_id=0)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering.init_wrapper_code()
            lowering._update_scheduler()
            counts = {"products": 0, "attention": 0, "generated": 0, "bytes": 0}
            for node in lowering.scheduler.nodes:
                if isinstance(node, scheduler.ExternKernelSchedulerNode):
                    name = str(getattr(node.node, "python_kernel_name", "") or getattr(node.node, "op_overload", ""))
                    counts["products"] += name.endswith(("mm", "addmm"))
                    counts["attention"] += "attention" in name
                elif not isinstance(node, scheduler.NopKernelSchedulerNode):
                    counts["generated"] += 1
                    counts["bytes"] += node.get_read_write_buffers_sizes()
    return counts


def count(
    name: str, batch: int, budget: float = 1.0, one_product: bool = True, size: str = "SiT-XL/2", **options
) -> dict[str, object]:
    """A row of the table."""
    with torch.device("meta"):
        model = ERWTransformer2DModel(**size_config(size) | {"num_layers": 1} | options)
    with mock.patch.object(ERWAttnProcessor, "_projects_once", staticmethod(lambda *_: one_product)):
        traced = trace_block(model, batch, budget)
        eager = {"saved_eager": kept_when_eager(model), "bytes_eager": moved_when_eager(model, batch)}
        numbers = block_inputs(model, batch, torch.bfloat16)[0].numel()
    parts = {part: scheduled(getattr(traced, part), part) for part in ("forward", "backward")}
    return {"name": name, "batch": batch, "numbers": numbers, "saved": traced.kept, **eager, **parts}


def report(result: dict[str, object]) -> str:
    """A table in Markdown; bytes per token and channel."""
    rows = []
    for found in result["blocks"]:
        forward, backward = found["forward"], found["backward"]
        both = {key: forward[key] + backward[key] for key in forward}
        rows.append(
            (
                found["name"], found["batch"], both["products"], both["generated"],
                f"{forward['bytes'] / found['numbers']:.1f}", f"{backward['bytes'] / found['numbers']:.1f}",
                *(f"{found['bytes_eager'][part] / found['numbers']:.1f}" for part in ("forward", "backward")),
                f"{found['saved']:.1f}", f"{found['saved_eager']:.1f}",
            )
        )  # fmt: skip
    header = (
        "block of XL/2, bf16",
        "batch",
        "products",
        "generated kernels",
        "B forward",
        "B backward",
        "B forward, eager",
        "B backward, eager",
        "B saved",
        "B saved, eager",
    )
    return (
        table(header, rows)
        + "\nCounted from Inductor's schedule for an H100, without one; nothing is measured. B: bytes for each token and channel, "
        f"moved by generated kernels (eager: by all but products and attention, RMSNorm in parts as on a CPU), or kept for the backward pass. {describe(result['environment'])}\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write JSON and, beside it, Markdown")
    parser.add_argument("--quick", action="store_true", help="the first block alone")
    args = parser.parse_args(arguments)
    ways: list[tuple[str, dict]] = [
        ("sit", {"batch": 32}),
        ("sit, three products", {"batch": 32, "one_product": False}),
        ("modern", {"batch": 32, **MODERN}),
        ("sit, budget 0.7", {"batch": 256, "budget": 0.7}),
        ("sit, budget 0.5", {"batch": 256, "budget": 0.5}),
    ]
    result = {"environment": environment(), "blocks": []}
    for name, way in ways[: 1 if args.quick else None]:
        result["blocks"].append(count(name, **way))
        write(args.output, result, report(result))
    print(report(result))


if __name__ == "__main__":
    main()
