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
"""The layout of a saved pipeline, loaded three ways, with and without this package."""

import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import REPOSITORY, TINY_MODEL, randomize

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler
from erw_hf.hub.export import export_to_hub


WITHOUT_PACKAGE = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "erw_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import numpy as np, torch
from diffusers import DiffusionPipeline
folder, out, again = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
assert type(pipe).__module__.startswith("diffusers_modules")
pipe.set_progress_bar_config(disable=True)
np.save(out, pipe(class_labels="cat", num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images)
pipe.save_pretrained(again)
assert not any(name.split(".")[0] == "erw_hf" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    transformer = randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()
    pipe = ERWPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler(), id2label={0: "dog", 1: "cat"})
    folder = tmp_path_factory.mktemp("export") / "repo"
    export_to_hub(pipe, folder)
    return folder, draw(pipe)


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels="cat", num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images


def test_layout(exported):
    folder, _ = exported
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "scheduler/scheduling_erw.py",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/transformer_erw.py",
    ]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ERWPipeline"
    assert index["transformer"] == ["transformer_erw", "ERWTransformer2DModel"]
    assert index["scheduler"] == ["scheduling_erw", "FlowMatchEulerMaruyamaScheduler"]


def test_loads_by_the_package_without_trust(exported):
    folder, expected = exported
    pipe = ERWPipeline.from_pretrained(folder)
    assert type(pipe.transformer) is ERWTransformer2DModel
    np.testing.assert_array_equal(draw(pipe), expected)
    np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(folder, transformer=pipe.transformer)), expected)
    model = ERWTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert torch.equal(model.proj_out.weight, pipe.transformer.proj_out.weight)


def test_loads_by_remote_code_where_the_package_is_installed_too(exported):
    folder, expected = exported
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    np.testing.assert_array_equal(draw(pipe), expected)


def test_loads_and_saves_again_where_the_package_cannot_be_imported(exported, tmp_path):
    folder, expected = exported
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), str(tmp_path / "out.npy"), str(tmp_path / "again")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
    # What remote code saved is as good a repo as the first.
    np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(tmp_path / "again")), expected)


def test_no_saved_file_names_the_folder_it_was_loaded_from(vae_path, tmp_path):
    from diffusers import AutoencoderKL

    transformer = ERWTransformer2DModel(**{**TINY_MODEL, "in_channels": 4})
    ERWPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler()).save_pretrained(tmp_path / "source")
    pipe = ERWPipeline.from_pretrained(tmp_path / "source", vae=AutoencoderKL.from_pretrained(vae_path))
    pipe.transformer.register_to_config(_name_or_path="user/digits")
    pipe.save_pretrained(tmp_path / "repo")
    configs = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "repo").rglob("*.json")}
    assert {"repo", "transformer", "vae", "scheduler"} == set(configs)
    names = {part: config["_name_or_path"] for part, config in configs.items() if "_name_or_path" in config}
    assert names == {"transformer": "user/digits"}


def test_what_is_shipped_names_no_folder_of_a_machine():
    texts = [path.read_text() for path in (REPOSITORY / "pipelines").rglob("*.json")]
    assert texts and not any(f'"{root}' in text for text in texts for root in ("/", "~"))


def test_autoguidance_component_and_diffusers_schedulers_are_saved_too(exported, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = ERWPipeline.from_pretrained(exported[0])
    pipe.register_modules(guidance_transformer=pipe.transformer, scheduler=FlowMatchEulerDiscreteScheduler())
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "repo")
    index = json.loads((tmp_path / "repo" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["guidance_transformer"] == ["transformer_erw", "ERWTransformer2DModel"]
    np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(tmp_path / "repo")), expected)


# What saving leaves


def save(pipe, folder, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder, **kwargs)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def pipeline(seed=0, scheduler=None, **config):
    transformer = randomize(ERWTransformer2DModel(**{**TINY_MODEL, **config}), seed).eval()
    return ERWPipeline(
        transformer, None, scheduler or FlowMatchEulerMaruyamaScheduler(), id2label={0: "dog", 1: "cat"}
    )


def test_saving_leaves_only_what_it_saved(tmp_path, vae_path):
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    vae = AutoencoderKL.from_pretrained(vae_path)
    folder, last = tmp_path / "repo", pipeline(3, FlowMatchEulerDiscreteScheduler())
    first = pipeline(1, in_channels=4)
    first.register_modules(vae=vae, guidance_transformer=pipeline(2, in_channels=4).transformer)
    assert len(save(first, folder, max_shard_size="20KB")) > 12
    (folder / "README.md").write_text("mine")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"of long ago")
    assert save(last, folder) == save(last, tmp_path / "fresh") | {"README.md"}
    np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(folder)), draw(last))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"max_shard_size": "20KB"}, {}),
        ({}, {"max_shard_size": "20KB"}),
        ({"max_shard_size": "10KB"}, {"max_shard_size": "30KB"}),
        ({"safe_serialization": False}, {}),
        ({}, {"safe_serialization": False}),
        ({"variant": "fp16", "max_shard_size": "20KB"}, {}),
    ],
)
def test_the_last_save_is_what_loads(tmp_path, first, second):
    pipeline(1).save_pretrained(tmp_path / "repo", **first)
    last = pipeline(2)
    assert save(last, tmp_path / "repo", **second) == save(last, tmp_path / "fresh", **second)
    np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(tmp_path / "repo")), draw(last))


def test_a_variant_is_put_beside_the_others(tmp_path):
    plain, half = pipeline(1), pipeline(2)
    plain.save_pretrained(tmp_path)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    half.save_pretrained(tmp_path, variant="fp16")
    for pipe, variant in ((plain, None), (half, "fp16")):
        np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(tmp_path, variant=variant)), draw(pipe))
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) == 2


def test_a_pipeline_can_be_saved_where_it_was_loaded_from(tmp_path):
    expected = draw(pipeline(1))
    pipeline(1).save_pretrained(tmp_path)
    for _ in range(2):
        loaded = ERWPipeline.from_pretrained(tmp_path)
        loaded.save_pretrained(tmp_path)
        np.testing.assert_array_equal(draw(loaded), expected)
    np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(tmp_path)), expected)


def test_saving_over_links_writes_files_and_leaves_what_they_link_to(tmp_path):
    folder = tmp_path / "repo"
    pipeline(1).save_pretrained(folder)
    own = tmp_path / "own.py"
    own.write_text("mine")
    for name in ("pipeline.py", "transformer/transformer_erw.py"):
        (folder / name).unlink()
        (folder / name).symlink_to(own)
    pipeline(2).save_pretrained(folder)
    assert own.read_text() == "mine" and not any(path.is_symlink() for path in folder.rglob("*"))


# What does not load again is not saved


def refused(pipe, folder, message):
    with pytest.raises(ValueError, match=message):
        pipe.save_pretrained(folder)
    assert not folder.exists()


def with_lora():
    from peft import LoraConfig

    pipe = pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return pipe


def test_adapters_are_refused_until_they_are_merged(tmp_path):
    pipe = with_lora()
    refused(pipe, tmp_path / "repo", r"would not load again.*pipe.fuse_lora\(\); pipe.unload_lora_weights\(\)")
    pipe.fuse_lora()
    refused(pipe, tmp_path / "repo", "unload_lora")
    expected = draw(pipe)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "repo")
    np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(tmp_path / "repo")), expected)
    guided = pipeline()
    guided.register_modules(guidance_transformer=with_lora().transformer)
    refused(guided, tmp_path / "guided", "pipe.guidance_transformer.fuse_lora")


def test_several_bin_files_are_refused_since_diffusers_does_not_find_them(tmp_path):
    pipe, folder = pipeline(), tmp_path / "repo"
    pipe.save_pretrained(folder, safe_serialization=False)  # one loads
    before = sorted(folder.rglob("*"))
    ERWPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="omit safe_serialization=False, or set a larger max_shard_size"):
        pipe.save_pretrained(folder, safe_serialization=False, max_shard_size="10KB")
    assert sorted(folder.rglob("*")) == before


def test_wrapped_models_are_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    pipe = pipeline()
    plain = pipe.transformer
    pipe.transformer = get_peft_model(pipeline().transformer, LoraConfig(target_modules=["to_q"]))
    refused(pipe, tmp_path / "repo", "the transformer is a PeftModel.*merge_and_unload")
    pipe.transformer = pipe.transformer.merge_and_unload()
    pipe.save_pretrained(tmp_path / "merged")
    pipe.transformer = torch.nn.DataParallel(plain)
    refused(pipe, tmp_path / "repo", "the transformer is a DataParallel.*unwrap it")
    pipe.transformer = pipeline().transformer
    pipe.transformer.transformer_blocks[1] = torch.nn.DataParallel(pipe.transformer.transformer_blocks[1])
    refused(pipe, tmp_path / "repo", "module")
    pipe.transformer = pipeline().transformer
    pipe.transformer.transformer_blocks[1] = torch.compile(pipe.transformer.transformer_blocks[1])
    refused(pipe, tmp_path / "repo", "compile in place")
    pipe.transformer = pipeline().transformer
    pipe.transformer.fuse_qkv_projections()
    refused(pipe, tmp_path / "repo", "unfuse_qkv_projections")
    pipe.transformer.unfuse_qkv_projections()
    pipe.save_pretrained(tmp_path / "unfused")
    pipe.transformer = torch.compile(pipe.transformer)  # what diffusers unwraps
    pipe.save_pretrained(tmp_path / "compiled")
    np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(tmp_path / "compiled")), draw(pipeline()))


class Packed(torch.nn.Linear):
    def get_extra_state(self):  # as torch's quantized layers, whose state is not all tensors
        return torch.qint8


def test_incomplete_pipelines_and_files_for_folders_are_refused(tmp_path):
    pipe = pipeline()
    pipe.transformer.proj_out = Packed(16, 4)
    refused(pipe, tmp_path / "repo", "the transformer would not load again")
    refused(ERWPipeline(pipeline().transformer, None, None), tmp_path / "repo", "without a scheduler")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        pipeline().save_pretrained(tmp_path / "file")


def test_what_is_pushed_is_what_is_saved(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(ERWPipeline, "push_to_hub", lambda self, repo_id, **kwargs: pushed.append((repo_id, kwargs)))
    monkeypatch.chdir(tmp_path)
    pipeline().save_pretrained(".", push_to_hub=True, variant="fp16", max_shard_size="1GB", create_pr=True)
    assert pushed == [(tmp_path.name, {"variant": "fp16", "create_pr": True})]
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").is_file()


def test_what_is_put_into_an_empty_slot_is_saved(tmp_path, vae_path):
    from diffusers import AutoencoderKL

    pipe = pipeline(1, in_channels=4)
    assert pipe.vae_scale_factor == 1
    pipe.vae, pipe.guidance_transformer = (
        AutoencoderKL.from_pretrained(vae_path),
        pipeline(2, in_channels=4).transformer,
    )
    assert pipe.vae_scale_factor == 2
    pipe.vae, pipe.vae = None, pipe.vae
    pipe.save_pretrained(tmp_path)
    loaded = ERWPipeline.from_pretrained(tmp_path)
    assert loaded.vae is not None and loaded.guidance_transformer is not None
    np.testing.assert_array_equal(draw(loaded), draw(pipe))


def test_mistyped_paths_and_variants(tmp_path):
    for path in (tmp_path / "missing", "./missing", "~/missing"):
        with pytest.raises(OSError, match="there is no pipeline .*missing"):
            ERWPipeline.from_pretrained(path)
    for variant in ("", "a/b", "fp 16"):
        with pytest.raises(ValueError, match="a part of file names"):
            pipeline().save_pretrained(tmp_path / "repo", variant=variant)
    assert not (tmp_path / "repo").exists()


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_saving_leaves_the_files_of_others(tmp_path):
    mine = ["notes.txt", "transformer/my_code.py", "vae/notes.txt", "data/img.png"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for seed in (1, 2):  # the second time over the first
        pipeline(seed).save_pretrained(tmp_path)
        assert all((tmp_path / name).read_text() == "mine" for name in mine)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"model_index.json": '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"]}'},
            "a StableDiffusion",
        ),
        ({"model_index.json": '{"vae": ["a", "b"], "data": ["x", "y"]}', "data/a.png": ""}, "holds a None"),
        ({"pipeline.py": "import this"}, "pipeline.py is not of a pipeline of erw_hf"),
    ],
)
def test_folders_of_other_kinds_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=message):
        pipeline().save_pretrained(tmp_path)
    assert files_of(tmp_path) == before


def test_a_variant_of_another_model_is_refused(tmp_path):
    pipeline(1).save_pretrained(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="of a model with another config"):
        pipeline(1, prediction_type="sample").save_pretrained(tmp_path, variant="fp16")
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"max_shard_size": "20KB"}, {}),
        ({}, {"safe_serialization": False}),
        ({"max_shard_size": "20KB"}, {"safe_serialization": False}),
        ({"variant": "fp16", "max_shard_size": "20KB"}, {"variant": "fp16"}),
    ],
)
def test_of_a_transformer_too_the_last_save_is_what_loads(tmp_path, first, second):
    old, new = pipeline(1).transformer, pipeline(2).transformer
    new.save_pretrained(tmp_path, variant="other")
    old.save_pretrained(tmp_path, **first)
    new.save_pretrained(tmp_path, **second)
    loaded = ERWTransformer2DModel.from_pretrained(tmp_path, variant=second.get("variant"))
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert len(list(tmp_path.iterdir())) == 3  # with the config and the other variant
    with pytest.raises(ValueError, match="omit safe_serialization=False"):
        new.save_pretrained(tmp_path / "sharded", safe_serialization=False, max_shard_size="10KB")
    assert not (tmp_path / "sharded").exists()


# What is yours is not published


class OwnScheduler(FlowMatchEulerMaruyamaScheduler):
    pass


class OwnTransformer(ERWTransformer2DModel):
    pass


class OwnPipeline(ERWPipeline):
    pass


def test_classes_of_ones_own_are_refused(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    in_repl = type("Mine", (FlowMatchEulerDiscreteScheduler,), {"__module__": "__main__"})
    for scheduler in (OwnScheduler(), in_repl()):
        refused(
            pipeline(scheduler=scheduler),
            tmp_path / "repo",
            f"the scheduler is of .*{type(scheduler).__name__}: saving",
        )
    pipe = pipeline()
    pipe.transformer = OwnTransformer(**TINY_MODEL)
    refused(pipe, tmp_path / "repo", "the transformer is of test_export.OwnTransformer")
    mine = OwnPipeline.from_pipe(pipeline())
    refused(mine, tmp_path / "repo", r"OwnPipeline is your own pipeline.*ERWPipeline.from_pipe\(pipe\)")
    ERWPipeline.from_pipe(mine).save_pretrained(tmp_path / "repo")
    np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(tmp_path / "repo")), draw(pipeline()))
    pushed = pipeline(scheduler=OwnScheduler())
    with pytest.raises(ValueError, match="OwnScheduler"):
        pushed.push_to_hub("user/model")


def test_a_class_of_the_repo_that_it_was_loaded_from_goes_along(exported, tmp_path):
    folder = tmp_path / "repo"
    pipeline().save_pretrained(folder)
    source = folder / "scheduler" / "scheduling_erw.py"
    source.write_text(source.read_text() + "\n\nclass Theirs(FlowMatchEulerMaruyamaScheduler):\n    pass\n")
    source.rename(folder / "scheduler" / "theirs.py")
    for path in (folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"):
        text = path.read_text().replace("FlowMatchEulerMaruyamaScheduler", "Theirs")
        path.write_text(text.replace('"scheduling_erw"', '"theirs"'))
    pipe = ERWPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "scheduler" / "theirs.py").read_text() == (
        folder / "scheduler" / "theirs.py"
    ).read_text()


def by_remote_code(folder):
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)


def test_two_pipelines_of_remote_code_keep_apart(exported, tmp_path):
    """diffusers executes the files of the second in the module of the first."""
    repos = {name: tmp_path / name for name in ("one", "two")}
    for name, repo in repos.items():
        shutil.copytree(exported[0], repo)
        for file in ("pipeline.py", "transformer/transformer_erw.py", "scheduler/scheduling_erw.py"):
            text = (repo / file).read_text()  # not through the links to this package
            (repo / file).unlink()
            (repo / file).write_text(f"{text}\n# {name}\n")
    one, two = by_remote_code(repos["one"]), by_remote_code(repos["two"])
    np.testing.assert_array_equal(draw(one), exported[1])

    def load_another(pipe, index, timestep, kwargs):
        by_remote_code(repos["two"])
        return kwargs

    arguments = {"num_inference_steps": 3, "generator": torch.manual_seed(0), "output_type": "np"}
    images = one("cat", **arguments, callback_on_step_end=load_another).images
    np.testing.assert_array_equal(images, exported[1])
    one._own_classes = (torch.zeros(1), {})
    assert type(two).from_pipe(one)._own_classes is one._own_classes
    for name, pipe in (("one", one), ("two", two)):
        pipe.save_pretrained(tmp_path / "saved")
        for file in ("pipeline.py", "transformer/transformer_erw.py", "scheduler/scheduling_erw.py"):
            assert (tmp_path / "saved" / file).read_text().endswith(f"# {name}\n")


def test_a_repos_own_pipeline_and_older_code_are_saved_as_they_are(exported, tmp_path):
    own, old = tmp_path / "own", tmp_path / "old"
    for repo in (own, old):
        shutil.copytree(exported[0], repo)
    (own / "pipeline.py").unlink()
    (own / "pipeline.py").write_text(
        "import erw_hf.pipeline_erw as base\n\nclass MyPipeline(base.ERWPipeline):\n    MARK = 1\n"
    )
    index = json.loads((own / "model_index.json").read_text())
    (own / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "MyPipeline"]}))
    for file in ("pipeline.py", "transformer/transformer_erw.py"):  # of a version that did not keep its source
        text = "".join(line for line in (old / file).read_text().splitlines(True) if "_source = Path" not in line)
        (old / file).unlink()
        (old / file).write_text(text)
    for repo in (own, old):
        sys.modules.pop("diffusers_modules.local.pipeline", None)  # which keeps the classes of other repos
        by_remote_code(repo).save_pretrained(tmp_path / "saved")
        for file in ("pipeline.py", "transformer/transformer_erw.py"):
            assert (tmp_path / "saved" / file).read_text() == (repo / file).read_text()
        shutil.rmtree(tmp_path / "saved")


def test_a_push_that_fails_leaves_the_folder(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", fail)
    pipe = pipeline()
    with pytest.raises(OSError, match="no network"):
        pipe.save_pretrained(tmp_path / "repo", push_to_hub=True, repo_id="user/model")
    np.testing.assert_array_equal(draw(ERWPipeline.from_pretrained(tmp_path / "repo")), draw(pipe))


def test_saving_leaves_the_modules_of_other_threads_alone(tmp_path, monkeypatch):
    made, from_config = [], ERWTransformer2DModel.from_config

    def meanwhile(*args, **kwargs):
        thread = threading.Thread(target=lambda: made.append(torch.nn.Linear(2, 2).weight.device.type))
        thread.start()
        thread.join()
        return from_config(*args, **kwargs)

    monkeypatch.setattr(ERWTransformer2DModel, "from_config", meanwhile)
    pipeline().save_pretrained(tmp_path / "repo")
    assert made == ["cpu"]


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_weights_that_are_elsewhere_or_rounded_are_not_saved(tmp_path, offload_type):
    on_disk = pipeline()
    options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    on_disk.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        offload_to_disk_path=str(tmp_path / "disk"),
        **options,
    )
    refused(on_disk, tmp_path / "repo", "offloaded to a disk.*save before enable_group_offload")
    cast = pipeline()
    cast.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    refused(cast, tmp_path / "repo", "in torch.float8_e4m3fn.*save before enable_layerwise_casting")


def test_what_is_linked_is_uploaded_as_files():
    from huggingface_hub import HfApi

    additions = HfApi()._prepare_upload_folder_additions(
        REPOSITORY / "pipelines" / "erw-digits",
        path_in_repo="",
        repo_type="model",
        token=False,
        ignore_patterns=["README.md"],
    )
    contents = {addition.path_in_repo: addition.path_or_fileobj for addition in additions}
    assert {"pipeline.py", "scheduler/scheduling_erw.py", "transformer/transformer_erw.py"} <= set(contents)
    with open(contents["pipeline.py"]) as file:
        assert "class ERWPipeline" in file.read()
