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
"""The dry run's memory against what blocks keep."""

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import TINY_MODEL, randomize, train
from torch._functorch import config as functorch_config

from erw_hf import ERWTransformer2DModel
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.device import compile_blocks
from erw_hf.trainer.memory import GIB, activation_bytes, block_inputs, kept_by_block, step_memory
from erw_hf.transformer_erw import ERWAttnProcessor


MODERN = {"norm_type": "rms_norm", "activation_fn": "swiglu"}


def test_parts_of_xl_on_a_card():
    """The sum that the dry run shows, of a batch that 80 GB hold and 24 do not."""
    config = TrainingConfig(vae="v", train_batch_size=32)
    memory = step_memory(config, 675_000_000, 683_000_000, 2 * 683_000_000, 86_000_000, None, 256)
    assert memory["state"] / GIB == pytest.approx(4 * (4 * 683 + 675) * 1e6 / GIB)
    assert memory["copies"] / GIB == pytest.approx(1.27, abs=0.01)
    assert memory["activations"] == pytest.approx(32 * 256 * 1152 * 36 * 29, rel=0.01)
    assert 24 < sum(memory.values()) / 1e9 < 80
    less = step_memory(
        TrainingConfig(vae="v", train_batch_size=32, activation_memory_budget=0.7), 1, 1, 2, 0, None, 256
    )
    assert less["activations"] == pytest.approx(memory["activations"] * 2 / 3, rel=0.01)
    checkpointed = TrainingConfig(vae="v", train_batch_size=32, gradient_checkpointing=True)
    assert activation_bytes(checkpointed) < 0.1 * memory["activations"]
    assert activation_bytes(TrainingConfig(vae="v", train_batch_size=32, qk_norm="rms_norm")) > memory["activations"]
    accumulated = TrainingConfig(vae="v", train_batch_size=32, gradient_accumulation_steps=8)
    assert activation_bytes(accumulated) == memory["activations"]


def test_an_autoencoder_in_the_step_takes_its_weights_and_at_worst_the_batch():
    with torch.device("meta"):
        vae = AutoencoderKL()
    config = TrainingConfig(vae="v", train_batch_size=256, gradient_checkpointing=True)
    alone, beside = (step_memory(config, 1, 1, 2, 0, encoded, 256) for encoded in (None, vae))
    assert beside["frozen"] - alone["frozen"] == 4 * sum(parameter.numel() for parameter in vae.parameters())
    assert beside["activations"] > alone["activations"]  # checkpointed blocks keep less than encoding takes


@pytest.mark.parametrize(
    ("keys", "budget"),
    [
        ({"train_batch_size": 2}, 0.5),  # 4 tokens of the batch for each channel
        ({"train_batch_size": 16}, 0.5),
        ({"train_batch_size": 8, "qk_norm": "rms_norm", **MODERN}, 0.4),
    ],
)
def test_a_compiled_block_keeps_what_is_estimated_and_its_gradients(keys, budget, monkeypatch):
    """On real tensors, with and without a budget, within 10 %."""
    monkeypatch.setattr(ERWAttnProcessor, "_projects_once", staticmethod(lambda *_: True))  # as on a GPU
    size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64}
    gradients, kept = [], []
    for share in (1.0, budget):
        torch._dynamo.reset()
        config = TrainingConfig(vae="v", mixed_precision="no", activation_memory_budget=share, **size, **keys)
        model = randomize(ERWTransformer2DModel(**config.model_config(2)))
        inputs = block_inputs(model, config.train_batch_size, torch.float32)[:2]
        for tensor, seed in zip(inputs, (0, 1), strict=True):
            tensor.data.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        storages = {}

        def keep(tensor, storages=storages, weights=weights):
            if tensor.untyped_storage()._cdata not in weights:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with functorch_config.patch(activation_memory_budget=share):
            block = torch.compile(model.transformer_blocks[0], fullgraph=True, backend="aot_eager_decomp_partition")
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = block(*inputs)
            output.square().sum().backward()
        kept.append(sum(storage.nbytes() for storage in storages.values()))
        assert kept_by_block(config) == pytest.approx(kept[-1] / output.numel(), rel=0.1)
        gradients.append([tensor.grad for tensor in (*inputs, *model.transformer_blocks[0].parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize(
    ("model", "batch", "keys", "bytes_kept"),
    [
        ("SiT-XL/2", 16, {"activation_memory_budget": 0.5}, 24.1),
        ("SiT-XL/2", 256, {"activation_memory_budget": 0.5}, 18.1),
        ("SiT-S/2", 8, {"activation_memory_budget": 0.4}, 12.1),
        ("SiT-S/2", 8, {"activation_memory_budget": 0.7, **MODERN}, 28.8),
        ("SiT-XL/2", 64, {"activation_memory_budget": 0.5, "qk_norm": "rms_norm", **MODERN}, 16.7),
        ("SiT-B/2", 32, {"torch_compile": "no", "qk_norm": "rms_norm"}, 64.3),
    ],
)
def test_counts_of_published_sizes(model, batch, keys, bytes_kept):
    """As `benchmarks/block_cost.py` found them with torch 2.14: with a budget below 1 they depend on the batch and the width."""
    config = TrainingConfig(vae="v", model=model, train_batch_size=batch, **keys)
    assert kept_by_block(config) == pytest.approx(bytes_kept, rel=0.1)


def test_a_sample_is_told_from_a_weight_of_the_same_shape():
    """A batch as large as the model is wide; adapters, whose layers may be named by their block."""
    keys = {"vae": "v", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8}
    kept = [
        kept_by_block(TrainingConfig(**keys, train_batch_size=batch, activation_memory_budget=0.99))
        for batch in (31, 32, 33)
    ]
    assert max(kept) < 1.05 * min(kept)
    pytest.importorskip("peft")
    adapted = TrainingConfig(**keys, init_from="x", lora_rank=4, lora_targets="transformer_blocks.1.attn.to_q")
    assert 0 < kept_by_block(adapted) < kept[0]


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
