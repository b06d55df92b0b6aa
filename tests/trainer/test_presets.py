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
"""Every preset is a recipe card that starts and trains, with its dimensions shrunk by flags alone."""

import re

import pytest
import torch
import yaml
from helpers import REPOSITORY, train
from transformers import Dinov2Config

from erw_hf import ERWPipeline
from erw_hf.trainer import cost
from erw_hf.trainer.config import TrainingConfig, parse_config
from erw_hf.trainer.cost import cost_report
from erw_hf.trainer.run_record import read_metrics


CONFIGS = REPOSITORY / "training" / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def dinov2_base(tmp_path_factory):
    """DINOv2-B's shape, without weights."""
    folder = tmp_path_factory.mktemp("dinov2-base")
    Dinov2Config(hidden_size=768, num_attention_heads=12, patch_size=14, image_size=518).save_pretrained(folder)
    return folder


def test_the_start_from_an_encoder_and_its_control_cost_the_same(vae_path, dinov2_base):
    path = CONFIGS / "imagenet256-encoder-start.yaml"
    control = re.search(r"#     (--start_from_encoder 0 .*?) --output_dir", path.read_text())[1].split()
    flags = [
        f"--config={path}",
        "--dataset_name=digits",
        "--num_classes=10",
        f"--vae={vae_path}",
        f"--encoder={dinov2_base}",
    ]
    reports = [cost_report(parse_config([*flags, *more])) for more in ([], control)]
    costs = [float(re.search(r"FLOPs in all +([\d.e+]+)", report)[1]) for report in reports]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)
    assert "the first 4 blocks of" in reports[0] and "the first" not in reports[1]
    assert [parse_config([*flags, *more]).activation_fn for more in ([], control)] == ["gelu", "gelu"]


def size_flags(preset: str) -> dict[str, list[str]]:
    """What the header says to add for each size; none for the one that the file has."""
    text = (CONFIGS / f"{preset}.yaml").read_text()
    found = {yaml.safe_load(text).get("model"): []}
    for line in re.findall(r"^#   (--model [^#\n]+)", text, flags=re.M):
        found[line.split()[1]] = line.split()
    return found


SIZED = [(preset, model, flags) for preset in PRESETS for model, flags in size_flags(preset).items()]


def test_the_presets_that_are_promised_exist():
    recipes = {f"imagenet256-{kind}" for kind in ("erw-paper", "erw-code", "repa", "sit", "modern")}
    spaces = {"imagenet256-pixel": {"SiT-B/16", "SiT-L/16"}, "imagenet256-rae": {"SiT-B/1", "SiT-L/1", "SiT-XL/1"}}
    assert {*recipes, *spaces, "imagenet512-erw", "imagenet256-encoder-start", "digits", "emoji", "pixels"} == set(
        PRESETS
    )
    for recipe, sizes in spaces.items():
        assert set(size_flags(recipe)) == sizes
    for recipe in recipes:
        assert set(size_flags(recipe)) == {"SiT-B/2", "SiT-L/2", "SiT-XL/2"}


@pytest.mark.parametrize(
    ("recipe", "model", "expected"),  # warmup_depth, projector_depth, alignment_weight, millions of parameters
    [
        ("erw-paper", "SiT-XL/2", (5, 18, 0.5)), ("erw-paper", "SiT-L/2", (4, 15, 0.5)), ("erw-paper", "SiT-B/2", (8, 8, 0.5)),
        ("erw-code", "SiT-XL/2", (4, 14, 6.0)), ("erw-code", "SiT-L/2", (4, 14, 3.0)), ("erw-code", "SiT-B/2", (4, 8, 1.0)),
        ("modern", "SiT-XL/2", (5, 8, 0.5)), ("modern", "SiT-L/2", (4, 8, 0.5)), ("modern", "SiT-B/2", (8, 4, 0.5)),
        ("repa", "SiT-XL/2", (5, 8, 0.5)), ("repa", "SiT-L/2", (5, 8, 0.5)), ("repa", "SiT-B/2", (5, 4, 0.5)),
        ("sit", "SiT-XL/2", (5, 8, 0.0)), ("sit", "SiT-L/2", (5, 8, 0.0)), ("sit", "SiT-B/2", (5, 8, 0.0)),
    ],
)  # fmt: skip
def test_what_a_size_changes_of_a_recipe(recipe, model, expected):
    path = CONFIGS / f"imagenet256-{recipe}.yaml"
    config = parse_config([f"--config={path}", *size_flags(f"imagenet256-{recipe}")[model]])
    assert config.model == model
    assert (config.warmup_depth, config.projector_depth, config.alignment_weight) == expected
    assert (config.ema_decay, config.ema_ramp) == (0.9999, False)  # as published


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_trains_three_steps_of_each_phase(preset, small, tmp_path):
    config = f"--config={CONFIGS / preset}.yaml"
    has_warmup = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text()).get("warmup_steps", 0) > 0
    steps = ["--warmup_steps=3", "--max_train_steps=6"] if has_warmup else ["--warmup_steps=0", "--max_train_steps=3"]
    train(config, *small(preset), *steps, f"--output_dir={tmp_path}/run")
    phases = [record["phase"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert phases == ["warmup"] * 3 * has_warmup + ["full"] * 3


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_a_recipe_card(preset):
    text = (CONFIGS / f"{preset}.yaml").read_text()
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert f"training/configs/{preset}.yaml" in header or preset == "digits" and "make quickstart" in header
    if preset not in {"digits", "emoji"}:
        assert "Not run by us" in header and "--dry_run" in header
        assert re.search(r"Expect|argued guess", header)


@pytest.mark.parametrize(("preset", "model", "size"), SIZED)
def test_dry_run_costs_every_preset_without_its_data(preset, model, size, small, dinov2_base, capsys, monkeypatch):
    """The model's own dimensions, a tiny encoder (or DINOv2-B's shape) and the digits in place of what lies on the Hub."""
    monkeypatch.setattr(cost, "count_step_flops", lambda model, encoders: 10**12)  # counted in the next test
    keep = {"num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "patch_size", "warmup_depth",
            "projector_depth", "projector_dim"}  # fmt: skip
    flags = [flag for flag in small(preset) if flag[2:].split("=")[0] not in keep]
    if preset == "imagenet256-encoder-start":
        flags += [f"--encoder={dinov2_base}", "--start_from_encoder=4"]
    train(f"--config={CONFIGS / preset}.yaml", *flags, *size, "--dry_run")
    report = capsys.readouterr().out
    assert "FLOPs of a full step" in report and "GPU-hours" in report and "No problem was found" in report
    if model is not None:
        millions = float(re.search(r"transformer +([\d.]+) M", report)[1])
        low, high = {"S": (30, 35), "B": (125, 135), "L": (450, 465), "XL": (660, 690)}[
            model.split("-")[1].split("/")[0]
        ]
        assert low < millions < high


@pytest.fixture(scope="module")
def rae_path(tmp_path_factory):
    """An AutoencoderRAE of 64 channels on 2x2 cells of 4 px, which carries its statistics."""
    from diffusers import AutoencoderRAE

    folder = tmp_path_factory.mktemp("rae")
    torch.manual_seed(0)
    AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_input_size=28, encoder_patch_size=14, patch_size=4,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16,
        image_size=8, latents_mean=torch.zeros(64, 1, 1), latents_std=torch.full((64, 1, 1), 0.5),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_the_recipe_of_representation_latents_runs_on_one(small, rae_path, tmp_path, capsys):
    """From the images to a pipeline that draws, its shift by the dimension, its width checked, its cost in their space."""
    of_rae = ["--sample_size=2", "--patch_size=1", "--in_channels=64", "--attention_head_dim=32", f"--vae={rae_path}"]
    flags = [f"--config={CONFIGS}/imagenet256-rae.yaml", *small("imagenet256-rae"), *of_rae]
    train(*flags, "--dry_run")
    assert re.search(r"8x8 px, 3 channels; latents 64x2x2\n", capsys.readouterr().out)
    train(*flags, "--max_train_steps=3", f"--output_dir={tmp_path}/run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["timestep_shift"] == 0.25  # sqrt(256 / 4096)
    pipe = ERWPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipe.vae).__name__ == "AutoencoderRAE"
    assert pipe(3, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)
    with pytest.raises(SystemExit):
        train(*flags, "--attention_head_dim=8", "--dry_run")
    assert "a patch holds 64 numbers and the model is 16 wide" in capsys.readouterr().err


def test_every_key_has_a_help_text():
    for name, field in TrainingConfig.__dataclass_fields__.items():
        assert field.metadata["help"].endswith((".", "float32.")), name
