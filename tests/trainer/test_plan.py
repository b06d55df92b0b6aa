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
"""The plan: from a card and hours to a configuration."""

from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY, train
from PIL import Image

from erw_hf.trainer.config import TrainingConfig, given_values, parse_config
from erw_hf.trainer.cost import MFU, run_cost, run_memory, summarize_data
from erw_hf.trainer.flops import CARDS, card_named
from erw_hf.trainer.plan import ROOM, write_plan


@pytest.fixture(scope="module")
def photos(tmp_path_factory, vae_path):
    folder = tmp_path_factory.mktemp("data") / "photos"
    for label in ("my cat", "my dog"):
        (folder / label).mkdir(parents=True)
        for index in range(40):
            Image.new("RGB", (8, 8), (5 * index, 0, 0)).save(folder / label / f"{index}.png")
    return [f"--dataset_name={folder}", f"--vae={vae_path}"]


@pytest.mark.parametrize(
    ("card", "flags"),
    [
        ("rtx4090", ["--hours=0.01"]),
        ("RTX 3090", ["--hours=3", "--model=SiT-L/2", "--train_batch_size=256"]),
        ("t4", ["--hours=2", "--model=SiT-B/2", "--init_from=x", "--lora_rank=16"]),
    ],
)
def test_a_plan_fits_the_card_and_the_time_and_is_a_config(photos, tmp_path, monkeypatch, card, flags):
    monkeypatch.setattr("erw_hf.trainer.config.TrainingConfig.check_names", lambda self: None)
    text = write_plan(given_values(["--plan", f"--gpu={card}", *photos, *flags]), time_steps=None)
    (tmp_path / "mine.yaml").write_text(text)
    config, card = parse_config([f"--config={tmp_path}/mine.yaml"]), CARDS[card_named(card)]
    assert not config.plan and config.gpu is None
    data = summarize_data(config)
    cost = run_cost(config, data)
    assert sum(run_memory(config, cost, data).values()) <= ROOM * card.memory * 1e9
    hours = float(flags[0].split("=")[1])
    assert cost.total_flops / (card.flops * MFU) / 3600 == pytest.approx(hours, rel=0.35)
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert len(comments) >= 5 and "modelled" in comments[2] and "modelled" in comments[3]
    if "--train_batch_size=256" in flags:
        assert config.step_batch_size(1) == 256 and config.train_batch_size < 256


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu=rtx9999", "--hours=1"], "rtx9999.*RTX 4090.*or cpu"),
        (["--gpu=rtx4090"], "--plan needs --gpu"),
        (["--gpu=rtx4090", "--hours=1", "--mixed_precision=no"], "bf16 and fp16 alone"),
        (["--gpu=rtx4090", "--hours=1e-6"], "only 0 full steps .* allow"),
        (["--gpu=rtx4090", "--hours=1e-3", "--lr_warmup_steps=100000"], "set lr_warmup_steps, which is 100000, lower"),
    ],
)
def test_what_cannot_be_planned_is_said(photos, flags, message):
    with pytest.raises(ValueError, match=message):
        write_plan(given_values(["--plan", *photos, *flags]), time_steps=None)


def test_the_hours_count_what_the_user_set(photos):
    def plan(*flags):
        flags = ["--plan", "--gpu=rtx4090", "--hours=1", "--model=SiT-B/2", "--warmup_steps=0", *photos, *flags]
        return yaml.safe_load(write_plan(given_values(flags), time_steps=None))

    plain, recomputed, given = plan(), plan("--gradient_checkpointing=true"), plan("--activation_memory_budget=0.5")
    assert plain["max_train_steps"] / recomputed["max_train_steps"] == pytest.approx(4 / 3, rel=1e-3)
    assert plain["max_train_steps"] / given["max_train_steps"] == pytest.approx(1.1, rel=1e-3)
    assert given["activation_memory_budget"] == 0.5
    assert (
        plan("--gradient_checkpointing=false", "--gpu=rtx3090", "--model=SiT-L/2")["gradient_checkpointing"] is False
    )


def test_accumulation_keeps_a_batch_that_is_no_power_of_two(photos):
    flags = ["--plan", "--gpu=rtx3090", "--hours=9", "--model=SiT-L/2", "--train_batch_size=150", *photos]
    values = yaml.safe_load(write_plan(given_values(flags), time_steps=None))
    assert values["train_batch_size"] < 150
    assert values["train_batch_size"] * values["gradient_accumulation_steps"] == 150


def test_a_pipeline_that_is_fine_tuned_says_what_its_model_is(photos, tmp_path, monkeypatch):
    base = str(REPOSITORY / "pipelines" / "erw-emoji")
    flags = ["--plan", "--gpu=rtx4090", "--hours=1", f"--init_from={base}", "--lora_rank=4"]
    monkeypatch.chdir(Path(photos[0].split("=")[1]).parent)
    plan = write_plan(
        given_values([*flags, f"--dataset_name=./{Path(photos[0].split('=')[1]).name}"]), time_steps=None
    )
    values = yaml.safe_load(plan)
    assert (values["sample_size"], values["in_channels"], values["prediction_type"]) == (64, 3, "sample")
    assert "vae" not in values and values["dataset_name"] == photos[0].split("=")[1]  # it may be moved
    TrainingConfig(**values)


def test_a_card_without_a_plan_is_refused():
    with pytest.raises(ValueError, match="add --plan"):
        TrainingConfig(in_channels=1, gpu="rtx4090", hours=1)


def test_on_a_cpu_the_plan_times_some_steps(tiny_flags, tmp_path, capsys):
    train(*tiny_flags, "--plan", "--gpu=cpu", "--hours=0.05", "--evaluation_steps=1", "--patience=2")
    text = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(text)
    assert "measured" in text and text.startswith("# A plan for 0.05 h on this machine's CPU")
    config = parse_config([f"--config={tmp_path}/mine.yaml"])
    seconds = float(text.split("measured: ")[1].split(" s ")[0])
    assert config.warmup_steps == 3 and config.max_train_steps - 3 == pytest.approx(180 / seconds, rel=0.1)
