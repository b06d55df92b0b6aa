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
"""What a local folder of images is read as; none of these rules is that of `datasets`."""

import logging
import unicodedata
from dataclasses import replace

import pytest
from PIL import Image as PILImage

from erw_hf.data.source import load_source
from erw_hf.evaluation.probes import load_probe_images


def make(folder, *names, **texts):
    """Image files of these names, each of another grey, and files with text."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("L", (8, 8), number).save(path)
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def rows(source):
    """(path in the folder, class name) of each row, read as stored or as a stream."""
    root = None if source.id2label is None else source.id2label
    column = source.label_column
    return [(row["image"]["path"], None if column is None else root[row[column]]) for row in source.dataset]


def taken(folder, **kwargs):
    whole = rows(load_source(folder, **kwargs))
    assert sorted(rows(load_source(folder, streaming=True, **kwargs))) == sorted(whole)
    return [(path.removeprefix(f"{folder}/"), label) for path, label in whole]


@pytest.mark.parametrize(
    ("names", "split", "classes"),
    [
        (["bus/1", "car/2", "train/3"], "train", ["bus", "car", "train"]),
        (["bullet train/1", "freight car/2"], "train", ["bullet train", "freight car"]),
        (["beaker/1", "test_tube/2"], "train", ["beaker", "test_tube"]),
        (["cat/train-1", "cat/test-2", "dog/val_3"], "train", ["cat", "cat", "dog"]),  # files named as splits
        (["train/cat/1", "train/dog/2", "val/dog/3"], "train", ["cat", "dog"]),
        (["train/cat/1", "train/dog/2", "val/dog/3"], "validation", ["dog"]),
        (["train/cat/1", "train/dog/2", "val/dog/3"], "val", ["dog"]),
        (["Train/cat/1", "Train/dog/2", "TEST/dog/3"], "test", ["dog"]),
        (["train/test/1", "train/train/2"], "train", ["test", "train"]),  # classes in a split
        (["train/cat/1", "train/dog/2", "test/3"], "train", ["cat", "dog"]),  # a test set without labels
        (["train/1", "train/2"], "train", [None, None]),
        (["1", "2"], "train", [None, None]),
        (["cat/1", "dog/2", "dog/puppy/3"], "train", ["cat", "dog", "dog"]),
        (["cat/indoor/1", "cat/outdoor/2", "dog/indoor/3"], "train", ["cat", "cat", "dog"]),
        (["n1/images/1", "n2/images/2"], "train", ["n1", "n2"]),
        (["photos/cat/1", "photos/dog/2"], "train", ["cat", "dog"]),  # as an archive unpacks
        (["train/n1/images/1", "train/n2/images/2", "val/images/3"], "val", [None]),
        (["train/cat/1", "train/dog/2", "dev/dog/3", "val/cat/4"], "dev", ["dog"]),  # two names of one split
        (["cat/1", "cat/2"], "train", [None, None]),
        (["data/train/cat/1", "data/train/dog/2", "data/test/dog/3"], "test", ["dog"]),
        (["cat/1", "cat/2", "cat/3", "dog/4", "cover"], "train", ["cat"] * 3 + ["dog"]),
        (["cat/1", "dog/2", ".ipynb_checkpoints/3", "__MACOSX/cat/._1", "cat/._1"], "train", ["cat", "dog"]),
        (["cat-x/1", "cat/2", "a.b/3"], "train", ["a.b", "cat-x", "cat"]),
        (["[1]/*", "{a}/?", "a b/%20#1"], "train", ["[1]", "a b", "{a}"]),
    ],
)
def test_top_folders_are_classes(tmp_path, names, split, classes):
    folder = make(tmp_path / "photos", *(f"{name}.png" for name in names))
    found = taken(folder, split=split)
    assert [label for _, label in found] == classes
    assert [path for path, _ in found] == sorted(path for path, _ in found)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["my cat/1", "my cat/2"], ["my cat"] * 2),
        (["train/my cat/1", "validation/my cat/2"], ["my cat"]),
        (["photos/my cat/1", "photos/my cat/2"], ["my cat"] * 2),
    ],
)
def test_the_only_folder_is_a_class_if_one_is_asked_for(tmp_path, names, classes, caplog):
    folder = make(tmp_path / "all", *(f"{name}.png" for name in names))
    assert {label for _, label in taken(folder)} == {None}
    assert "my cat is not a class, since it is the only folder (--num_classes 1 makes it one)" in caplog.text
    assert [label for _, label in taken(folder, num_classes=1)] == classes
    caplog.clear()
    assert {label for _, label in taken(folder, num_classes=0)} == {None} and "not a class" not in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_that_are_asked_for_and_are_not_there(tmp_path, streaming):
    folder = make(tmp_path / "photos", "1.png", "2.png")
    for num_classes in (1, 1000):
        with pytest.raises(
            ValueError, match=f"num_classes is {num_classes}, but .*photos' has no classes: put the images into"
        ):
            load_source(folder, num_classes=num_classes, streaming=streaming)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/1", "test/2"], "may be classes or splits without classes: name one, .*photos/t"),
        (["train/cat/1", "train/dog/2", "extra/3"], "a split, or a class.*Name .*photos/train as the dataset if"),
        (["cat/1", "dog/2", "test/tube/3"], "test holds folders itself"),
        (["my_train/cat/1", "my_train/dog/2", "my_test/cat/3"], "may be classes or splits"),
        (["animals/cat/1", "animals/dog/2", "vehicles/car/3"], "are animals, vehicles the classes, or cat, dog, car"),
        (["cat/1", "dog/2", "a", "b", "c", "d", "e"], "holds 5 images itself and 2 in the folders cat, dog"),
        (["cat/1", "a"], "holds 1 images itself and 1 in the folders cat"),
    ],
)
def test_two_readings_are_refused(tmp_path, names, message):
    folder = make(tmp_path / "photos", *(f"{name}.png" for name in names))
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            load_source(folder, streaming=streaming)


def test_the_classes_of_all_splits_are_one_list(tmp_path):
    folder = make(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/dog/1.png", "test/eel/1.png")
    assert load_source(folder).id2label == load_source(folder, "test").id2label == {0: "cat", 1: "dog", 2: "eel"}


def test_what_was_taken_and_what_was_left_is_said(tmp_path, caplog):
    files = ["cat/1.png", "cat/2.JPG", "dog/1.png", "dog/old/1.png", "cover.png", ".trash/1.png"]
    folder = make(tmp_path, *files, **{"cat/1.txt": "a cat", "cat/3.heic": "", "cat/.DS_Store": ""})
    (tmp_path / "fox").mkdir()
    with caplog.at_level(logging.INFO):
        assert len(load_source(folder).dataset) == 4
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in (
        "4 in train", "classes by folder: cat, dog", "1 in nested folders belong to the class above",
        "left 1 outside of the class folders (cover.png)", "ignored 1 .heic, which Pillow does not read", "left the files 1 .txt", "hidden (.trash/1.png)",
        "empty folders: fox",
    ):  # fmt: skip
        assert part in record.message


def test_a_plain_folder_is_no_warning_and_ranks_say_it_once(tmp_path, caplog, monkeypatch):
    folder = make(tmp_path, "cat/1.png", "dog/1.png")
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.INFO):
        load_source(folder)
    assert not caplog.records
    monkeypatch.setenv("RANK", "0")
    with caplog.at_level(logging.INFO):
        load_source(folder)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (["1.png"], {"labels.csv": "file,label\n1.png,cat\n"}, "labels.csv seems to hold labels"),
        (["1.png"], {"labels.txt": "cat\n"}, "labels.txt seems to hold labels"),
        (["1.png"], {"train.json": '[{"file": "1.png", "category": 3}]'}, "train.json seems to hold labels"),
        (["0/1.png", "1/2.png"], {"dataset.json": '{"labels": [["0/1.png", 3]]}'}, "dataset.json in .* holds labels"),
        (["1.png"], {"metadata.csv": "file_name,breed_label\n1.png,cat\n"}, "--label_column breed_label"),
        (["1.png"], {"metadata.csv": "name,label\n1.png,cat\n"}, "needs a column file_name"),
        (["1.png"], {"metadata.csv": "file_name,label\n2.png,cat\n"}, "row 0 of .* names '2.png', which is not"),
        (["1.png", "2.png"], {"metadata.csv": "file_name,label\n1.png,cat\n2.png,\n"}, "row 1 of .* has no label"),
        (["cat/1.png", "dog/1.png"], {"eel/1.heic": ""}, "eel holds no image that Pillow reads, but 1 .heic"),
        ([], {"1.heic": "", "cat/2.heic": ""}, "no image that Pillow reads, but 2 .heic"),
        ([], {"notes.doc": ""}, "is empty"),
    ],
)
def test_labels_on_disk_are_not_lost_in_silence(tmp_path, images, texts, message):
    folder = make(tmp_path, *images, **texts)
    with pytest.raises(ValueError, match=message):
        load_source(folder)


def test_labels_that_are_not_wanted(tmp_path):
    folder = make(tmp_path, "1.png", **{"labels.csv": "file,label\n1.png,cat\n"})
    assert load_source(folder, num_classes=0).label_column is None
    folder = make(tmp_path / "b", "cat/1.png", "dog/1.png")
    source = load_source(folder, num_classes=0)
    assert (source.label_column, source.num_classes, len(source.dataset)) == (None, 0, 2)


def test_metadata_gives_labels_or_leaves_them_to_the_folders(tmp_path, caplog):
    captions = "file_name,text\ndog/1.png,a dog\ncat/1.png,a cat\n"
    folder = make(tmp_path / "a", "cat/1.png", "dog/1.png", **{"metadata.csv": captions})
    assert taken(folder) == [("cat/1.png", "cat"), ("dog/1.png", "dog")]
    assert "['text'] of metadata.csv are not used" in caplog.text
    # Without folders, the rows of the metadata in their order, as `datasets` gives them.
    lines = '{"file_name": "2.png", "text": "b"}\n{"file_name": "1.png", "text": "a"}\n'
    folder = make(tmp_path / "b", "1.png", "2.png", "3.png", **{"metadata.jsonl": lines})
    assert [path for path, _ in taken(folder)] == ["2.png", "1.png"]
    assert "left 1 that the metadata does not name (3.png)" in caplog.text
    table = "file_name,label\n2.png,dog\n1.png,cat\n"
    folder = make(tmp_path / "c", "train/1.png", "train/2.png", "test/2.png", "test/1.png",
                  **{"train/metadata.csv": table, "test/metadata.csv": table})  # fmt: skip
    source = load_source(folder)
    assert source.id2label == {0: "cat", 1: "dog"} and source.dataset["label"][:] == [1, 0]
    table = "file_name,label\ntrain/1.png,a\ntest/2.png,b\n"  # of both splits
    folder = make(tmp_path / "both", "train/1.png", "test/2.png", **{"metadata.csv": table})
    assert load_source(folder).id2label == load_source(folder, "test").id2label == {0: "a", 1: "b"}
    folder = make(tmp_path / "d", "1.png", "2.png", **{"metadata.csv": "file_name,breed\n1.png,x\n2.png,y\n"})
    assert load_source(folder, label_column="breed").id2label == {0: "x", 1: "y"}


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["007", "008", "010"], ["007", "008", "010"]),
        (["2020-01-01", "2021-02-02", "2020-01-01"], ["2020-01-01", "2021-02-02"]),
        (["true", "false", "true"], ["false", "true"]),
        (["cat", "cat ", " dog"], ["cat", "dog"]),
        (["0", "2", "1"], None),  # ids
        ([" 0", " 2", "1"], None),
    ],
)
def test_a_table_gives_names_as_they_are_written(tmp_path, labels, names):
    lines = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    files = {"metadata.csv": f"file_name,label\n{lines}"}
    source = load_source(make(tmp_path, "0.png", "1.png", "2.png", **files))
    assert source.id2label == (None if names is None else dict(enumerate(names)))
    found = source.dataset["label"][:]
    assert found == ([0, 2, 1] if names is None else [names.index(label.strip()) for label in labels])


def test_names_in_the_table_of_one_split_are_names_in_all(tmp_path):
    tables = {
        f"{split}/metadata.csv": f"file_name,label\n1.png,{label}\n"
        for split, label in [("train", "07"), ("test", "10")]
    }
    source = load_source(make(tmp_path, "train/1.png", "test/1.png", **tables), "test")
    assert source.id2label == {0: "07", 1: "10"} and source.dataset["label"][:] == [1]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_long_row_of_metadata_is_read(tmp_path, name):
    text = "x" * 3_000_000
    row = f'{{"file_name": "1.png", "label": "cat", "text": "{text}"}}\n'
    row = row if name.endswith("jsonl") else f"file_name,label,text\n1.png,cat,{text}\n"
    assert load_source(make(tmp_path, "1.png", **{name: row})).id2label == {0: "cat"}


def test_class_names_are_compared_after_nfc(tmp_path):
    composed, decomposed = "b\u00e9b\u00e9", unicodedata.normalize("NFD", "b\u00e9b\u00e9")
    assert composed != decomposed
    folder = make(tmp_path, f"{decomposed}/1.png", f"{composed}/2.png", "zoo/3.png")
    source = load_source(folder)
    assert source.id2label == {0: composed, 1: "zoo"} and len(source.dataset) == 3


def test_links_are_followed_and_a_loop_is_refused(tmp_path):
    make(tmp_path / "store", "1.png", "2.png")
    (tmp_path / "photos").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "store")
    assert len(load_source(str(tmp_path / "photos")).dataset) == 4
    (tmp_path / "store" / "up").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="a link to a folder above it"):
        load_source(str(tmp_path / "photos"))


def test_split_arithmetic_and_splits_that_do_not_exist(tmp_path):
    names = [f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(5)]
    folder = make(tmp_path, *names, "val/cat/1.png")
    assert len(load_source(folder, "train[:30%]").dataset) == 3
    assert len(load_source(folder, "train+validation").dataset) == 11
    with pytest.raises(ValueError, match="no split 'valid', but train and validation"):
        load_source(folder, "valid")
    with pytest.raises(ValueError, match="is empty"):
        load_source(folder, "train[:0]")


def test_a_streamed_folder_and_its_probes_see_all_classes_from_the_first_rows_on(tmp_path):
    """Rows are mixed in blocks, and a folder is listed a class at a time."""
    folder = make(tmp_path, *(f"{name}/{index}.png" for name in "abcd" for index in range(30)))
    stream = load_source(folder, streaming=True)
    assert {row["label"] for row in stream.dataset.take(30)} == {0, 1, 2, 3}
    assert load_probe_images(stream, 30, 8, 1, seed=0).labels.unique().tolist() == [0, 1, 2, 3]


def test_probing_with_one_class_is_warned_of(tmp_path, caplog):
    source = load_source(make(tmp_path, *(f"{name}/{index}.png" for name in "ab" for index in range(3))))
    load_probe_images(replace(source, dataset=source.dataset.select(range(3))), 3, 8, 1, seed=0)
    assert "all 3 images to probe with are of the class 0" in caplog.text
