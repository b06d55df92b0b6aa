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
"""What opening a dataset refuses, and what it says: labels, splits, names, images that cannot be read."""

import base64
import datetime
import io
import logging
import re
import tarfile
import time

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from helpers import HANGS, REPOSITORY
from PIL import Image as PILImage

from erw_hf.data import retrying
from erw_hf.data.digits import load_digits_dataset
from erw_hf.data.retrying import hub_or_cache
from erw_hf.data.source import is_local, load_source
from erw_hf.evaluation.images import dataset_images


def png() -> bytes:
    buffer = io.BytesIO()
    PILImage.new("L", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def table(folder, labels=(0, 1, 2), name="train", image=None, **columns):
    """A folder with one parquet file, of as many images as labels."""
    folder.mkdir(exist_ok=True)
    image = pyarrow.array([{"bytes": png(), "path": None}] * len(labels)) if image is None else image
    columns = {"label": labels} if not columns else columns
    pyarrow.parquet.write_table(pyarrow.table({"image": image, **columns}), folder / f"{name}.parquet")
    return str(folder)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_names_of_any_arrow_type_are_classes(tmp_path, kind):
    labels = pyarrow.array(["owl", "ant", "owl"])
    labels = labels.dictionary_encode() if kind == "dictionary" else labels.cast(getattr(pyarrow, kind)())
    source = load_source(table(tmp_path / "data", labels))
    assert source.id2label == {0: "ant", 1: "owl"} and source.dataset["label"][:] == [1, 0, 1]


def test_names_of_a_csv_are_classes_composed(tmp_path):
    (tmp_path / "1.png").write_bytes(png())
    (tmp_path / "csv").mkdir()
    names = ["be\u0301be\u0301", "b\u00e9b\u00e9", "zoo"]
    lines = "".join(f"{tmp_path}/1.png,{name}\n" for name in names)
    (tmp_path / "csv" / "data.csv").write_text(f"image,label\n{lines}")
    assert load_source(str(tmp_path / "csv")).id2label == {0: "b\u00e9b\u00e9", 1: "zoo"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", None, None], "row 1 of .* has no label: the column 'label' holds None; 2 of 3 rows have none"),
        ([1, None, 0], "row 1 of .* has no label"),
        ([1.0, 2.0, float("nan")], "row 2 of .* has no label: the column 'label' holds nan"),
        (["a", "", "b"], "row 1 of .* has no label: the column 'label' holds ''"),
        ([[1], [2], [1, 2]], r"row 0 of .* holds \[1\] in the column 'label': a label is one class"),
        ([["a"], [], ["b"]], r"row 0 of .* holds \['a'\]"),
        ([1.0, 2.0, 0.0], r"class ids or names.*float64.*row 0: 1.0"),
        ([True, False, True], "class ids or names.*bool"),
    ],
)
def test_labels_that_are_not_classes_name_the_row(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        load_source(table(tmp_path / "data", labels))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"fine_label": [1, 0, 1], "coarse_label": [0, 0, 1]}, r"\['fine_label', 'coarse_label'\] may hold labels.*--label_col"),
        ({"Label": ["a", "b", "c"]}, "--label_column Label, or .* --num_classes 0"),
        ({"json": [{"label": 1}] * 3}, r"the column 'json' holds \['label'\]: labels inside another column"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_labels_under_an_unknown_name_are_not_lost(tmp_path, columns, message, streaming):
    folder = table(tmp_path / "data", **columns)
    with pytest.raises(ValueError, match=message):
        load_source(folder, streaming=streaming)
    assert load_source(folder, num_classes=0, streaming=streaming).label_column is None


def test_other_columns_are_said(tmp_path, caplog):
    load_source(table(tmp_path / "a", species=["x", "y", "z"]))
    assert "reading without labels: none of the columns ['species']" in caplog.text
    assert load_source(table(tmp_path / "a", species=["x", "y", "z"]), label_column="species").num_classes == 3
    source = load_source(table(tmp_path / "b", label=[0, 1, 0], class_name=["x", "y", "x"]))
    assert source.label_column == "label" and "'label', not from ['class_name']" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([base64.b64encode(png()).decode()] * 3, "row 0 holds text in Base64"),
        ([base64.b64encode(png())] * 3, "row 0 holds text in Base64"),
        ([{"bytes": base64.b64encode(png()), "path": None}] * 3, "row 0 holds text in Base64"),
        ([f"data:image/png;base64,{base64.b64encode(png()).decode()}"] * 3, "row 0 holds text in Base64"),
        (["a.png", "b.png", "c.png"], "names 'a.png', which does not exist"),
        ([{"bytes": b"<html>", "path": "a.png"}] * 3, r"none of 3 rows .*row 0 \(a.png\) is not an image"),
        ([{"bytes": None, "path": None}] * 3, "row 0 holds none"),
        ([1, 2, 3], "the column 'image' of .* holds Value.*int64.*, not images"),
    ],
)
def test_images_that_would_all_be_skipped_are_refused_at_once(tmp_path, image, message, streaming):
    folder = table(tmp_path / "data", image=pyarrow.array(image))
    with pytest.raises(ValueError, match=message):
        load_source(folder, streaming=streaming, num_classes=3)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_beginning_is_not_a_damaged_dataset(tmp_path, streaming):
    image = pyarrow.array([{"bytes": b"torn", "path": None}] * 40 + [{"bytes": png(), "path": None}])
    folder = table(tmp_path / "data", [0] * 41, image=image)
    assert load_source(folder, streaming=streaming, num_classes=1).num_classes == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_more_classes_than_the_dataset_names_are_refused(tmp_path, streaming):
    """Beside `init_from`, new classes would take the ids and names of the model's own."""
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(), "path": None}] * 2, "label": [0, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match=r"num_classes=1000, but the dataset names 2 classes \(cat, dog"):
        load_source(str(tmp_path), streaming=streaming, num_classes=1000)
    assert load_source(str(tmp_path), streaming=streaming, num_classes=2).id2label == {0: "cat", 1: "dog"}


def test_names_have_one_id_in_all_splits(tmp_path):
    for name, labels in (("train", ["cat", "eel"]), ("test", ["eel", "ant"]), ("validation", ["eel"])):
        table(tmp_path / "data", pyarrow.array(labels), name)
    for split, ids in (("train", [1, 2]), ("test", [2, 0]), ("validation", [2]), ("train[:1]", [1])):
        source = load_source(str(tmp_path / "data"), split)
        assert source.id2label == {0: "ant", 1: "cat", 2: "eel"} and source.dataset["label"][:] == ids, split
    DatasetDict({"train": Dataset.from_dict({"image": [png()], "label": ["b"]}),
                 "test": Dataset.from_dict({"image": [png()], "label": ["a"]})}).save_to_disk(tmp_path / "disk")  # fmt: skip
    assert load_source(str(tmp_path / "disk")).dataset["label"][:] == [1]


def test_one_readable_image_is_enough(tmp_path):
    image = pyarrow.array([{"bytes": b"", "path": "a.png"}] * 2 + [{"bytes": png(), "path": None}])
    assert len(load_source(table(tmp_path / "data", image=image)).dataset) == 3


def test_a_split_without_rows_does_not_keep_the_others_from_being_read(tmp_path):
    for name, labels in (("train", [0, 1]), ("test", pyarrow.array([], pyarrow.int64()))):
        image = pyarrow.array([{"bytes": png(), "path": None}] * len(labels),
                              pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))  # fmt: skip
        table(tmp_path, labels, name, image)
    assert len(load_source(str(tmp_path)).dataset) == 2
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"split 'test'\) is empty"):
            load_source(str(tmp_path), "test", streaming=streaming, num_classes=2)


@pytest.mark.parametrize("kind", ["digits", "saved", "parquet", "stream"])
def test_a_split_that_does_not_exist_lists_those_that_do(tmp_path, kind):
    name = "digits" if kind == "digits" else str(tmp_path / "data")
    if kind == "saved":
        DatasetDict({"train": load_digits_dataset()["test"]}).save_to_disk(name)
    elif kind != "digits":
        table(tmp_path / "data")
    with pytest.raises(ValueError, match=r"has no split 'valid'.*train"):
        load_source(name, "valid", streaming=kind == "stream")


def test_files_whose_names_make_no_split_are_said(tmp_path, caplog):
    for name in ("bus", "car", "train"):
        table(tmp_path, name=name)
    load_source(str(tmp_path))
    assert "2 files of" in caplog.text and "(bus.parquet, car.parquet)" in caplog.text


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("./photoz", FileNotFoundError, r"there is no folder /.*photoz \(did you mean \./photos\?\)"),
        ("/data/imgs", FileNotFoundError, "there is no folder /data/imgs"),
        ("~/x", FileNotFoundError, "there is no folder /.*/x"),
        ("photos/validatoin", FileNotFoundError, "there is no folder"),
        ("a/b/c", FileNotFoundError, "there is no folder"),
        ("", FileNotFoundError, "there is no folder"),
        ("broken", FileNotFoundError, "there is no folder"),
        ("photoz", FileNotFoundError, "neither a folder .*did you mean ./photos.* HF_HUB_OFFLINE is set"),
        ("photos/a.parquet", ValueError, "is a file: name its folder, photos"),
        ("photos/a.ZIP", ValueError, "is a file: unpack it"),
        ("photos/a.npz", ValueError, "is a file: name a folder"),
    ],
)
def test_mistyped_paths_and_files_get_a_sentence_at_once(tmp_path, monkeypatch, name, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "broken").symlink_to("nowhere")
    for file in ("a.parquet", "a.ZIP", "a.npz"):
        (tmp_path / "photos" / file).touch()
    waits = []
    monkeypatch.setattr("erw_hf.data.retrying.time.sleep", waits.append)
    with pytest.raises(error, match=message):
        load_source(name)
    assert not waits


def test_home_and_variables_are_filled_in(tmp_path, monkeypatch):
    table(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert is_local("~/data") and len(load_source("$HOME/data").dataset) == 3


def test_a_hub_that_is_away_is_asked_once_and_named(monkeypatch, tmp_path):
    calls = []

    class Session:
        def head(self, url, timeout):
            calls.append(timeout)
            raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    retrying._why_hub_is_away.cache_clear()
    from transformers import AutoConfig

    started = time.monotonic()
    for what in ("encoder", "vae"):
        with pytest.raises(ConnectionError, match=f"{what}='foo/bar' is not in the cache .*no route to host"):  # noqa: SIM117
            with hub_or_cache("foo/bar", what):
                AutoConfig.from_pretrained("foo/bar")
    retrying._why_hub_is_away.cache_clear()
    assert calls == [5] and time.monotonic() - started < HANGS
    with hub_or_cache(str(tmp_path), "vae"):
        pass  # a folder asks nobody
    with pytest.raises(FileNotFoundError, match="vae='./nope': there is no folder"), hub_or_cache("./nope", "vae"):
        pass
    logging.getLogger("transformers").setLevel(logging.WARNING)


@pytest.mark.parametrize("script", ["cache_latents", "evaluate", "probe"])
def test_messages_name_flags_that_all_scripts_have(script):
    text = (REPOSITORY / "training" / f"{script}.py").read_text()
    named = set()
    for path in (REPOSITORY / "src" / "erw_hf" / "data").glob("*.py"):
        if path.name == "cache.py":  # it names the flags that made a cache
            continue
        named |= set(re.findall(r"--([a-z_]+)(?![\w-])", path.read_text()))
    assert {"image_column", "label_column", "num_classes"} <= named
    assert [flag for flag in named - {"streaming"} if f'"--{flag}"' not in text] == []


def test_evaluation_reads_the_columns_that_it_is_told(tmp_path):
    folder = table(tmp_path / "data", coarse_label=[0, 0, 1], fine_label=[0, 1, 2])
    with pytest.raises(ValueError, match=r"\['coarse_label', 'fine_label'\] may hold labels"):
        dataset_images(folder)
    assert dataset_images(folder, label_column="fine_label").num_classes == 3
    assert dataset_images(folder, num_classes=0).num_classes == 0


@pytest.mark.parametrize(("labels", "hint"), [((1, 2, 2), "count from 1"), ((0, 2, 7), "ids of something else")])
def test_classes_without_images_are_said(tmp_path, caplog, labels, hint):
    assert load_source(table(tmp_path / "data", labels)).num_classes == max(labels) + 1
    assert "classes have no image" in caplog.text and hint in caplog.text


def test_what_will_never_load_is_not_tried_again(tmp_path):
    """A script, a card that counts other rows, a path that `datasets` takes for a pattern: each with what to do."""
    script = tmp_path / "scripted"
    script.mkdir()
    (script / "scripted.py").write_text("import datasets")
    stale = tmp_path / "stale"
    table(stale)
    (stale / "README.md").write_text(
        "---\ndataset_info:\n  splits:\n  - name: train\n    num_bytes: 9\n    num_examples: 9\n  download_size: 1\n"
        "  dataset_size: 9\n---\n"
    )
    table(tmp_path / "set [v1]")
    for name, message in (
        (script, "is a script, which `datasets` no longer runs"),
        (stale, "counts other rows than its files hold"),
        (tmp_path / "set [v1]", "for a pattern: rename the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_source(str(name), retry_seconds=HANGS)


def test_images_of_several_extensions_in_tars_are_refused(tmp_path):
    """`datasets` takes the columns of the first tar, so every image of the second would be lost."""
    for number, extension in enumerate(("jpg", "png")):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for i in range(3):
                buffer = io.BytesIO()
                PILImage.new("RGB", (8, 8)).save(buffer, {"jpg": "JPEG", "png": "PNG"}[extension])
                for suffix, content in ((extension, buffer.getvalue()), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{number}-{i}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="3 of 6 samples of .* hold no .jpg: in all tars .* the same extension"):
        load_source(str(tmp_path))


def test_labels_that_are_dates_are_named(tmp_path):
    labels = pyarrow.array([datetime.date(2020, 1, 1)] * 3)
    with pytest.raises(ValueError, match="labels must be class ids or names.*2020, 1, 1"):
        load_source(table(tmp_path / "data", labels))


def test_a_folder_named_as_the_embedded_digits_is_told_from_them(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / "digits" / name).mkdir(parents=True)
        (tmp_path / "digits" / name / "1.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="write ./digits for the folder"):
        load_source("digits")
    assert len(load_source("./digits").dataset) == 2


def test_a_folder_of_save_to_disk_is_streamed_and_left_as_it_is(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": png(), "path": None}] * 4, "label": [0, 1, 0, 1]}
    DatasetDict({"train-clean": Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    assert len(list(load_source(str(tmp_path / "data"), "train-clean", streaming=True).dataset)) == 4
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="has no split 'test', but train-clean"):
        load_source(str(tmp_path / "data"), "test")


def test_boolean_labels_are_no_ids_streamed_or_not(tmp_path):
    folder = table(tmp_path / "data", pyarrow.array([True, False, True]))
    for streaming in (False, True):
        with pytest.raises(ValueError, match="class ids"):
            load_source(folder, streaming=streaming, num_classes=2)
