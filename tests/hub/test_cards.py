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
"""Cards: rendered from what is there, with metadata that the Hub takes, and without a result that nobody measured."""

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import get_type_hints

import huggingface_hub.constants
import pytest
import yaml
from helpers import REPOSITORY, train
from huggingface_hub import DatasetCardData, ModelCard, ModelCardData
from loopback_hub import LoopbackHub

from erw_hf.hub import push
from erw_hf.hub.cards import _example_label, evaluation_files, preset_card, run_card
from erw_hf.hub.public import public_value
from erw_hf.trainer.config import OWN_KEYS, PATH_OR_ID, TrainingConfig, local_names
from erw_hf.trainer.run_record import describe_environment, read_metrics, training_cost


PRESETS = sorted((REPOSITORY / "training" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_flags):
    folder = tmp_path_factory.mktemp("cards") / "run"
    train(*tiny_flags, f"--output_dir={folder}")
    shutil.copytree(folder / "pipeline", folder, dirs_exist_ok=True)  # as a snapshot has it
    return folder


def check(card):
    """What holds for every card."""
    text = str(card)
    assert not re.search(r"TODO|FIXME|\bNone\b|\bnan\b|undefined|\[More Information|\{\{|\{%", text), text
    data = card.data.to_dict()
    assert {"license", "library_name", "pipeline_tag", "tags"} <= set(data)
    assert ModelCardData(**yaml.safe_load(card.data.to_yaml())).to_dict() == data
    assert ModelCard(text).data.to_dict() == data
    card.validate()
    for heading in ("Recipe", "Cost", "Evaluation", "Limitations", "Licences", "Citation"):
        assert f"\n## {heading}\n" in text
    for paper in ("2504.10188", "2410.06940", "2401.08740"):
        assert paper in text
    assert text.count("```") % 2 == 0 and "\n\n\n\n" not in text


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_what_is_expected_and_claims_nothing(hub, path):
    card = preset_card(path)
    check(card)
    assert "has not been run here" in card.text and "Nothing has been measured" in card.text
    assert card.data.eval_results is None and "model-index" not in card.data.to_dict()
    comment = path.read_text().splitlines()[0].removeprefix("# ")
    assert f"> {comment}" in card.text
    method = next(name for name in ("SiT", "REPA", "ERW") if f": {name} on " in card.text)
    others = {
        "digits": "ERW",
        "emoji": "SiT",
        "modern": "ERW",
        "start": "ERW",
        "pixels": "SiT",
        "pixel": "SiT",
        "rae": "SiT",
    }
    assert method.lower() in path.stem or others[path.stem.split("-")[-1]] == method


def test_a_run_gives_its_cost_with_the_warmup_counted(hub, run):
    card = run_card(run, "user/tiny")
    check(card)
    records = read_metrics(run / "metrics.jsonl")
    rows = dict(training_cost(run / "metrics.jsonl", None)["rows"])
    assert rows["steps"] == "3 warmup + 4 full" and rows["images seen"] == "28"
    full_step = records[3]["flops"] - records[2]["flops"]
    assert rows["full-step equivalents"] == f"{records[-1]['flops'] / full_step:.0f}"
    assert rows["FLOPs"] == f"{records[-1]['flops']:.3e}"
    for value in rows.values():
        assert str(value) in card.text
    assert 'ERWPipeline.from_pretrained("user/tiny")' in card.text and "no number is claimed" in card.text
    assert "datasets" not in card.data.to_dict()  # the embedded digits are no repo of the Hub


def test_an_evaluation_becomes_a_table_a_model_index_and_a_result_file(hub, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "dataset_name": "user/photos"}))
    record = {
        "metrics": {"fid": 2.125, "precision": 0.75},
        "settings": {"num_samples": 50000, "num_inference_steps": 250, "dinov2": None},
        "reference": {"name": "user/flowers", "sha256": "ab"},
    }
    (folder / "evaluation.json").write_text(json.dumps(record))
    card = run_card(folder, "user/tiny")
    check(card)
    assert (
        "| fid | 2.125 |" in card.text
        and "num_samples 50000" in card.text
        and "name user/flowers" in card.text
        and "num_inference_steps 250" in card.text
    )
    index = card.data.to_dict()["model-index"]
    metrics = [metric for result in index[0]["results"] for metric in result["metrics"]]
    assert {metric["type"]: metric["value"] for metric in metrics} == record["metrics"]
    assert metrics[0]["args"]["num_samples"] == 50000
    assert card.data.datasets == ["user/photos"] and index[0]["results"][0]["dataset"]["name"] == "user/flowers"
    entries = yaml.safe_load(evaluation_files(folder)[".eval_results/erw.yaml"])
    assert [(entry["dataset"]["id"], entry["value"]) for entry in entries] == [
        ("user/flowers", 2.125),
        ("user/flowers", 0.75),
    ]
    assert "num_samples 50000" in entries[0]["notes"]
    record["reference"]["name"] = "flowers.npz"  # statistics, of which nobody knows whose they are
    (folder / "evaluation.json").write_text(json.dumps(record))
    assert evaluation_files(folder) == {}
    assert (
        run_card(folder, "user/tiny").data.to_dict()["model-index"][0]["results"][0]["dataset"]["name"]
        == "flowers.npz"
    )


def pushed(run, tmp_path, monkeypatch, **values):
    """A snapshot of a run with these values, for a push from another folder than the one that it was started in."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text()) | values
    environment = describe_environment("cpu", 1, "no", local_names(config))
    folder = Path(shutil.copytree(run, tmp_path / "elsewhere" / "run"))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps(environment))
    monkeypatch.chdir(tmp_path / "elsewhere")
    snapshot = push.stage(folder, 7, partial(push.link_folder, folder / "pipeline"), None)
    push.complete_snapshot(folder, snapshot, "user/tiny")
    return snapshot


@pytest.mark.parametrize("key", PATH_OR_ID)
def test_a_local_folder_is_no_id_of_the_hub_wherever_the_push_starts(hub, run, tmp_path, monkeypatch, key):
    (tmp_path / "things" / "mine").mkdir(parents=True)
    several = key == "encoder"
    snapshot = pushed(run, tmp_path, monkeypatch, **{key: "user/theirs, " * several + "things/mine"})
    for path in snapshot.rglob("*"):
        assert path.suffix not in (".md", ".json", ".yaml") or "things/mine" not in path.read_text(), path
    assert yaml.safe_load((snapshot / "config.yaml").read_text())[key] == "user/theirs," * several + "mine"
    card = ModelCard.load(snapshot / "README.md")
    check(card)
    assert card.data.datasets is None
    if key in ("dataset_name", "vae", "encoder", "warmup_from"):
        assert f"`{'user/theirs, ' * several}mine`" in card.text


def test_every_key_of_words_is_known_to_hold_paths_or_not():
    hints = get_type_hints(TrainingConfig)
    words = {name for name, hint in hints.items() if hint in (str, str | None)}
    plain = {
        "dataset_config_name", "dataset_split", "image_column", "label_column", "report_to", "probe_split", "hub_license",
        "model", "lora_targets",
    }  # fmt: skip
    assert words - set(OWN_KEYS) == {*PATH_OR_ID, *plain}


def test_a_card_has_the_settings_that_the_run_was_made_with(hub, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())

    def text(**values):
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, **values}))
        card = run_card(folder, "user/tiny")
        check(card)
        return card.text

    plain = text()
    assert f"| `ema_decay` | {config['ema_decay']} |" in plain and "| `ema_sigma_rel` | none |" in plain
    assert "| `alignment_loss` | cosine |" in plain and "| `projector` | mlp |" in plain
    assert "| `contrastive_weight` | 0.0 |" in plain and "contrastive flow matching" not in plain
    assert (
        "`encoder_antialias`" not in plain and "`output_dir`" not in plain and "`dataloader_num_workers`" not in plain
    )
    other = text(ema_sigma_rel=0.05, alignment_loss="nt_xent", projector="conv", spatial_norm=True)
    assert "| `ema_sigma_rel` | 0.05 |" in other and "| `spatial_norm` | true |" in other
    assert "| `alignment_loss` | nt_xent |" in other and "| `projector` | conv |" in other
    for method in ({}, {"encoder": None, "warmup_steps": 0}):  # ERW, SiT
        contrastive = text(contrastive_weight=0.05, encoder_antialias=True, **method)
        assert "| `contrastive_weight` | 0.05 |" in contrastive
        assert "velocity matching minus 0.05 times the distance to another sample's velocity" in contrastive
        assert ("| `encoder_antialias` | true |" in contrastive) == (
            method == {}
        )  # a key that a card shows if it was changed
    assert "| `alignment_loss` | none |" in contrastive and ": SiT on " in contrastive
    assert "`adam_epsilon`" not in plain and "| `adam_epsilon` | 0.001 |" in text(adam_epsilon=1e-3)
    assert "| `lora_rank` | 4 |" in text(lora_rank=4, encoder=None, warmup_steps=0)
    for key in ("start_from_encoder", "lora_rank", "warmup_from", "class_token_weight"):  # of an older run
        del config[key]
    assert text() == plain
    assert "λ = 0.5, a_new_one" in text(alignment_schedule="a_new_one")  # which has no words here yet


def test_a_public_value_is_a_hub_id_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "vae").mkdir()
    paths = {"/data/imagenet": "imagenet", "~/dino": "dino", "../dino/": "dino", "runs/mine/pipeline": "pipeline"}
    paths |= {
        "here/vae": "vae",
        "caches/mine": "mine",
        "stats/r.npz": "r.npz",
        "user/dino, /my files/own": "user/dino,own",
        "dinov2=/home/me/enc": "dinov2=enc",
        "file:///home/me/data": "data",
    }
    kept = ["user/dino", "a / b, [-1, 1]", "https://a.org/b/c", "bf16", "", 0.5, None, True]
    assert public_value({"a": list(paths), "b": tuple(kept)}, ["caches/mine"]) == {"a": [*paths.values()], "b": kept}


def test_the_warmup_has_a_card_of_its_own(hub, run):
    card = ModelCard.load(run / "warmup" / "README.md")
    card.validate()
    assert "--warmup_from" in card.text and "| steps | 3 |" in card.text and "first 2 blocks" in card.text
    assert "warmup" in card.data.tags and card.data.pipeline_tag is None  # it draws nothing


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], "0"),
        (["tench, Tinca tinca", "crane"], '"tench"'),
        (["crane, bird", "crane, machine"], '"crane, bird"'),  # "crane" alone would be refused
        (["😀", "é"], '"😀"'),
    ],
)
def test_the_example_on_a_card_names_one_class(names, shown):
    assert _example_label(names) == shown


def test_a_cache_has_a_card_that_tells_its_columns(hub, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image, Value

    from erw_hf.hub.cards import dataset_card

    features = Features(
        {"moments": Value("binary"), "image": Image(), "key": Value("string"), "label": ClassLabel(names=["a"])}
    )
    rows = {"moments": [b""], "image": [None], "key": ["0"], "label": [0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    made = {"dataset_name": "user/flowers", "dataset_split": "train", "vae": "user/vae", "sample_size": 32}
    (tmp_path / "cache.json").write_text(
        json.dumps({**made, "flipped": True, "encoder": "user/dino", "jpeg_quality": 95})
    )
    (tmp_path / "latent_statistics.json").write_text(json.dumps({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))
    card = dataset_card(tmp_path, "user/latents")
    card.validate()
    info = card.data.to_dict()["dataset_info"]
    assert [feature["name"] for feature in info["features"]] == ["moments", "image", "key", "label"]
    assert info["splits"][0]["num_examples"] == 1 and card.data.source_datasets == ["user/flowers"]
    assert DatasetCardData(**yaml.safe_load(card.data.to_yaml())).to_dict() == card.data.to_dict()
    assert "(8, 32, 32)" in card.text and 'load_dataset("user/latents"' in card.text and "mirrored" in card.text
    assert "`user/dino`" in card.text
