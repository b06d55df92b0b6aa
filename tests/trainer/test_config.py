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
"""Keys of a run: how YAML files and flags are read, which values are refused, what `model` stands for."""

import dataclasses
import math

import pytest
import torch
import yaml
from helpers import REPOSITORY

from erw_hf.sizes import SIZES, size_config, size_name
from erw_hf.trainer import device
from erw_hf.trainer.config import KEYS, PATH_OR_ID, TYPES, ModelConfig, TrainingConfig, local_names, parse_config
from erw_hf.trainer.device import choose_precision
from erw_hf.transformer_erw import ERWTransformer2DModel


PIXELS = "in_channels: 1\n"
NUMBERS = [name for name, hint in TYPES.items() if {int, float} & {hint, *getattr(hint, "__args__", ())}]


def parse_text(tmp_path, text, *flags):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else (PIXELS + text).encode())
    return parse_config([f"--config={path}", *flags])


def refused(call, capsys, *words):
    """It ends with the usage and one sentence that holds all words."""
    with pytest.raises(SystemExit):
        call()
    error = capsys.readouterr().err
    sentence = error.split("error: ")[1]
    assert "Traceback" not in error and sentence.count("\n") == 1
    for word in words:
        assert word in sentence
    return sentence


# --- Ranges


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range_that_holds_its_default_and_no_infinity(name):
    interval, default = KEYS[name].metadata["range"], KEYS[name].default
    assert interval is not None
    TrainingConfig(in_channels=1)  # all defaults but this
    low, high = (float(end) for end in interval[1:-1].split(","))
    kind = int if TYPES[name] in (int, int | None) else float
    outside = [math.nan, math.inf, -math.inf] if kind is float else []
    outside += [kind(low - 1)] if low > -math.inf else []
    outside += [kind(low)] if interval[0] == "(" and low > -math.inf else []
    outside += [kind(high + 1)] if high < math.inf else []
    outside += [kind(high)] if interval[-1] == ")" and high < math.inf and kind is float else []
    assert outside or default is None
    for value in outside:
        with pytest.raises(ValueError, match=rf"^{name} must (be at least|be greater than|lie in) "):
            TrainingConfig(**{"in_channels": 1, name: value})


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--max_grad_norm=-1", "max_grad_norm must be greater than 0, got -1.0"),
        ("--max_grad_norm=0", "max_grad_norm must be greater than 0"),
        ("--ema_decay=1.0", "ema_decay must lie in [0, 1)"),
        ("--ema_decay=9999", "ema_decay must lie in [0, 1)"),
        ("--ema_decay=-0.5", "ema_decay must lie in [0, 1)"),
        ("--validation_steps=-1", "validation_steps must be at least 0"),
        ("--num_validation_images=0", "num_validation_images must be at least 1"),
        ("--num_inference_steps=0", "num_inference_steps must be at least 1"),
        ("--seed=-1", "seed must lie in [0, 4294967295]"),
        ("--seed=4294967296", "seed must lie in [0, 4294967295]"),
        ("--adam_beta2=1.5", "adam_beta2 must lie in [0, 1)"),
        ("--learning_rate=nan", "learning_rate must lie in [0, inf), got nan"),
        ("--learning_rate=inf", "learning_rate must lie in [0, inf), got inf"),
        ("--timestep_logit_mean=-inf", "timestep_logit_mean must lie in (-inf, inf)"),
        ("--warmup_learning_rate=-1e-3", "warmup_learning_rate must be at least 0"),
        ("--checkpoints_total_limit=-1", "checkpoints_total_limit must be at least 1"),
        ("--checkpoints_total_limit=0", "checkpoints_total_limit must be at least 1"),
        ("--ema_sigma_rel=0.3", "ema_sigma_rel must lie in (0, 0.2886)"),
        ("--contrastive_weight=1", "contrastive_weight must lie in [0, 1)"),
        ("--alignment_half_life=0", "alignment_half_life must be at least 1"),
        ("--patch_size=0", "patch_size must be at least 1"),
    ],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_impossible_numbers_are_refused_with_the_range(capsys, flag, words, dry_run):
    refused(
        lambda: parse_config(["--in_channels=1", flag, *dry_run]),
        capsys,
        words,
        KEYS[flag[2:].split("=")[0]].metadata["help"][:10],
    )


def test_a_rising_learning_rate_has_to_reach_its_peak_in_each_phase():
    phases = {"in_channels": 1, "encoder": "e", "warmup_steps": 10, "max_train_steps": 14}
    TrainingConfig(**phases, lr_warmup_steps=4)
    with pytest.raises(ValueError, match="lr_warmup_steps=5 must be at most the 4 steps of full training"):
        TrainingConfig(**phases, lr_warmup_steps=5)
    with pytest.raises(ValueError, match="at most the 10 steps of the warmup"):
        TrainingConfig(**phases | {"max_train_steps": 99}, lr_warmup_steps=11)
    TrainingConfig(**phases | {"max_train_steps": 10}, lr_warmup_steps=10)  # a warmup alone


# --- YAML


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("learning_rate: '1e-4'", "learning_rate", 1e-4),
        ("max_train_steps: 300_000", "max_train_steps", 300_000),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: False", "mixed_precision", "no"),
        ("torch_compile: yes", "torch_compile", "yes"),
        ("torch_compile: on", "torch_compile", "yes"),
        ("streaming: yes", "streaming", True),
        ("streaming: off", "streaming", False),
        ("dataset_name: 123", "dataset_name", "123"),
        ("dataset_name: 0123", "dataset_name", "0123"),
        ("dataset_name: 2024-01-01", "dataset_name", "2024-01-01"),
        ("dataset_name: 'true'", "dataset_name", "true"),
        ("report_to: none", "report_to", "none"),
        ("encoder: none", "encoder", None),
        ("encoder: null", "encoder", None),
        ("encoder:", "encoder", None),
        ("checkpoints_total_limit: none", "checkpoints_total_limit", None),
        ("checkpoints_total_limit: ~", "checkpoints_total_limit", None),
        ("qk_norm: none", "qk_norm", "none"),
        ("label_column: étiquette", "label_column", "étiquette"),
        ("seed: 7  # a comment", "seed", 7),
    ],
)
def test_a_line_is_read_by_the_type_of_its_key(tmp_path, line, name, value):
    found = getattr(parse_text(tmp_path, line), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: yes", ("line 2", "learning_rate must be a number, got 'yes'")),
        ("learning_rate: null", ("line 2", "learning_rate has no value")),
        ("learning_rate:", ("line 2", "learning_rate has no value")),
        ("learning_rate: fast", ("line 2", "learning_rate must be a number, got 'fast'")),
        ("learning_rate: 0,0001", ("line 2", "'0,0001'; write decimals with a point")),
        ("learning_rate: .nan", ("line 2", "learning_rate must be a number")),
        ("learning_rate: [1e-4, 1e-3]", ("line 2", "learning_rate takes one value, not a list")),
        ("seed: 1.5", ("line 2", "seed must be a whole number, got '1.5'")),
        ("seed: yes", ("line 2", "seed must be a whole number, got 'yes'")),
        ("streaming: maybe", ("line 2", "streaming must be true or false, got 'maybe'")),
        ("resume_from_checkpoint: true", ("line 2", "resume_from_checkpoint takes a name, got true", '"latest"')),
        ("vae: no", ("line 2", "vae takes a name, got no (write none to unset it)")),
        ("report_to: false", ("line 2", "report_to takes a name, got false", "all, or none")),
        ("mixed_precision: bf61", ("line 2", "mixed_precision must be one of ['auto', 'no', 'fp16', 'bf16']")),
        ("mixed_precision:", ("line 2", "mixed_precision has no value")),
        ("dataset_name: ''", ("line 2", "dataset_name has no value")),
        ("\nmax_grad_norm: -1", ("line 3", "max_grad_norm must be greater than 0, got -1.0")),
        ("seed: 1\nlearning_rate: 1e-3\nseed: 2", ("line 4", "seed is set twice, first on line 2")),
        ("learning_rte: 1e-4", ("line 2", "unknown key learning_rte; did you mean learning_rate?")),
        ("data:\n  dataset_name: digits", ("line 2", "unknown key data", "keys are flat")),
        ("dataset_name: {name: digits}", ("line 2", "dataset_name takes one value")),
        ("12: 3", ("line 2", "unknown key 12")),
        ("true: 3", ("line 2", "unknown key true")),
        ("\tseed: 1", ("line 2", "a tab where YAML allows only spaces")),
        ("seed 1", ("not YAML", "`key: value`")),
        ("seed: 'one", ("not YAML",)),
        ("seed: *none", ("line 2", "not YAML", "undefined alias")),
        ("a: 1\n---\nb: 2", ("not YAML", "document")),
        (b"- seed: 1\n- in_channels: 1\n", ("holds a list or a single value", "`key: value`")),
        (b"seed\n", ("holds a list or a single value",)),
        ("label_column: étiquette".encode("latin-1"), ("line 1", "not UTF-8 text")),
        ("seed: 1\nlabel_column: é".encode("latin-1"), ("line 2", "not UTF-8 text")),
        ("seed: 1".encode("utf-16"), ("line 1", "not UTF-8 text")),
        (b"seed: \x00", ("not YAML",)),
        ("model: SiT-H/2", ("line 2", "SiT-S, SiT-B, SiT-L, SiT-XL")),
    ],
)
def test_a_file_that_is_wrong_ends_with_one_sentence_that_names_file_and_line(tmp_path, capsys, text, words):
    refused(lambda: parse_text(tmp_path, text), capsys, "run.yaml", *words)


def test_a_file_in_utf_8_with_a_byte_order_mark_and_windows_lines(tmp_path):
    config = parse_text(tmp_path, b"\xef\xbb\xbfin_channels: 3\r\nseed: 5\r\n")
    assert (config.in_channels, config.seed) == (3, 5)


@pytest.mark.parametrize("text", [b"", b"# nothing\n", b"---\n"])
def test_an_empty_file_sets_nothing(tmp_path, text):
    assert parse_text(tmp_path, text, "--in_channels=1") == TrainingConfig(in_channels=1)


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    refused(lambda: parse_config([f"--config={tmp_path}"]), capsys, "cannot read the config")
    refused(lambda: parse_config([f"--config={tmp_path}/none.yaml"]), capsys, "cannot read the config")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rate", "fast"], "learning_rate must be a number, got 'fast'"),
        (["--learning-rate=1"], "unknown argument --learning-rate=1; did you mean --learning_rate?"),
        (["run.yaml"], "unknown argument run.yaml; a configuration is given as --config run.yaml"),
        (
            ["--lora_targets", "to_q", "to_v"],
            "unknown argument to_v; a flag takes one value: separate several names with commas",
        ),
        (["--encoder"], "expected one argument"),
        (["--streaming=perhaps"], "streaming must be true or false, got 'perhaps'"),
        (["--mixed_precision=half"], "mixed_precision must be one of"),
        (["--resume_from_checkpoint=yes"], "resume_from_checkpoint takes a name"),
        (["--data", "digits"], "unknown argument --data"),
    ],
)
def test_flags_that_are_wrong(capsys, flags, words):
    refused(lambda: parse_config(["--in_channels=1", *flags]), capsys, words)


def test_flags_win_over_the_file_and_none_takes_back(tmp_path):
    text = "encoder: some/encoder\nnum_classes: 5\nstreaming: true\nlearning_rate: 1e-3\n"
    config = parse_text(tmp_path, text, "--encoder=none", "--num_classes", "none", "--streaming", "false")
    assert (config.encoder, config.num_classes, config.streaming, config.learning_rate) == (None, None, False, 1e-3)
    config = parse_config(["--in_channels=1", "--dry_run", "--no_hand_over_projector", "--streaming"])
    assert config.dry_run and config.streaming and not config.hand_over_projector


# --- Paths


def test_home_and_variables_in_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    text = (
        "output_dir: ~/runs/a\ndataset_name: $DATA/cats\nencoder: some/encoder, ~/encoder,${DATA}/e\n"
        "vae: ./vae\nresume_from_checkpoint: latest\ndataset_split: ./x\n"
    )
    config = parse_text(tmp_path, text, "--init_from=$HOME/b")
    assert config.output_dir == f"{tmp_path}/runs/a" and config.dataset_name == "/data/cats"
    assert config.encoders == ["some/encoder", f"{tmp_path}/encoder", "/data/e"]
    assert config.vae == f"{tmp_path}/vae" and config.init_from == f"{tmp_path}/b"
    assert config.resume_from_checkpoint == "latest" and config.dataset_split == "./x"
    monkeypatch.delenv("DATA")
    refused(lambda: parse_config(["--output_dir=$DATA/a"]), capsys, "names $DATA, which is not set")
    refused(lambda: parse_config(["--vae=~nobody-here/a"]), capsys, "names the home of a user")


def test_the_config_file_itself_may_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("in_channels: 3\n")
    assert parse_config(["--config=~/a.yaml"]).in_channels == 3


def test_a_saved_list_of_encoders_means_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(["--in_channels=1", "--encoder=./a,some/b,../c", "--label_column=étiquette"])
    config.save("config.yaml")
    monkeypatch.chdir("/")
    again = parse_config([f"--config={tmp_path}/config.yaml"])
    assert again.encoders == [f"{tmp_path}/a", "some/b", f"{tmp_path.parent}/c"] and again.label_column == "étiquette"


def test_a_saved_configuration_neither_deletes_nor_resumes_the_run_that_wrote_it(tmp_path):
    for flag in ("--overwrite_output_dir", "--resume_from_checkpoint=latest"):
        parse_config(["--in_channels=1", f"--output_dir={tmp_path}", flag]).save(tmp_path / "config.yaml")
        again = parse_config([f"--config={tmp_path}/config.yaml"])
        assert not again.overwrite_output_dir and again.resume_from_checkpoint is None


def test_local_names_are_those_that_lie_here(tmp_path):
    assert local_names({"encoder": f"{tmp_path}, some/dino", "output_dir": str(tmp_path), "vae": None}) == [
        str(tmp_path)
    ]
    assert "dataset_name" in PATH_OR_ID and "output_dir" not in PATH_OR_ID


# --- Sizes


@pytest.mark.parametrize(
    ("text", "flags", "expected", "name"),
    [
        ("", [], (28, 16, 72, 2), "SiT-XL/2"),
        ("model: SiT-B/4", [], (12, 12, 64, 4), "SiT-B/4"),
        ("model: SiT-XL/2", ["--model=SiT-S/2"], (12, 6, 64, 2), "SiT-S/2"),
        ("model: SiT-B/2\nnum_layers: 3", [], (3, 12, 64, 2), None),
        ("model: SiT-B/2", ["--patch_size=4"], (12, 12, 64, 4), "SiT-B/4"),
        ("num_layers: 3\npatch_size: 8", ["--model=SiT-L/2"], (24, 16, 64, 2), "SiT-L/2"),
        ("num_layers: 3", ["--model=SiT-L/2", "--num_layers=5"], (5, 16, 64, 2), None),
        ("num_layers: 12\nnum_attention_heads: 12\nattention_head_dim: 64", [], (12, 12, 64, 2), "SiT-B/2"),
        (
            "model: none\nnum_layers: 2\nnum_attention_heads: 2\nattention_head_dim: 8\npatch_size: 2",
            [],
            (2, 2, 8, 2),
            None,
        ),
    ],
)
def test_model_stands_for_four_keys_and_what_is_said_wins_over_it(tmp_path, text, flags, expected, name):
    config = parse_text(tmp_path, text, *flags)
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim, config.patch_size) == expected
    assert config.model == name
    config.save(tmp_path / "config.yaml")
    assert parse_config([f"--config={tmp_path}/config.yaml"]) == config


def test_a_model_without_a_size_is_asked_for(capsys):
    refused(
        lambda: parse_config(["--in_channels=1", "--model=none", "--num_layers=3"]),
        capsys,
        "set model, such as SiT-B/2",
    )


def test_sizes_have_names_and_back():
    for name in SIZES:
        assert size_name(**size_config(f"{name}/4")) == f"{name}/4"
    for wrong in ("SiT-B", "SiT-B/3", "SiT-H/2", "sit-b/2", "SiT-B/2/2", ""):
        with pytest.raises(ValueError, match="not a published size"):
            size_config(wrong)
    assert size_name(3, 2, 8, 2) is None and size_name(12, 12, 64, 3) is None


def test_the_group_of_model_keys_is_what_the_transformer_takes():
    config = TrainingConfig(in_channels=1).model_config(10)
    own = {key.name for key in dataclasses.fields(ModelConfig)} - {"model"}
    assert set(config) == own | {"class_token_dim"}
    with torch.device("meta"):
        ERWTransformer2DModel(**config | {"num_layers": 1})


def test_a_shift_by_the_dimension_is_for_latents(tmp_path):
    """RAE (arXiv 2510.11690), §4.2: sqrt(numbers of a latent / 4096)."""
    latents = ["--vae=x/y", "--model=SiT-B/1", "--timestep_shift=auto"]
    config = parse_text(tmp_path, b"in_channels: 768\nsample_size: 16", *latents)
    assert config.timestep_shift == pytest.approx(48**0.5)
    config.save(tmp_path / "config.yaml")  # resolved: what a resumed run compares with
    assert parse_config([f"--config={tmp_path}/config.yaml"]) == config
    config.check_resumable(tmp_path / "config.yaml")
    assert parse_text(tmp_path, b"vae: x/y\ntimestep_shift: auto").timestep_shift == 1  # of SD's 4x32x32
    assert parse_text(tmp_path, b"vae: x/y\ntimestep_shift: 1.5").timestep_shift == 1.5


@pytest.mark.parametrize("value", ["auto", "AUTO"])
def test_pixels_have_no_shift_by_the_dimension(tmp_path, capsys, value):
    text = f"in_channels: 3\nsample_size: 256\npatch_size: 16\ntimestep_shift: {value}"
    refused(lambda: parse_text(tmp_path, text.encode()), capsys, "timestep_shift auto is for latents")


@pytest.mark.parametrize("value", ["automatic", "0", "-1", "nan", "true"])
def test_a_shift_is_auto_or_a_number_above_0(tmp_path, capsys, value):
    refused(lambda: parse_text(tmp_path, f"timestep_shift: {value}"), capsys, "timestep_shift must")


def test_a_model_is_as_wide_as_what_a_patch_holds(tmp_path, caplog, capsys):
    """RAE (arXiv 2510.11690), §4.1: a velocity holds noise, which does not pass a narrower layer."""
    latents = "vae: x/y\nin_channels: 768\nsample_size: 16\n"
    parse_text(tmp_path, (latents + "model: SiT-B/1").encode())
    for narrow in ("model: SiT-S/1", "model: SiT-XL/2"):
        refused(
            lambda text=latents + narrow: parse_text(tmp_path, text.encode()), capsys, "too narrow for their noise"
        )
    parse_text(tmp_path, (latents + "model: SiT-S/1\nprediction_type: sample").encode())
    pixels = "in_channels: 3\nsample_size: 64\n"
    caplog.clear()
    parse_text(tmp_path, (pixels + "model: SiT-B/16").encode())
    assert not caplog.records
    parse_text(tmp_path, (pixels + "model: SiT-S/16").encode())
    assert "384 wide, too narrow" in caplog.text


def test_masked_alignment_and_in_batch_negatives_exclude_each_other(tmp_path, capsys):
    text = "in_channels: 1\nencoder: x/y\nalignment_mask_ratio: 0.2\nalignment_loss: nt_xent\n"
    refused(lambda: parse_text(tmp_path, text.encode()), capsys, "keeps different tokens in each sample")
    assert parse_text(tmp_path, (text + "projector: transformer").encode()).alignment_mask_ratio == 0.2


# --- Earlier runs


def earlier(tmp_path, **changes):
    """A config.yaml as it was written before `model` and `ema_ramp`."""
    values = vars(TrainingConfig(in_channels=1)).copy()
    del values["model"], values["ema_ramp"]
    values |= {"dry_run_mfu": 0.4, "tracker_project_name": "erw", "probe_time": 0.5, "evaluation_guidance_scale": 1.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return tmp_path / "config.yaml"


def test_the_config_of_an_earlier_run_loads_and_says_what_is_gone(tmp_path, caplog):
    assert parse_config([f"--config={earlier(tmp_path)}"]) == TrainingConfig(in_channels=1)
    assert "the key dry_run_mfu was removed, and is ignored" in caplog.text


def test_a_removed_flag_is_unknown(capsys):
    refused(lambda: parse_config(["--dry_run_mfu=0.3"]), capsys, "unknown argument --dry_run_mfu")


def test_a_resumed_run_keeps_the_average_that_it_began_with(tmp_path, caplog):
    config = TrainingConfig(in_channels=1)
    config.check_resumable(earlier(tmp_path))
    assert not config.ema_ramp and "ema_ramp stays false" in caplog.text
    config.save(tmp_path / "config.yaml")
    again = TrainingConfig(in_channels=1)
    again.check_resumable(tmp_path / "config.yaml")
    assert not again.ema_ramp
    TrainingConfig(in_channels=1).save(tmp_path / "config.yaml")
    config.check_resumable(tmp_path / "config.yaml")
    assert config.ema_ramp


def test_a_resumed_run_keeps_what_its_losses_depend_on(tmp_path):
    TrainingConfig(in_channels=1, encoder="a/x, b/y").save(tmp_path / "config.yaml")
    TrainingConfig(in_channels=1, encoder="/here/x,/there/y", learning_rate=1.0).check_resumable(
        tmp_path / "config.yaml"
    )
    # The optimizer's state brings its own betas, epsilon and weight decay with it; without alignment there is no projector.
    for change in (
        {"seed": 1}, {"encoder": "a/x"}, {"encoder": "a/x,b/z"}, {"num_layers": 30}, {"num_classes": 4}, {"adam_beta2": 0.9},
        {"adam_weight_decay": 0.1}, {"alignment_weight": 0.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(change))} is .* the run so far had"):
            TrainingConfig(**{"in_channels": 1, "encoder": "a/x, b/y"} | change).check_resumable(
                tmp_path / "config.yaml"
            )


@pytest.mark.parametrize(
    "change",
    [{"prediction_type": "sample"}, {"patch_bottleneck_dim": 3}, {"alignment_mask_ratio": 0.2}, {"noise_scale": 2.0}],
)
def test_a_run_older_than_a_key_goes_on_as_before_there_was_one(tmp_path, change):
    path, plain = tmp_path / "config.yaml", {"in_channels": 1, "encoder": "x/y"}
    TrainingConfig(**plain).save(path)
    (key,) = change
    path.write_text("".join(line for line in path.open() if not line.startswith(f"{key}:")))
    TrainingConfig(**plain).check_resumable(path)
    with pytest.raises(ValueError, match=f"{key} is .* the run so far had"):
        TrainingConfig(**plain, **change).check_resumable(path)


def test_an_adapter_stays_that_of_its_base(tmp_path):
    path, lora = tmp_path / "config.yaml", {"in_channels": 1, "lora_rank": 2, "warmup_steps": 0}
    TrainingConfig(**lora, init_from="user/base").save(path)
    TrainingConfig(**lora, init_from="moved/base").check_resumable(path)
    with pytest.raises(ValueError, match="init_from is 'user/other', the run so far had 'user/base'"):
        TrainingConfig(**lora, init_from="user/other").check_resumable(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 8}, "set lora_rank, too"),
        ({"lora_targets": "to_q"}, "set lora_rank, too"),
        ({"alignment_mask_ratio": 0.2}, "set encoder, too"),
        ({"encoder": "a/x", "sample_size": 4, "alignment_mask_ratio": 0.1}, "hides none of 4 tokens"),
        ({"encoder": "a/x", "sample_size": 2, "spatial_norm": True}, "here is one token"),
        ({"encoder": "a/x", "alignment_loss": "nt_xent", "train_batch_size": 1}, "compares samples of a batch"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(in_channels=1, **change)


# --- Precision


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU that has bf16, emulates it, or none; and what accelerate launch says."""

    def make(kind, launcher=None):
        on_cpu = kind in ("amx", "avx512_bf16", "avx2", "cpu")
        monkeypatch.setattr(device, "found_device", lambda: torch.device("cpu" if on_cpu else "cuda"))
        capability = "AVX2" if kind == "avx2" else "AVX512"
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: kind == "amx")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: kind == "avx512_bf16")
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: kind == "ampere" or including_emulation
        )
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        if launcher is not None:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)

    return make


@pytest.mark.parametrize(
    ("kind", "launcher", "setting", "precision", "words"),
    [
        ("ampere", None, "auto", "bf16", "auto: on a GPU that has it"),
        ("volta", None, "auto", "fp16", "auto: this GPU only emulates bf16"),
        ("volta", None, "bf16", "bf16", "emulates bf16, which is slower"),
        ("volta", "bf16", "auto", "bf16", "emulates bf16, which is slower"),
        ("volta", None, "fp16", "fp16", "set by mixed_precision"),
        ("amx", None, "auto", "bf16", "auto: on a CPU that has it"),
        ("avx512_bf16", None, "auto", "bf16", "auto: on a CPU that has it"),
        ("cpu", None, "auto", "no", "not faster in bf16"),
        ("cpu", "bf16", "auto", "bf16", "set by accelerate launch"),
        ("avx2", None, "bf16", "bf16", "this CPU has no bf16"),
        ("avx2", "bf16", "auto", "bf16", "this CPU has no bf16"),
        ("avx2", None, "auto", "no", "not faster in bf16"),
        ("ampere", "fp16", "auto", "fp16", "set by accelerate launch"),
        ("ampere", "no", "auto", "bf16", "auto"),  # what the launcher says where it was asked nothing
        ("ampere", "no", "fp16", "fp16", "set by mixed_precision"),
        ("ampere", "BF16", "bf16", "bf16", "set by accelerate launch"),
        ("amx", None, "no", "no", "set by mixed_precision"),
    ],
)
def test_precision_is_decided_once_from_key_launcher_and_device(machine, kind, launcher, setting, precision, words):
    machine(kind, launcher)
    found, why = choose_precision(setting)
    assert found == precision and words in why


@pytest.mark.parametrize(("launcher", "setting"), [("bf16", "no"), ("bf16", "fp16"), ("fp16", "bf16"), ("fp16", "no")])
def test_a_key_against_the_launcher_is_refused(machine, launcher, setting):
    machine("ampere", launcher)
    with pytest.raises(ValueError, match=f"mixed_precision is {setting}, but accelerate launch .* sets {launcher}"):
        choose_precision(setting)


def test_a_precision_that_the_trainer_does_not_know(machine):
    machine("ampere", "fp8")
    with pytest.raises(ValueError, match="sets mixed_precision fp8"):
        choose_precision("auto")


@pytest.mark.parametrize(
    ("preset", "flags", "said"),
    [
        ("modern", ["--model=SiT-B/2"], "keeps warmup_depth=5, projector_depth=8, alignment_weight=0.5, which"),
        ("modern", ["--model=SiT-B/2", "--warmup_depth=8", "--projector_depth=4"], ""),
        ("modern", ["--model=SiT-XL/2"], ""),
        ("repa", ["--model=SiT-L/2"], "keeps projector_depth=8, alignment_weight=0.5"),
        ("sit", ["--model=SiT-B/2"], ""),  # which aligns nothing
    ],
)
def test_a_size_alone_says_what_it_keeps_of_another(preset, flags, said, caplog):
    parse_config([f"--config={REPOSITORY}/training/configs/imagenet256-{preset}.yaml", *flags])
    assert said in caplog.text and ("keeps" in caplog.text) == bool(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--alignment_stop_step=9"],
            "alignment_stop_step does nothing: alignment_schedule is constant, it would need stop",
        ),
        (["--timestep_logit_mean=0.8"], "timestep_logit_mean does nothing: timestep_distribution is uniform"),
        (["--alignment_temperature=0.5"], "alignment_temperature does nothing: alignment_loss is cosine"),
        (["--alignment_schedule=stop", "--alignment_stop_step=9"], ""),
    ],
)
def test_keys_that_need_another_are_said_to_do_nothing(caplog, flags, said):
    parse_config(["--in_channels=1", "--alignment_schedule=constant", *flags])
    assert said in caplog.text and ("does nothing" in caplog.text) == bool(said)


def test_a_comma_in_a_path_is_a_part_of_it(tmp_path, monkeypatch):
    (tmp_path / "lr=1,bs=2").mkdir()
    monkeypatch.chdir(tmp_path)
    config = TrainingConfig(in_channels=1, dataset_name="./lr=1,bs=2")
    config.check_names()
    assert local_names(vars(config)) == ["./lr=1,bs=2"]
    config.save(tmp_path / "config.yaml")
    assert f"dataset_name: {tmp_path}/lr=1,bs=2" in (tmp_path / "config.yaml").read_text()


def test_a_batch_that_the_loss_compares_stays(tmp_path):
    config = TrainingConfig(in_channels=1, encoder="user/dino", alignment_loss="nt_xent", train_batch_size=4)
    config.save(tmp_path / "config.yaml")
    config.check_resumable(tmp_path / "config.yaml")
    config.train_batch_size = 2
    with pytest.raises(ValueError, match="nt_xent compare the images of a batch"):
        config.check_resumable(tmp_path / "config.yaml")


def test_an_encoder_without_a_name_is_refused():
    with pytest.raises(ValueError, match="encoder=',' names no model"):
        TrainingConfig(in_channels=1, encoder=",", warmup_steps=5)
