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
import importlib

import pytest
from helpers import run_script, train

from erw_hf.names import expand_path, may_be_hub_id, resolve_name, resolve_pipeline
from erw_hf.trainer.config import PATH_OR_ID, TrainingConfig


@pytest.mark.parametrize("key", sorted(set(PATH_OR_ID) - {"dataset_name"}))
@pytest.mark.parametrize("name", ["./nope", "/data/nope", "outputs/run/nope", "../nope.pt"])
def test_a_mistyped_path_of_any_key_is_said_before_the_hub_is_asked(key, name):
    with pytest.raises(FileNotFoundError, match=f"{key}='{name}': there is no (folder|file) /"):
        TrainingConfig(in_channels=1, **{key: name}).check_names()


def test_names_that_may_be_on_the_hub_or_are_there_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "vae").mkdir()
    (tmp_path / "weights.pt").touch()
    for name in ("gpt2", "stabilityai/sd-vae-ft-ema", "digits", "inception", "hf://datasets/a/b", str(tmp_path)):
        assert resolve_name(name, "vae") == name
    assert resolve_name("~/vae", "vae") == resolve_name("$HOME/vae", "vae") == f"{tmp_path}/vae"
    assert resolve_name("~/weights.pt", "warmup_from") == f"{tmp_path}/weights.pt"
    with pytest.raises(FileNotFoundError, match="did you mean .*/vae"):
        resolve_name("~/vaee", "vae")
    with pytest.raises(ValueError, match=r"names \$NOPE, which is not set"):
        expand_path("$NOPE/x")
    monkeypatch.chdir(tmp_path)
    assert not may_be_hub_id("vae/ft") and may_be_hub_id("other/ft")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        resolve_name("vae/ft", "vae")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("cache_latents", ["--dataset_name=digits", "--output_dir=~/out", "--vae=~/nope"]),
        ("cache_latents", ["--dataset_name=~/nope", "--output_dir=~/out", "--vae=a/b"]),
        ("evaluate", ["--reference=r.npz", "--output_dir=~/out", "--model=~/nope"]),
        ("evaluate", ["--reference=~/nope", "--output_dir=~/out", "--model=a/b"]),
        ("evaluate", ["--reference=r.npz", "--output_dir=~/out", "--model=a/b", "--extractor=$HOME/nope"]),
        (
            "evaluate",
            ["--reference=r.npz", "--output_dir=~/out", "--model=a/b", "--representations", "mae_cls=~/nope"],
        ),
        ("train_classifier", ["--dataset_name=~/nope"]),
        ("train_tiny_encoder", ["--teacher=~/nope"]),
        ("probe", ["--dataset_name=digits", "--output_dir=~/out", "--model=~/nope"]),
        ("probe", ["--dataset_name=digits", "--output_dir=~/out", "--model=a/b", "--encoder=~/nope"]),
    ],
)
def test_the_scripts_read_paths_as_the_trainer_does(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        run_script(script, *flags)
    assert f"there is no folder {tmp_path}/nope" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_pipeline_of_a_run_is_found_and_a_folder_without_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("run/pipeline", "alone"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model_index.json").touch()
    assert (
        resolve_pipeline("~/run", "--model")
        == resolve_pipeline("~/run/pipeline", "--model")
        == f"{tmp_path}/run/pipeline"
    )
    assert (
        resolve_pipeline("$HOME/alone", "--model") == f"{tmp_path}/alone"
        and resolve_pipeline("a/b", "--model") == "a/b"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no model_index.json in .*/empty or its folder `pipeline`"):
        resolve_pipeline("~/empty", "--model")


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("hub.convert", ["--checkpoint=~/nope.pt", "--output_dir=~/out"], "{}/nope.pt"),
        ("hub.push", ["~/nope"], "{}/nope is neither"),
        ("evaluation.compare", ["~/a.json", "~/b.json"], "{}/a.json"),
        ("trainer.ema", ["~/nope", "--sigma_rel=0.1", "--output_dir=$NOPE/out"], "names $NOPE"),
    ],
)
def test_the_commands_expand_paths_too(module, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", [module, *flags])
    with pytest.raises(SystemExit):
        importlib.import_module(f"erw_hf.{module}").main()
    assert message.format(tmp_path) in capsys.readouterr().err


def test_a_run_looks_for_its_models_first(tiny_flags, tmp_path):
    with pytest.raises(FileNotFoundError, match="vae='./nope'"):
        train(*tiny_flags, f"--output_dir={tmp_path}/run", "--vae=./nope")
    assert not list(tmp_path.iterdir())
