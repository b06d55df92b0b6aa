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
"""The dry run's memory against counts; benchmarks/block_cost.py's counts of a compiled block are compared in test_benchmarks."""

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import TINY_MODEL, randomize, train
from torch._functorch import config as functorch_config

from erw_hf import ERWTransformer2DModel
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.device import compile_blocks
from erw_hf.trainer.memory import GIB, activation_bytes, step_memory


def test_parts_of_xl_on_a_card():
    """The sum that the dry run shows, of a batch that 80 GB hold and 24 do not."""
    config = TrainingConfig(vae="v", train_batch_size=32)
    memory = step_memory(config, 675_000_000, 683_000_000, 86_000_000, None, 256)
    assert memory["state"] / GIB == pytest.approx(4 * (4 * 683 + 675) * 1e6 / GIB)
    assert memory["copies"] / GIB == pytest.approx(1.27, abs=0.01)
    assert memory["activations"] == 32 * 256 * 1152 * 36 * 29
    assert 24 < sum(memory.values()) / 1e9 < 80
    less = step_memory(TrainingConfig(vae="v", train_batch_size=32, activation_memory_budget=0.7), 1, 1, 0, None, 256)
    assert less["activations"] == pytest.approx(memory["activations"] * 2 / 3)
    checkpointed = TrainingConfig(vae="v", train_batch_size=32, gradient_checkpointing=True)
    assert activation_bytes(checkpointed) < 0.1 * memory["activations"]
    assert activation_bytes(TrainingConfig(vae="v", train_batch_size=32, qk_norm="rms_norm")) > memory["activations"]
    accumulated = TrainingConfig(vae="v", train_batch_size=32, gradient_accumulation_steps=8)
    assert activation_bytes(accumulated) == memory["activations"]


def test_an_autoencoder_in_the_step_takes_its_weights_and_at_worst_the_batch():
    with torch.device("meta"):
        vae = AutoencoderKL()
    config = TrainingConfig(vae="v", train_batch_size=256, gradient_checkpointing=True)
    alone, beside = (step_memory(config, 1, 1, 0, encoded, 256) for encoded in (None, vae))
    assert beside["frozen"] - alone["frozen"] == 4 * sum(parameter.numel() for parameter in vae.parameters())
    assert beside["activations"] > alone["activations"]  # checkpointed blocks keep less than encoding takes


def test_a_budget_keeps_less_and_changes_no_gradient():
    gradients, kept = [], []
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for share in (1.0, 0.4):
        torch._dynamo.reset()
        model = randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()
        with functorch_config.patch(activation_memory_budget=share):
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager_decomp_partition")
            storages = {}

            def keep(tensor, storages=storages):
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                sample = model(x, torch.rand(4, generator=torch.Generator().manual_seed(1)), torch.arange(4)).sample
            sample.square().sum().backward()
        kept.append(sum(storage.nbytes() for storage in storages.values()))
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert kept[1] < kept[0]


def test_a_run_sets_its_budget_and_says_when_it_would_do_nothing(tiny_flags, capsys):
    model = ERWTransformer2DModel(**TINY_MODEL)
    with functorch_config.patch(activation_memory_budget=0.9):  # put back afterwards
        compile_blocks(model, "cpu", 0.6)
        assert functorch_config.activation_memory_budget == 0.6
        compile_blocks(model, "cpu")
        assert functorch_config.activation_memory_budget == 1
    with pytest.raises(ValueError, match="activation_memory_budget needs compiled blocks"):
        TrainingConfig(vae="v", activation_memory_budget=0.7, torch_compile="no")
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="activation_memory_budget"):
            TrainingConfig(vae="v", activation_memory_budget=wrong)
    train(*tiny_flags, "--dry_run")
    assert "GiB on a GPU (estimate): state 0.0, copies 0.0" in capsys.readouterr().out
