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
"""The emoji of two artists: concepts are split, not pictures. The packages are stand-ins of npm's layout."""

import io
import json
import tarfile

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import REPOSITORY, run_script
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from erw_hf import ERWPipeline, RepresentationEncoder


CONCEPTS = 12


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    emojis = [
        {
            "name": f"ANIMAL NUMBER {i % 2}", "unified": f"1F4{i:02}", "image": f"1f4{i:02}.png", "category": "Animals & Nature", "subcategory": f"animal-{i % 3}",
            "has_img_google": True, "has_img_twitter": i != 5,
        }
        for i in range(CONCEPTS + 1)
    ]  # fmt: skip
    emojis[0]["skin_variations"] = {"1F3FB": {"image": "1f400-1f3fb.png"}}
    for company in ("google", "twitter"):
        files = {"package/emoji.json": json.dumps(emojis).encode()}
        for i, emoji in enumerate(emojis):
            for name in (emoji["image"], *(v["image"] for v in emoji.get("skin_variations", {}).values())):
                buffer = io.BytesIO()
                Image.new("RGBA", (64, 64), (20 * i, 0, 0, 0 if company == "google" else 255)).save(buffer, "png")
                files[f"package/img/{company}/64/{name}"] = buffer.getvalue()
        with tarfile.open(folder / f"emoji-datasource-{company}-16.0.0.tgz", "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder


def pictures(folder, split):
    return {path.relative_to(folder / split).as_posix() for path in (folder / split).glob("*/*.png")}


def test_concepts_that_both_drew_are_split_with_all_their_pictures(tmp_path, packages):
    run_script("make_emoji", f"--packages={packages}", f"--output_dir={tmp_path}/a", "--skin_tones", "--held_out=0.25")
    train, validation = pictures(tmp_path / "a", "train"), pictures(tmp_path / "a", "validation")
    concepts = [{name.split("/")[1].split("-")[0] for name in names} for names in (train, validation)]
    assert len(concepts[0]) == 9 and len(concepts[1]) == 3 and not concepts[0] & concepts[1]
    assert "1f405" not in concepts[0] | concepts[1]  # drawn by one artist only
    both = train | validation
    assert len(both) == 2 * (CONCEPTS + 1)  # and the skin tone
    assert {name.replace("-noto", "-twemoji") for name in both if "-noto" in name} == {
        n for n in both if "-twemoji" in n
    }
    assert {name.split("/")[0] for name in both} == {"animal-0", "animal-1", "animal-2"}
    assert "CC BY 4.0" in (tmp_path / "a" / "ATTRIBUTION.txt").read_text()

    run_script(
        "make_emoji", f"--packages={packages}", f"--output_dir={tmp_path}/b", "--classes=style", "--held_out=0.25"
    )
    assert {path.name for path in (tmp_path / "b" / "train").iterdir()} == {
        "Animals & Nature, noto",
        "Animals & Nature, twemoji",
    }
    again = {name.split("/")[1] for name in pictures(tmp_path / "b", "validation")}
    assert again == {name.split("/")[1] for name in validation if "1f3fb" not in name}  # the seed alone decides


def test_what_exists_is_not_mixed_with(tmp_path, packages):
    (tmp_path / "train").mkdir()
    with pytest.raises(SystemExit, match="exists: delete it"):
        run_script("make_emoji", f"--packages={packages}", f"--output_dir={tmp_path}")


def test_teachers_and_the_metric_network_learn_from_what_two_artists_drew(tmp_path, packages):
    run_script("make_emoji", f"--packages={packages}", f"--output_dir={tmp_path}/emoji", "--held_out=0.25")
    # A grey picture and a broken file do no harm.
    one = next((tmp_path / "emoji" / "train").rglob("*.png"))
    Image.open(one).convert("L").save(one)
    one.with_name("broken-noto.png").write_bytes(b"no picture")
    shared = [
        f"--dataset_name={tmp_path}/emoji",
        "--image_size=16",
        "--patch_size=4",
        "--hidden_size=32",
        "--num_layers=1",
    ]
    shared += ["--steps=2", "--batch_size=4"]
    run_script("train_tiny_encoder", *shared, "--pairs", "--names", "--resnet", f"--output_dir={tmp_path}/resnet")
    run_script("train_tiny_encoder", *shared, f"--teacher={tmp_path}/resnet", f"--output_dir={tmp_path}/vit")
    run_script("train_classifier", *shared[:2], "--steps=2", f"--output_dir={tmp_path}/classifier")
    run_script("train_tiny_autoencoder", *shared[:2], "--steps=2", "--width=8", f"--output_dir={tmp_path}/vae")
    assert AutoencoderKL.from_pretrained(tmp_path / "vae").config.scaling_factor != 0.18215  # of its latents
    classes = sorted(path.name for path in (tmp_path / "emoji" / "train").iterdir())
    assert list(AutoConfig.from_pretrained(tmp_path / "classifier").id2label.values()) == classes
    for name in ("resnet", "vit"):
        encoder = RepresentationEncoder.from_pretrained(tmp_path / name, token_grid=4)
        # The cells of a ResNet are those of --patch_size, so that it is given images of the size that it learned from.
        assert (encoder.embed_dim, encoder.image_size) == (32, 16)
        record = json.loads((tmp_path / name / "training.json").read_text())
        assert record["images_seen"] == 16 and all(0 <= value <= 1 for value in record["held_out_accuracy"].values())


def test_teachers_learn_without_a_picture_that_is_broken_and_with_skin_tones(tmp_path, packages):
    folder = tmp_path / "emoji"
    run_script("make_emoji", f"--packages={packages}", f"--output_dir={folder}", "--held_out=0.25", "--skin_tones")
    for split in ("train", "validation"):
        next((folder / split).rglob("*.png")).write_bytes(b"no picture")
    shared = [f"--dataset_name={folder}", "--image_size=16", "--patch_size=4", "--hidden_size=32", "--num_layers=1"]
    run_script(
        "train_tiny_encoder",
        *shared,
        "--pairs",
        "--names",
        "--steps=1",
        "--batch_size=4",
        f"--output_dir={tmp_path}/e",
    )
    assert (tmp_path / "e" / "model.safetensors").is_file()


def test_a_classifier_of_classes_without_names(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        rows = ["file_name,label", *(f"{index}.png,{index % 3}" for index in range(6))]
        (tmp_path / split / "metadata.csv").write_text("\n".join(rows))
        for index in range(6):
            Image.new("RGB", (16, 16), (40 * index, 0, 0)).save(tmp_path / split / f"{index}.png")
    flags = [f"--dataset_name={tmp_path}", "--image_size=16", "--steps=1", "--batch_size=4"]
    run_script("train_classifier", *flags, f"--output_dir={tmp_path}/out")
    assert AutoConfig.from_pretrained(tmp_path / "out").num_labels == 3
    for name in ("train_classifier", "train_tiny_encoder", "train_tiny_autoencoder"):  # before they train
        with pytest.raises(ValueError, match="metadata.csv is a file"):
            run_script(name, *flags, f"--output_dir={tmp_path}/train/metadata.csv")


def test_pairs_need_two_pictures_of_a_concept(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split / "a").mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", (16, 16), (40 * index, 0, 0)).save(tmp_path / split / "a" / f"IMG{index:04d}.png")
    flags = [f"--dataset_name={tmp_path}", "--pairs", "--image_size=16", "--steps=1", f"--output_dir={tmp_path}/out"]
    with pytest.raises(ValueError, match="--pairs needs pictures of one concept by several artists.* has none"):
        run_script("train_tiny_encoder", *flags)


def test_the_shipped_emoji_are_recognised():
    """By a classifier of real ones, which gets 54 % of those right that it has not seen."""
    pipe = ERWPipeline.from_pretrained(REPOSITORY / "pipelines" / "erw-emoji")
    pipe.set_progress_bar_config(disable=True)
    classifier = AutoModelForImageClassification.from_pretrained(REPOSITORY / "pipelines" / "emoji-classifier")
    processor = AutoImageProcessor.from_pretrained(REPOSITORY / "pipelines" / "emoji-classifier")
    labels = ["face-smiling", "country-flag", "heart"] * 6
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    images = pipe(class_labels=labels, num_inference_steps=20, generator=generators).images
    assert {image.size for image in images} == {(64, 64)}
    found = classifier(**processor(images, return_tensors="pt")).logits.argmax(dim=1).tolist()
    right = [classifier.config.id2label[guess] == label for guess, label in zip(found, labels, strict=True)]
    assert sum(right) >= len(right) / 2
