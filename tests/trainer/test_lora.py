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

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import HANGS, TINY_MODEL, launch_training, randomize, train
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
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


def test_the_code_on_the_card_runs(run, base):
    card = (run / "lora" / "README.md").read_text()
    code = (
        card.split("```py\n")[1]
        .split("```")[0]
        .replace('"BASE"', repr(str(base)))
        .replace('"THIS"', repr(str(run / "lora")))
    )
    scope = {}
    exec(code, scope)
    assert len(scope["images"]) == 1 and f"a pipeline of `{base.name}`" in card


def test_a_resumed_adapter_is_bitwise_the_uninterrupted_one(run, base, tiny_flags, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    shutil.rmtree(tmp_path / "run/lora")
    train(*lora_flags(tiny_flags, base), f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=latest")
    assert same_adapter(run / "lora", tmp_path / "run/lora")


def test_an_adapter_of_two_ranks_resumes_bitwise_too(base, tiny_flags, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    launch_training(*lora_flags(tiny_flags, base), f"--output_dir={whole}", processes=2)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-4")
    shutil.rmtree(cut / "lora")
    resume = ["--resume_from_checkpoint=latest", f"--output_dir={cut}"]
    launch_training(*lora_flags(tiny_flags, base), *resume, processes=2)
    assert same_adapter(whole / "lora", cut / "lora")


def same_adapter(one, other):
    """Bitwise; the metadata of the files come in any order."""
    files = sorted(one.glob("*.safetensors"))
    assert len(files) == 2
    pairs = [(load_file(file), load_file(other / file.name)) for file in files]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


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


def test_classes_follow_the_adapters_that_are_active(run, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(run / "lora", folder)
    table = load_file(folder / "class_embeddings.safetensors")["class_embeddings"]
    names = ["5", NAMES[0]]  # a class of both adapters, and one of the base
    embeddings = {"class_embeddings": torch.stack([table[0] + 1, table[0] - 1])}
    save_file(embeddings, folder / "class_embeddings.safetensors", {"names": json.dumps(names)})

    def alone(adapter, label):
        pipe = make_base()
        pipe.load_lora_weights(adapter)
        return draw(pipe, label)

    pipe, known = make_base(), NAMES[0]
    bare = draw(pipe, known)
    pipe.load_lora_weights(run / "lora", adapter_name="a")
    pipe.load_lora_weights(folder, adapter_name="b")
    ids = dict(pipe.labels)
    for active, source in (("a", run / "lora"), ("b", folder), ("a", run / "lora")):
        pipe.set_adapters(active)
        torch.testing.assert_close(draw(pipe, "5"), alone(source, "5"), rtol=0, atol=1e-6)
        torch.testing.assert_close(draw(pipe, known), alone(source, known), rtol=0, atol=1e-6)
    pipe.set_adapters("b")
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe, known), bare, rtol=0, atol=1e-6)
    pipe.enable_lora()
    torch.testing.assert_close(draw(pipe, known), alone(folder, known), rtol=0, atol=1e-6)
    assert pipe.labels == ids


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


KEY = "transformer.transformer_blocks.0.attn.to_q"


def rewrite(file, metadata=None, **tensors):
    """An adapter's file with other tensors or metadata."""
    with safe_open(file, "pt") as opened:
        before = opened.metadata()
    save_file({**load_file(file), **tensors}, file, metadata=before | (metadata or {}))


@pytest.mark.parametrize(
    ("name", "tensors", "metadata", "message"),
    [
        ("lora", {f"{KEY}.lora_A.weight": torch.full((2, 16), torch.nan)}, {}, "holds NaN or infinity"),
        ("lora", {f"{KEY}.lora_A.weight": torch.zeros(2, 16, dtype=torch.int32)}, {}, "int32"),
        (
            "lora",
            {f"{KEY}.lora_A.weight": torch.zeros(17, 16), f"{KEY}.lora_B.weight": torch.zeros(16, 17)},
            {},
            "rank 17",
        ),
        ("lora", {f"{KEY}.lora_A.weight": torch.zeros(1 << 20)}, {}, "made for another model"),
        ("lora", {}, {"lora_adapter_metadata": "no JSON"}, "cannot be read"),
        ("lora", {}, {"lora_adapter_metadata": "[1]"}, "not a dict"),
        ("lora", {}, {"lora_adapter_metadata": '{"transformer.lora_alpha": NaN}'}, "lora_alpha, a number above 0"),
        ("lora", {}, {"lora_adapter_metadata": '{"transformer.alpha_pattern": {"(a+)+": 1}}'}, "name a layer"),
        ("classes", {"class_embeddings": torch.zeros(1, 4)}, {"names": '["a"]'}, "this model's width"),
        ("classes", {"class_embeddings": torch.full((1, 16), torch.nan)}, {"names": '["a"]'}, "not finite"),
        ("classes", {"class_embeddings": torch.zeros(1, 16)}, {"names": '["a", "b"]'}, "a name of its own"),
        ("classes", {"class_embeddings": torch.zeros(2, 16)}, {"names": '["a", "a"]'}, "a name of its own"),
        ("classes", {"class_embeddings": torch.zeros(1, 16)}, {"names": "{"}, "cannot be read"),
    ],
)
def test_hostile_files_are_refused_and_change_nothing(run, tmp_path, name, tensors, metadata, message):
    shutil.copytree(run / "lora", tmp_path / "lora")
    file = {"lora": "pytorch_lora_weights.safetensors", "classes": "class_embeddings.safetensors"}[name]
    rewrite(tmp_path / "lora" / file, metadata, **tensors)
    pipe = make_base()
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tmp_path / "lora")
    assert not pipe.get_list_adapters() and pipe.transformer.config.num_classes == 3


def test_pickles_damaged_files_and_a_missing_peft_are_refused(run, tmp_path, monkeypatch):
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="safetensors files alone"):
        make_base().load_lora_weights(tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(OSError, match="no file named pytorch_lora_weights.safetensors"):
        make_base().load_lora_weights(tmp_path)
    whole = (run / "lora/pytorch_lora_weights.safetensors").read_bytes()
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        make_base().load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="there is no adapter"):
        make_base().load_lora_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="without a dot"):
        make_base().load_lora_weights(run / "lora", adapter_name="v1.0")
    monkeypatch.setattr("erw_hf.pipeline_erw.is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="pip install peft"):
        make_base().load_lora_weights(run / "lora")


def test_models_whose_adapters_would_change_in_part_are_refused(run):
    wrapped = make_base()
    wrapped.load_lora_weights(run / "lora")
    wrapped.transformer = torch.compile(wrapped.transformer)
    for change in (wrapped.unload_lora_weights, wrapped.disable_lora, lambda: wrapped.load_lora_weights(run / "lora")):
        with pytest.raises(ValueError, match=r"wrapped.*pipe.transformer.compile\(\)"):
            change()
    offloaded = make_base()
    table = offloaded.transformer.time_class_embed.class_embedder
    table.weight = torch.nn.Parameter(table.weight.to("meta"))  # as accelerate's hooks leave it between steps
    with pytest.raises(ValueError, match="before enable_sequential_cpu_offload"):
        offloaded.load_lora_weights(run / "lora")
    assert not offloaded.get_list_adapters()


def test_models_whose_weights_are_elsewhere_or_cast_take_adapters_before(run, tmp_path):
    on_disk = make_base()
    on_disk.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path / "disk"),
    )
    with pytest.raises(ValueError, match="adapters before enable_group_offload"):
        on_disk.load_lora_weights(run / "lora")
    cast = make_base()
    cast.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="load adapters before enable_layerwise_casting"):
        cast.load_lora_weights(run / "lora")
    assert not hasattr(cast.transformer, "peft_config")
    cast.unload_lora_weights()  # there are none, as after many a script's reset


def test_classes_follow_fusing(run):
    """As `_put_classes` counts them, and not only after the next switch."""
    pipe = make_base()
    for name in ("one", "two"):
        pipe.load_lora_weights(run / "lora", adapter_name=name)
    pipe._adapter_classes["two"] = [(label, row + 1) for label, row in pipe._adapter_classes["two"]]
    pipe.set_adapters("one")
    table, row = pipe.transformer.time_class_embed.class_embedder, pipe.labels["5"]
    before = table.weight[row].clone()
    pipe.fuse_lora(adapter_names=["two"])
    torch.testing.assert_close(table.weight[row], before + 1)
    pipe.unfuse_lora()
    torch.testing.assert_close(table.weight[row], before)


def test_group_offloading_moves_the_classes_of_an_adapter_too(run):
    pipe, moved = make_base(), []
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    pipe.load_lora_weights(run / "lora")
    for module in pipe.transformer.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            moved += [p for owner in hook.group.modules for p in owner.parameters()] + list(hook.group.parameters)
    table = pipe.transformer.time_class_embed.class_embedder
    assert any(parameter is table.weight for parameter in moved)
    assert table.num_embeddings == len(table.weight) == pipe.transformer.config.num_classes + 1
    plain = make_base()
    plain.load_lora_weights(run / "lora")
    torch.testing.assert_close(draw(pipe, "5"), draw(plain, "5"))


@pytest.mark.parametrize("offline", [False, True])
def test_classes_are_not_lost_where_the_hub_was_not_reached(run, tmp_path, monkeypatch, offline):
    def not_reached(*args, **kwargs):
        raise OSError("not in the cache") from LocalEntryNotFoundError("the Hub could not be reached")

    monkeypatch.setattr("erw_hf.pipeline_erw._get_model_file", not_reached)
    monkeypatch.setattr("erw_hf.pipeline_erw.is_offline_mode", lambda: offline)
    pipe = make_base()
    if offline:  # nothing tells that the adapter has classes
        assert pipe._read_classes("owner/adapter", {}) == []
    else:
        with pytest.raises(OSError, match="not in the cache"):
            pipe._read_classes("owner/adapter", {})


def test_metadata_decide_the_scale_and_nothing_else(run, tmp_path):
    """peft imports the module that `megatron_core` names, and reads `target_modules` as a regular expression."""
    shutil.copytree(run / "lora", tmp_path / "lora")
    asks = {"lora_alpha": 4, "target_modules": "(.*)*$", "megatron_core": "antigravity", "megatron_config": {}}
    asks |= {"modules_to_save": ["proj_out"], "use_dora": True}
    written = json.dumps({f"transformer.{key}": value for key, value in asks.items()})
    rewrite(tmp_path / "lora/pytorch_lora_weights.safetensors", {"lora_adapter_metadata": written})
    pipe = make_base()
    pipe.load_lora_weights(tmp_path / "lora")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert layer.scaling == {"default_0": 2.0} and "antigravity" not in sys.modules
    assert not hasattr(pipe.transformer.proj_out, "modules_to_save") and not layer.use_dora["default_0"]


def test_another_pipeline_of_the_same_parts_has_their_adapters(run, tmp_path):
    pipe = make_base()
    pipe.load_lora_weights(run / "lora", adapter_name="a")
    five, other = draw(pipe, "5"), ERWPipeline.from_pipe(pipe)
    assert other.get_active_adapters() == ["a"] and torch.equal(draw(other, "5"), five)
    other.unload_lora_weights()
    assert "5" not in other.labels and other.transformer.config.num_classes == 3
    other.save_pretrained(tmp_path)


WITHOUT_EXTRAS = """
import sys
for name in ("datasets", "jinja2", "matplotlib", "sklearn", "tensorboard", "torchdata"):
    sys.modules[name] = None  # as if it were not installed
from erw_hf import ERWPipeline
pipe = ERWPipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights(sys.argv[2], adapter_name="a")
pipe.set_adapters(["a"], [0.5])
pipe.fuse_lora()
pipe.unload_lora_weights()
print(pipe(class_labels=["5"], num_inference_steps=1).images[0].size)
"""


def test_an_adapter_loads_in_a_fresh_process_without_the_trainers_extras(run, base):
    command = [sys.executable, "-c", WITHOUT_EXTRAS, str(base), str(run / "lora")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert result.stdout == "(8, 8)\n", result.stderr[-2000:]
