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
"""The context- and tensor-parallel plans, on the CPU: diffusers itself asks for an accelerator, which is stubbed."""

import pytest
import torch
from diffusers.hooks import tensor_parallel
from helpers import TINY_MODEL, check_ended, randomize, run_ranks

from erw_hf import ERWTransformer2DModel


CONTEXT_PARALLEL = """
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from erw_hf import ERWTransformer2DModel
from erw_hf.trainer.engines import end_process_group

dist.init_process_group("gloo")
torch._C._get_accelerator = lambda *args: torch.device("cpu")
torch.accelerator.device_count = lambda: 1
# Gloo gathers equal shares alone: 16 patches, or 9 and a class token.
for use_rope, class_token_dim in ((False, None), (True, None), (False, 6), (True, 6)):
    torch.manual_seed(0)
    side, local = (8, 8) if class_token_dim is None else (6, 5)
    model = ERWTransformer2DModel(
        sample_size=side, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=5, use_rope=use_rope,
        class_token_dim=class_token_dim,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, labels = torch.randn(2, 4, side, side), torch.tensor([0.2, 0.7]), torch.tensor([1, 2])
    class_token = None if class_token_dim is None else torch.randn(2, class_token_dim)
    tokens = []
    model.transformer_blocks[1].attn.register_forward_hook(lambda *args: tokens.append(args[-1].shape[1]))
    with torch.no_grad():
        expected = model(x, t, labels, class_token=class_token)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        parallel = model(x, t, labels, class_token=class_token)
    assert tokens == [2 * local, local], tokens  # each process holds half of the tokens
    torch.testing.assert_close(parallel.sample, expected.sample, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(parallel.class_token, expected.class_token, atol=1e-6, rtol=1e-5)
del model, parallel  # whose hooks hold the group
dist.barrier()
end_process_group()
"""


def test_context_parallel_gives_the_same_velocity(tmp_path):
    (tmp_path / "script.py").write_text(CONTEXT_PARALLEL)
    check_ended(run_ranks(2, tmp_path / "script.py"))


@pytest.mark.parametrize("activation_fn", ["gelu-approximate", "swiglu"])
def test_tensor_parallel_plan_splits_what_belongs_together(activation_fn):
    # The floor, 0.40, has no function that tells the shards without devices. The pinned version has, so CI never skips.
    if not hasattr(tensor_parallel, "resolve_tp_shard_specs"):
        pytest.skip("diffusers before 0.41 resolves its tensor-parallel plan elsewhere")
    config = {**TINY_MODEL, "activation_fn": activation_fn, "attention_head_dim": 12}
    model = randomize(ERWTransformer2DModel(**config)).eval()
    specs = tensor_parallel.resolve_tp_shard_specs(model, model._tp_plan, 2)
    covered = {name.split(".", 2)[2] for name in specs if name.startswith("transformer_blocks.0.")}
    assert {"attn.to_q.weight", "attn.to_out.0.weight", "ff.net.0.proj.weight", "ff.net.2.weight"} <= covered

    def shard(name, tensor, rank):
        spec = specs[name]
        dim, blocks = vars(spec).values() if hasattr(spec, "__dict__") else spec
        if dim is None:
            return tensor
        parts = [block.chunk(2, dim=dim)[rank] for block in tensor.split(blocks, dim=dim)]
        return torch.cat(parts, dim=dim)

    ff, x = model.transformer_blocks[0].ff, torch.randn(3, 24)
    prefix = "transformer_blocks.0.ff.net"
    total = ff.net[2].bias
    for rank in range(2):
        weight = shard(f"{prefix}.0.proj.weight", ff.net[0].proj.weight, rank)
        bias = shard(f"{prefix}.0.proj.bias", ff.net[0].proj.bias, rank)
        hidden = torch.nn.functional.linear(x, weight, bias)
        if activation_fn == "swiglu":
            value, gate = hidden.chunk(2, dim=-1)
            hidden = value * torch.nn.functional.silu(gate)
        else:
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
        total = total + hidden @ shard(f"{prefix}.2.weight", ff.net[2].weight, rank).T
    torch.testing.assert_close(total, ff(x), atol=1e-5, rtol=1e-5)
