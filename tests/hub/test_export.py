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
import subprocess
import sys

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
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
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
