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
"""LoRA: the trainer's adapter, and `ERWPipeline`'s loader."""

import shutil

import pytest
import torch
from helpers import TINY_MODEL, randomize, train
from safetensors.torch import load_file, save_file

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler


pytest.importorskip("peft")

NAMES = {0: "cat", 1: "3", 2: "7"}  # two of the digits' classes are known, the others are new


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base().save_pretrained(folder)
    return folder


def make_base():
    transformer = randomize(ERWTransformer2DModel(**{**TINY_MODEL, "num_classes": 3}))
    pipe = ERWPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler(), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, label):
    generator = torch.manual_seed(0)
    return torch.tensor(
        pipe(class_labels=[label], num_inference_steps=2, output_type="np", generator=generator).images
    )


def lora_flags(tiny_flags, base):
    changes = ["--warmup_steps=0", "--alignment_weight=0", "--lora_rank=2", "--ema_decay=0.5", "--learning_rate=0.05"]
    return [*tiny_flags, *changes, "--max_train_steps=4", f"--init_from={base}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_flags, base):
    folder = tmp_path_factory.mktemp("lora") / "run"
    train(*lora_flags(tiny_flags, base), f"--output_dir={folder}")
    return folder


def test_the_adapter_on_its_base_draws_as_the_merged_pipeline(run, base):
    pipe = ERWPipeline.from_pretrained(base)
    before, cat = dict(load_file(base / "transformer/diffusion_pytorch_model.safetensors")), draw(pipe, "cat")
    pipe.load_lora_weights(run / "lora")
    merged = ERWPipeline.from_pretrained(run / "pipeline")
    for label in ("3", "5"):
        torch.testing.assert_close(draw(pipe, label), draw(merged, label), rtol=0, atol=1e-5)
    assert not torch.equal(draw(pipe, "cat"), cat)
    pipe.unload_lora_weights()
    assert pipe.labels == {name: class_id for class_id, name in NAMES.items()}
    assert torch.equal(draw(pipe, "cat"), cat)
    trained = load_file(next(run.glob("checkpoint-4/model*.safetensors")))
    table = "time_class_embed.class_embedder.weight"
    for name, tensor in before.items():
        if name != table:
            module, _, kind = name.rpartition(".")
            found = trained.get(f"transformer.{name}", trained.get(f"transformer.{module}.base_layer.{kind}"))
            assert torch.equal(found, tensor), name
    assert torch.equal(trained[f"transformer.{table}"][[3, 7, 10]], before[table][[1, 2, 3]])  # the known, and null
    assert not (trained[f"transformer.{table}"][5] == before[table][3]).any()


def test_a_resumed_adapter_is_bitwise_the_uninterrupted_one(run, base, tiny_flags, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    shutil.rmtree(tmp_path / "run/lora")
    train(*lora_flags(tiny_flags, base), f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=latest")
    files = sorted((run / "lora").glob("*.safetensors"))
    assert len(files) == 2
    for file in files:  # whose metadata come in any order
        uninterrupted, resumed = load_file(file), load_file(tmp_path / "run/lora" / file.name)
        assert uninterrupted.keys() == resumed.keys()
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in uninterrupted.items())


def test_adapters_add_up_by_their_weights_and_leave_with_their_classes(run):
    pipe = make_base()
    pipe.load_lora_weights(run / "lora", adapter_name="a")
    one = draw(pipe, "5")
    pipe.load_lora_weights(run / "lora/pytorch_lora_weights.safetensors", adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.25, 0.75])
    torch.testing.assert_close(draw(pipe, "5"), one, rtol=0, atol=1e-5)
    pipe.delete_adapters("a")
    assert "5" in pipe.labels
    pipe.delete_adapters("b")
    assert "5" not in pipe.labels


def test_a_fused_adapter_is_saved_with_its_classes(run, tmp_path):
    pipe = make_base()
    pipe.load_lora_weights(run / "lora")
    five = draw(pipe, "5")
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe, "5"), five, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(draw(ERWPipeline.from_pretrained(tmp_path), "5"), five, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("unet.a.lora_A.weight", (2, 16), "not one of this model"),
        ("transformer.nothing.to_q.lora_A.weight", (2, 16), "no linear layer"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (2, 16), "made for another model"),
        ("transformer.transformer_blocks.0.attn.lora_A.weight", (2, 16), "no linear layer"),
    ],
)
def test_a_foreign_adapter_is_refused(tmp_path, key, shape, message):
    save_file({key: torch.zeros(shape)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=message):
        make_base().load_lora_weights(tmp_path)


def test_hostile_files_are_refused(run, tmp_path):
    import shutil

    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="safetensors files alone"):
        make_base().load_lora_weights(tmp_path / "pytorch_lora_weights.bin")
    for index, (tensor, names) in enumerate(
        [(torch.zeros(1, 4), '["a"]'), (torch.full((1, 16), torch.nan), '["a"]'), (torch.zeros(1, 16), '["a", "b"]')]
    ):
        folder = tmp_path / str(index)
        shutil.copytree(run / "lora", folder)
        save_file({"class_embeddings": tensor}, folder / "class_embeddings.safetensors", metadata={"names": names})
        pipe = make_base()
        with pytest.raises(ValueError, match="class embeddings of this model's width|a name of its own"):
            pipe.load_lora_weights(folder)
        assert not pipe.get_list_adapters()
