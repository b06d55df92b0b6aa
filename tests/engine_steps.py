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
"""Two steps in bf16 under the engine that it is started with, and what a test asks of them, as JSON.

torchrun --nproc_per_node 2 [tests/fsdp2_on_cpu.py] tests/engine_steps.py RESULT
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from helpers import TINY_MODEL, randomize

from erw_hf import ERWTransformer2DModel
from erw_hf.trainer.ema import whole_tensor
from erw_hf.trainer.engines import autocast_forward, check_engine, close_accelerator, open_accelerator
from erw_hf.trainer.optimizers import orthogonalized, orthogonalized_together


def gloo_threads() -> int:
    """Linux tells names; elsewhere there is nothing to count."""
    return sum("gloo_runloop" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def steps(accelerator) -> dict[str, object]:
    config = SimpleNamespace(
        optimizer="adamw",
        lora_rank=0,
        gradient_reduction="float32",
        gradient_accumulation_steps=1,
        train_batch_size=2,
        max_grad_norm=1.0,
        mixed_precision="bf16",
    )
    check_engine(config, accelerator)
    model = randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()  # training draws which classes are dropped
    times = []
    model.time_class_embed.register_forward_pre_hook(lambda module, args: times.append(args[0].detach().clone()))
    autocast_forward(model, accelerator)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    generator = torch.Generator().manual_seed(accelerator.process_index)
    x, t = torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([0.18438, 0.7])
    losses = []
    for _ in range(2):
        velocity = model(x, t, torch.tensor([1, 2])).sample
        loss = (velocity.float() - x).square().mean()
        accelerator.backward(loss)
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        gradients = [whole_tensor(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    matrices = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    group = dist.group.WORLD._get_backend(torch.device("cpu"))
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return {
        "engine": str(accelerator.distributed_type),
        "times": [seen.tolist() == t.tolist() for seen in times],
        "dtype": str(velocity.dtype),
        "losses": losses,
        "gradients_of_bf16": (flat == flat.bfloat16().float()).float().mean().item(),
        "orthogonalised_alike": torch.allclose(orthogonalized_together(matrices), orthogonalized(matrices), atol=0.02),
        "timeout": group.options._timeout.total_seconds(),
    }


def main() -> None:
    accelerator = open_accelerator(mixed_precision="bf16")
    result = steps(accelerator)
    before = gloo_threads()
    close_accelerator(accelerator)
    if accelerator.is_main_process:
        result["threads"] = [before, gloo_threads()]
        Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
