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
"""Whether the data is what it was: told in seconds, true wherever it lies, false for any change of ids or order."""

import json
import shutil
import unicodedata

import pytest
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from diffusers import AutoencoderKL
from helpers import run_script, train, write_shards
from PIL import Image as PILImage

from erw_hf.data.digits import load_digits_dataset
from erw_hf.data.identity import data_identity, describe_changes
from erw_hf.data.source import load_source


def write_folder(folder, classes=("ant", "bee"), count=3):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            PILImage.new("L", (8, 8), i).save(folder / name / f"{i}.png")
    return folder


def identity(folder, streaming=False, **options):
    found = data_identity(load_source(str(folder), streaming=streaming, **options), str(folder))
    return json.loads(json.dumps(found))


def changes(before, folder, streaming=False, **options):
    return describe_changes(before, identity(folder, streaming, **options))


def rename_class(folder):
    (folder / "ant").rename(folder / "wasp")


def add_class(folder):
    shutil.copytree(folder / "ant", folder / "asp")


def add_image(folder):
    shutil.copy(folder / "ant" / "0.png", folder / "ant" / "00.png")


def remove_image(folder):
    (folder / "bee" / "2.png").unlink()


def rename_image(folder):
    (folder / "bee" / "2.png").rename(folder / "bee" / "3.png")


def move_image(folder):
    (folder / "bee" / "2.png").rename(folder / "ant" / "3.png")


def replace_image(folder):
    PILImage.effect_noise((8, 8), 50).save(folder / "bee" / "2.png")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_class, "classes were ['ant', 'bee'] and are ['bee', 'wasp']"),
        (add_class, "and are ['ant', 'asp', 'bee']"),
        (add_image, "rows were 6 and are 7"),
        (remove_image, "rows were 6 and are 5"),
        (rename_image, "names, sizes or order"),
        (move_image, "names, sizes or order"),
        (replace_image, "names, sizes or order"),
    ],
)
def test_a_changed_folder_is_other_data(tmp_path, change, said, streaming):
    folder = write_folder(tmp_path / "images")
    before = identity(folder, streaming)
    change(folder)
    if streaming and said.startswith("rows"):  # which nobody counted
        said = "names, sizes or order"
    assert said in changes(before, folder, streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_copy_elsewhere_is_the_same_data(tmp_path, streaming):
    folder = write_folder(tmp_path / "images", classes=("ant", unicodedata.normalize("NFC", "abeille-fée")))
    before = identity(folder, streaming)
    assert before["rows"] == (None if streaming else 6)
    copy = tmp_path / "other" / "place"
    for name in ("ant", unicodedata.normalize("NFD", "abeille-fée")):  # as a Mac writes it
        shutil.copytree(folder / unicodedata.normalize("NFC", name), copy / name)  # not the times of files
    assert changes(before, copy, streaming) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_and_saved_data(tmp_path, streaming):
    write_shards(tmp_path / "shards", rows=20, shards=2)
    rows = load_dataset("parquet", data_files=f"{tmp_path}/shards/*.parquet", split="train")
    rows.save_to_disk(tmp_path / "saved")
    for kind in ("shards", "saved"):
        before = identity(tmp_path / kind, streaming)
        shutil.copytree(tmp_path / kind, tmp_path / f"copy of {kind}")
        assert changes(before, tmp_path / f"copy of {kind}", streaming) is None
    before = identity(tmp_path / "shards", streaming)
    write_shards(tmp_path / "shards", rows=21, shards=2)
    assert changes(before, tmp_path / "shards", streaming)
    before = identity(tmp_path / "saved", streaming)
    rows.select(reversed(range(20))).save_to_disk(tmp_path / "reversed")
    assert "order" in changes(before, tmp_path / "reversed", streaming)


def test_labels_alone_that_changed_are_other_data(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    for name, labels in (("one", [0, 1]), ("two", [1, 0])):
        (tmp_path / name).mkdir()
        table = {"image": [PILImage.new("L", (8, 8))] * 2, "label": labels}
        Dataset.from_dict(table, features=features).to_parquet(tmp_path / name / "train.parquet")
    assert "order" in changes(identity(tmp_path / "one"), tmp_path / "two")


def test_the_digits_are_themselves_whatever_encodes_them(monkeypatch):
    before = identity("digits")
    assert before["rows"] == 1438 and before["classes"] == [str(i) for i in range(10)]
    smaller = load_digits_dataset()
    monkeypatch.setattr("erw_hf.data.source.load_digits_dataset", lambda: smaller)
    smaller["train"] = smaller["train"].select(range(100))
    assert "rows were 1438 and are 100" in changes(before, "digits")


def test_many_classes_are_not_all_named():
    one = {"classes": [str(i) for i in range(1000)], "rows": 1, "columns": [], "fingerprint": ""}
    two = one | {"classes": [*one["classes"], "more"]}
    assert len(describe_changes(one, two)) < 200


def test_a_run_resumes_with_its_data_alone(tmp_path, tiny_flags, caplog):
    folder = write_folder(tmp_path / "images")
    flags = [*tiny_flags, "--checkpoints_total_limit=9", "--max_train_steps=4", f"--output_dir={tmp_path}/run"]
    train(*flags, f"--dataset_name={folder}")
    progress = tmp_path / "run" / "checkpoint-2" / "progress.json"
    assert json.loads(progress.read_text())["data"] == identity(folder)
    resume = [*flags, "--resume_from_checkpoint=checkpoint-2"]
    shutil.copytree(folder, tmp_path / "another name")
    train(*resume, f"--dataset_name={tmp_path}/another name")
    rename_class(folder)
    with pytest.raises(ValueError, match=r"(?s)are \['bee', 'wasp'\].*--init_from"):
        train(*resume, f"--dataset_name={folder}")
    assert not any((folder.parent / "run").glob(".removing*")) and progress.is_file()
    recorded = json.loads(progress.read_text())
    del recorded["data"]  # as before there was one
    progress.write_text(json.dumps(recorded))
    train(*resume, f"--dataset_name={tmp_path}/another name")
    assert "does not record its data" in caplog.text


def cache(folder, dataset, vae_path, *flags):
    flags = [f"--dataset_name={dataset}", f"--vae={vae_path}", "--sample_size=8", "--rows_per_file=2", *flags]
    run_script("cache_latents", f"--output_dir={folder}", *flags)


def test_an_interrupted_cache_goes_on_with_its_data_alone(tmp_path, vae_path):
    folder = write_folder(tmp_path / "images")
    cache(tmp_path / "cache", folder, vae_path)
    (tmp_path / "cache" / "data" / "train-00001-of-00003.parquet").unlink()
    add_image(folder)
    with pytest.raises(ValueError, match=r"rows were 6 and are 7.*delete .*cache"):
        cache(tmp_path / "cache", folder, vae_path)
    (folder / "ant" / "00.png").unlink()
    cache(tmp_path / "cache", folder, vae_path)
    assert sorted(load_dataset(str(tmp_path / "cache"), split="train")["key"]) == [str(i) for i in range(6)]
    rename_class(folder)
    with pytest.raises(ValueError, match="classes were"):
        cache(tmp_path / "cache", folder, vae_path)


@pytest.fixture
def broken_vae(vae_path, tmp_path):
    vae = AutoencoderKL.from_pretrained(vae_path)
    vae.quant_conv.weight.data[0, 0] = float("nan")
    vae.save_pretrained(tmp_path / "broken-vae")
    return tmp_path / "broken-vae"


def test_latents_that_are_not_finite_are_never_written(tmp_path, vae_path, broken_vae, monkeypatch):
    folder = write_folder(tmp_path / "images")
    with pytest.raises(ValueError, match=r"broken-vae \(in torch.float32.*NaN or infinity for 2 of 2 images"):
        cache(tmp_path / "cache", folder, broken_vae)
    assert not list((tmp_path / "cache").rglob("*.parquet"))
    large = AutoencoderKL.from_pretrained(vae_path)  # finite, but not in the float16 of a cache
    large.quant_conv.bias.data[0] = 1e5
    large.save_pretrained(tmp_path / "large-vae")
    with pytest.raises(ValueError, match="large-vae.*kept in torch.float16"):
        cache(tmp_path / "large", folder, tmp_path / "large-vae")


def test_broken_inputs_are_told_from_a_divergence(tmp_path, tiny_flags, vae_path, broken_vae, monkeypatch):
    folder = write_folder(tmp_path / "images")
    flags = [*tiny_flags, f"--dataset_name={folder}", f"--output_dir={tmp_path}/run", "--max_nonfinite_steps=2"]
    with pytest.raises(ValueError, match="broken-vae.*its weights are broken"):
        train(*flags, f"--vae={broken_vae}", "--in_channels=4")
    monkeypatch.setattr("erw_hf.trainer.setup.check_finite", lambda *args: None)  # black is finite, others are not
    with pytest.raises(RuntimeError, match="inputs are broken: the latents of the vae .*broken-vae.*float32"):
        train(*flags, f"--vae={broken_vae}", "--in_channels=4")
    with pytest.raises(RuntimeError, match="latents and tokens are finite, so the training diverged"):
        train(
            *[flag for flag in flags if "output_dir" not in flag],
            f"--output_dir={tmp_path}/other",
            "--warmup_learning_rate=1e-3",
            "--learning_rate=1e30",
            "--max_grad_norm=1e30",
            "--max_train_steps=40",
        )


def test_links_to_files_that_are_gone_are_named_at_the_start(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PILImage.new("L", (8, 8)).save(tmp_path / name)
    for name in ("a/2.png", "b/1.png"):
        (tmp_path / name).symlink_to(tmp_path / "annexed.png")
    with pytest.raises(
        FileNotFoundError, match="2 images do not exist, the first is .*a/2.png: a link to a file that is gone"
    ):
        data_identity(load_source(str(tmp_path)), str(tmp_path))
