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
"""What a run starts from: `--init_from`. `--warmup_from` is tested in test_training.py and test_push.py."""

import json

import pytest
import torch
from helpers import TINY_MODEL, randomize, train
from PIL import Image
from safetensors.torch import load_file, save_file

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler
from erw_hf.conversion import convert_checkpoint
from erw_hf.trainer.initialization import CLASS_TABLE, load_initial


NAMES = {0: "cat", 1: "dog", 2: "emu"}
CONFIG = {**TINY_MODEL, "num_classes": 3}


@pytest.fixture
def trained(tmp_path):
    """The folder of a pipeline, and its weights."""
    transformer = randomize(ERWTransformer2DModel(**CONFIG))
    ERWPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler(), id2label=NAMES).save_pretrained(
        tmp_path / "run/pipeline"
    )
    return tmp_path / "run", transformer.state_dict()


def test_classes_keep_their_embedding_by_name_and_new_ones_start_from_the_null_class(trained):
    folder, before = trained
    state = load_initial(
        str(folder), {**CONFIG, "num_classes": 4, "sample_size": 16}, {0: "dog", 1: "yak", 2: "cat", 3: "gnu"}
    )
    assert torch.equal(state[CLASS_TABLE], before[CLASS_TABLE][[1, 3, 0, 3, 3]])
    assert set(state) == set(before)
    assert all(torch.equal(state[name], before[name]) for name in before if name != CLASS_TABLE)
    ERWTransformer2DModel(**{**CONFIG, "num_classes": 4, "sample_size": 16}).load_state_dict(state)


@pytest.mark.parametrize(("count", "rows"), [(3, [0, 1, 2, 3]), (2, [3, 3, 3]), (0, [3])])
def test_classes_without_names_are_the_same_only_if_they_are_as_many(trained, count, rows):
    folder, before = trained
    state = load_initial(str(folder / "pipeline"), {**CONFIG, "num_classes": count}, None)
    assert torch.equal(state[CLASS_TABLE], before[CLASS_TABLE][rows])


def published():
    """A SiT of these sizes under the names of its own files, with its unused variance channels."""
    config = CONFIG
    width = config["num_attention_heads"] * config["attention_head_dim"]
    generator = torch.Generator().manual_seed(0)
    patch, channels = config["patch_size"] ** 2, config["in_channels"]
    shapes = {
        "x_embedder.proj.weight": (width, channels, config["patch_size"], config["patch_size"]),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (config["num_classes"] + 1, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
        "final_layer.linear.weight": (patch * 2 * channels, width),
        "final_layer.linear.bias": (patch * 2 * channels,),
    }
    sizes = {
        "attn.qkv": (3, 1),
        "attn.proj": (1, 1),
        "mlp.fc1": (4, 1),
        "mlp.fc2": (1, 4),
        "adaLN_modulation.1": (6, 1),
    }
    for block in range(config["num_layers"]):
        for name, (rows, columns) in sizes.items():
            shapes[f"blocks.{block}.{name}.weight"] = (rows * width, columns * width)
            shapes[f"blocks.{block}.{name}.bias"] = (rows * width,)
    state = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name].unflatten(0, (patch, 2 * channels))[:, channels:] = 0
    return {**state, "pos_embed": ERWTransformer2DModel(**config).pos_embed.pos_embed}


def save_port(folder, state, **config):
    """The layout of the community's ports: our code is not in it, theirs must not run."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "pipeline.py").write_text("raise SystemExit('remote code ran')")
    (folder / "transformer/transformer_sit.py").write_text("raise SystemExit('remote code ran')")
    index = {"_class_name": ["pipeline", "SiTPipeline"], "transformer": ["transformer_sit", "SiTTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": "SiTTransformer2DModel", "num_heads": 2, "input_size": 8, "patch_size": 2, **config}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    save_file(state, folder / "transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture
def width_16(monkeypatch):
    """Files do not say the number of heads: this width counts as a published one."""
    monkeypatch.setattr("erw_hf.conversion.published_heads", lambda dim: 2)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_published_file_is_a_start(tmp_path, suffix, width_16):
    state, path = published(), tmp_path / f"SiT.{suffix}"
    torch.save({"ema": state}, path) if suffix == "pt" else save_file(state, path)
    expected = convert_checkpoint(state).state_dict()
    found = load_initial(str(path), {**CONFIG, "num_classes": 2}, {0: "yak", 1: "gnu"})
    assert torch.equal(found[CLASS_TABLE], expected[CLASS_TABLE][[3, 3, 3]])
    assert all(torch.equal(found[name], expected[name]) for name in expected if name != CLASS_TABLE)


@pytest.mark.parametrize("variance", [True, False])
def test_a_port_in_diffusers_layout_is_read_and_not_run(tmp_path, variance):
    state = published()
    if not variance:  # a port may leave the unused channels out
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            state[name] = state[name].unflatten(0, (4, 2))[:, :1].flatten(0, 1).contiguous()
    save_port(tmp_path / "port", state)
    found = load_initial(str(tmp_path / "port"), CONFIG, None)
    expected = convert_checkpoint(state, {"num_attention_heads": 2, "time_reversed": True}).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_port_that_does_not_fit_is_refused(tmp_path):
    save_port(tmp_path / "heads", published(), num_heads=4)
    with pytest.raises(ValueError, match="num_attention_heads=4, the config has 2"):
        load_initial(str(tmp_path / "heads"), CONFIG, None)
    save_port(tmp_path / "other", published(), _class_name="DiTTransformer2DModel")
    with pytest.raises(ValueError, match="holds a DiTTransformer2DModel: only"):
        load_initial(str(tmp_path / "other"), CONFIG, None)
    save_port(tmp_path / "pickled", published())
    weights = tmp_path / "pickled/transformer/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="pickled weights are not read"):
        load_initial(str(tmp_path / "pickled"), CONFIG, None)
    save_port(tmp_path / "cut", published())
    weights = tmp_path / "cut/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read, it may be truncated"):
        load_initial(str(tmp_path / "cut"), CONFIG, None)


def test_another_model_and_what_is_no_pipeline_are_refused(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(ValueError, match="num_layers=3, the config has 4"):
        load_initial(str(folder), {**CONFIG, "num_layers": 4}, NAMES)
    with pytest.raises(ValueError, match="is not a pipeline"):
        load_initial(str(tmp_path), CONFIG, NAMES)


def test_weights_that_the_config_does_not_know_are_not_dropped(trained):
    folder, _ = trained
    file = folder / "pipeline/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    extra = {"transformer_blocks.0.attn.to_qkv.weight": torch.zeros(1)}  # a copy, of projections that were fused
    save_file(tensors | extra, file)
    load_initial(str(folder), CONFIG, NAMES)
    save_file(tensors | {"transformer_blocks.3.attn.to_q.weight": torch.zeros(1)}, file)
    with pytest.raises(
        ValueError, match="holds 1 tensors that the model of its config lacks, such as transformer_blocks.3"
    ):
        load_initial(str(folder), CONFIG, NAMES)


def test_a_run_goes_on_from_a_trained_pipeline(tmp_path, tiny_flags):
    flags = [*tiny_flags, "--warmup_steps=0", "--checkpointing_steps=100"]
    train(*flags, "--max_train_steps=3", f"--output_dir={tmp_path}/first")
    # A step that moves nothing shows what it started from.
    train(
        *flags,
        "--max_train_steps=1",
        "--learning_rate=0",
        f"--init_from={tmp_path}/first",
        f"--output_dir={tmp_path}/second",
    )
    first, second = (
        load_file(tmp_path / name / "pipeline/transformer/diffusion_pytorch_model.safetensors")
        for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(SystemExit):
        train(*tiny_flags, f"--init_from={tmp_path}/first", f"--output_dir={tmp_path}/third")


def test_from_a_port_to_pictures_of_two_new_classes_in_one_command(tmp_path, tiny_flags):
    pytest.importorskip("peft")
    save_port(tmp_path / "port", published())
    for label in ("my cat", "my dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8), 40 * index + len(label)).save(tmp_path / "photos" / label / f"{index}.png")
    train(
        *tiny_flags,
        "--warmup_steps=0",
        "--alignment_weight=0",
        "--max_train_steps=1",
        "--lora_rank=2",
        f"--dataset_name={tmp_path}/photos",
        f"--init_from={tmp_path}/port",
        f"--output_dir={tmp_path}/run",
    )
    images = ERWPipeline.from_pretrained(tmp_path / "run/pipeline")(["my cat", "my dog"], num_inference_steps=1).images
    assert [image.size for image in images] == [(8, 8)] * 2
    assert (tmp_path / "run/grid.png").is_file()
    assert (tmp_path / "run/lora/class_embeddings.safetensors").is_file()
