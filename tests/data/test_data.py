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
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from erw_hf.data.decoding import center_crop
from erw_hf.data.digits import load_digits_dataset
from erw_hf.data.latents import image_channels, pixels_to_latents
from erw_hf.data.samples import SampleMaker, StepSampler, TrainingSamples, sample_rng
from erw_hf.data.source import load_source


def picture(value: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> PILImage.Image:
    return PILImage.new(mode, size, value if mode == "L" else (value,) * len(mode))


def save_parquet(folder, columns: dict, features: Features | None = None):
    folder.mkdir(exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


def samples_of(source, **kwargs):
    settings = {"image_size": 8, "channels": 1, "latent_shape": (1, 8, 8), "seed": 0, "class_dropout_prob": 0.1}
    return TrainingSamples(SampleMaker(source, **{**settings, "random_flip": False, **kwargs}))


def test_digits_hold_a_fifth_out():
    from sklearn.datasets import load_digits

    splits, digits = load_digits_dataset(), load_digits()
    assert (len(splits["train"]), len(splits["test"])) == (1438, 359)
    assert splits["train"].features["label"].names == [str(i) for i in range(10)]
    # Rows 4, 9, 14 ... of the source are held out, and the cells of the pictures are the source's pixels.
    assert splits["test"]["label"][:3] == [int(digits.target[i]) for i in (4, 9, 14)]
    for row in (0, 1, 100):
        pixels = np.asarray(splits["test"][row]["image"], dtype=float)
        assert pixels.shape == (32, 32)
        cells = pixels.reshape(8, 4, 8, 4).mean(axis=(1, 3)) * 16 / 255
        np.testing.assert_allclose(cells, digits.images[5 * row + 4], atol=0.2)
    train = {image.tobytes() for image in splits["train"]["image"]}
    copies = sum(image.tobytes() in train for image in splits["test"]["image"])
    assert copies == 0


def test_columns_are_detected_or_named(tmp_path):
    columns = {"jpg": [picture(i) for i in range(4)], "cls": [0, 1, 2, 1]}
    features = Features({"jpg": Image(), "cls": Value("int64")})
    folder = save_parquet(tmp_path / "a", columns, features)
    source = load_source(folder)
    assert (source.image_column, source.label_column, source.num_classes, source.id2label) == ("jpg", "cls", 3, None)
    assert load_source(folder, num_classes=7).num_classes == 7
    with pytest.raises(ValueError, match=r"image_column='picture'.*\['jpg', 'cls'\]"):
        load_source(folder, image_column="picture")
    with pytest.raises(ValueError, match="label_column='y'"):
        load_source(folder, label_column="y")


def test_reading_a_row_decodes_no_other_image(tmp_path):
    pictures = [picture(i) for i in range(3)]
    folder = save_parquet(
        tmp_path / "views",
        {"image": pictures, "view": pictures, "label": [0, 1, 2]},
        Features({"image": Image(), "view": Image(), "label": ClassLabel(num_classes=3)}),
    )
    assert set(load_source(folder).dataset[0]) == {"image", "label"}


def test_names_come_from_the_class_label_or_from_strings(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    folder = save_parquet(tmp_path / "a", {"image": [picture()] * 2, "label": [1, 0]}, features)
    assert load_source(folder).id2label == {0: "cat", 1: "dog"}
    features = Features({"image": Image(), "label": Value("string")})
    folder = save_parquet(tmp_path / "b", {"image": [picture()] * 3, "label": ["owl", "ant", "owl"]}, features)
    source = load_source(folder)
    assert source.id2label == {0: "ant", 1: "owl"} and list(source.dataset["label"]) == [1, 0, 1]


def test_imagefolder_and_saved_datasets_load(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        picture().save(tmp_path / "images" / name / "0.png")
    assert load_source(str(tmp_path / "images")).id2label == {0: "cat", 1: "dog"}
    load_digits_dataset().save_to_disk(tmp_path / "digits")
    assert len(load_source(str(tmp_path / "digits")).dataset) == 1438


def test_bad_data_is_named_before_training(tmp_path):
    folder = save_parquet(tmp_path / "a", {"text": ["a"]})
    with pytest.raises(ValueError, match=r"no image column among \['text'\]"):
        load_source(folder)
    features = Features({"image": Image(), "label": Value("int64")})
    folder = save_parquet(tmp_path / "b", {"image": [picture()] * 3, "label": [0, 5, -1]}, features)
    with pytest.raises(ValueError, match=r"label 5 in row 1 .* \[0, 3\].*2 of 3 rows"):
        load_source(folder, num_classes=4)
    with pytest.raises(ValueError, match="label -1 in row 2"):
        load_source(folder)
    folder = save_parquet(tmp_path / "c", {"image": [], "label": []}, features)
    with pytest.raises(ValueError, match="is empty"):
        load_source(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        load_source(str(tmp_path / "nothing"))
    features = Features({"image": Image(), "label": Value("float32")})
    folder = save_parquet(tmp_path / "d", {"image": [picture()], "label": [0.5]}, features)
    with pytest.raises(ValueError, match="class ids or names"):
        load_source(folder)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P"])
def test_every_image_mode_becomes_the_wanted_channels(tmp_path, mode):
    image = picture(128, (13, 9)).convert(mode)
    source = load_source(save_parquet(tmp_path / "a", {"image": [image]}, Features({"image": Image()})))
    assert samples_of(source, channels=3)[0, 0]["pixels"].shape == (3, 8, 8)
    assert samples_of(source)[0, 0]["pixels"].shape == (1, 8, 8)
    assert samples_of(source)[0, 0]["pixels"].dtype == torch.uint8
    assert samples_of(source)[0, 0]["drop"]  # no labels: unconditional


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (7, 9), (64, 64)])
def test_center_crop(size):
    image = PILImage.new("L", size, 0)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste(200, (left, top, left + side, top + side))
    cropped = np.asarray(center_crop(image, 16))
    assert cropped.shape == (16, 16)
    assert np.median(cropped) == 200


def test_draws_depend_on_seed_epoch_and_key_alone():
    source = load_source("digits")
    samples = samples_of(source)
    first, again = samples[2, 17], samples_of(source)[2, 17]
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (samples[3, 17], samples[2, 18], samples_of(source, seed=1)[2, 17]):
        assert not torch.equal(first["noise"], other["noise"])
    assert torch.equal(first["pixels"], samples[3, 17]["pixels"])
    assert sample_rng(0, 0, "n01440764_10026").random() == sample_rng(0, 0, "n01440764_10026").random()


def test_draws_have_their_distributions():
    samples = samples_of(load_source("digits"), class_dropout_prob=0.3, random_flip=True)
    drawn = [samples[0, i] for i in range(800)]
    noise = torch.stack([sample["noise"] for sample in drawn])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    posterior = torch.stack([sample["posterior_noise"] for sample in drawn])
    assert abs((noise * posterior).mean()) < 0.02  # independent of each other
    assert 0.24 < torch.stack([sample["drop"] for sample in drawn]).float().mean() < 0.36
    plain = samples_of(load_source("digits"))
    flipped = [torch.equal(sample["pixels"], plain[0, i]["pixels"].flip(-1)) for i, sample in enumerate(drawn)]
    assert 0.42 < np.mean(flipped) < 0.58


def test_hidden_tokens_are_drawn_after_all_else_and_are_as_many_in_every_sample():
    source = load_source("digits")
    plain, hiding = samples_of(source), samples_of(source, num_tokens=16, num_hidden=4)
    hidden = torch.stack([hiding[0, i]["hidden"] for i in range(400)])
    assert hidden.dtype == torch.bool and (hidden.sum(dim=1) == 4).all()
    assert ((hidden.float().mean(dim=0) - 0.25).abs() < 0.08).all()  # every place alike
    first = plain[2, 17]
    assert all(torch.equal(hiding[2, 17][name], value) for name, value in first.items())
    assert torch.equal(hiding[2, 17]["hidden"], samples_of(source, num_tokens=16, num_hidden=4)[2, 17]["hidden"])
    assert not torch.equal(hiding[2, 17]["hidden"], hiding[3, 17]["hidden"]) and "hidden" not in first


def positions(processes: int, batch: int, accumulation: int, start: int = 0, end: int = 12, rows: int = 50):
    """Samples of each step over all processes, as sorted lists."""
    loaders = [list(StepSampler(rows, batch, accumulation, processes, r, start, end, 0)) for r in range(processes)]
    steps = end - start
    return [
        sorted(p for loader in loaders for chunk in loader[s * accumulation : (s + 1) * accumulation] for p in chunk)
        for s in range(steps)
    ]


def test_every_sample_once_an_epoch_whatever_the_processes():
    expected = positions(1, 8, 1)
    assert positions(2, 4, 1) == expected and positions(1, 4, 2) == expected and positions(2, 2, 2) == expected
    seen = sorted(p for step in positions(2, 5, 1, end=10) for p in step)  # 2 epochs of 50
    assert seen == [(epoch, row) for epoch in range(2) for row in range(50)]
    first, second = ([row for _, row in chunk] for chunk in StepSampler(50, 50, 1, 1, 0, 0, 2, 0))
    assert first != second and first != list(range(50))  # each epoch in an order of its own


def test_sampler_resumes_by_the_step_alone():
    assert positions(2, 4, 1, start=5) == positions(2, 4, 1)[5:]
    whole = list(StepSampler(50, 4, 2, 1, 0, 0, 12, 0))
    assert len(StepSampler(50, 4, 2, 1, 0, 0, 12, 0)) == len(whole) == 24
    assert list(StepSampler(50, 4, 2, 1, 0, 7, 12, 0)) == whole[14:]
    assert [row for _, row in whole[0]] != [row for _, row in next(iter(StepSampler(50, 4, 2, 1, 0, 0, 1, seed=1)))]


def test_deterministic_autoencoders_and_those_that_scale_by_themselves():
    """AutoencoderDC has a scaling factor for others to apply; AutoencoderRAE applies its statistics itself, to [0, 1]."""
    from diffusers import AutoencoderDC, AutoencoderRAE

    from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler

    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.manual_seed(0)
    dc = AutoencoderDC(
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), latent_channels=4, scaling_factor=0.4,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    ).eval()  # fmt: skip
    mean, std = torch.linspace(-1, 1, 64).tolist(), torch.linspace(0.5, 2, 64).tolist()
    rae = AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=1, encoder_input_size=28, encoder_patch_size=14, patch_size=4,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16,
        image_size=8, latents_mean=torch.tensor(mean).view(64, 1, 1), latents_std=torch.tensor(std).view(64, 1, 1),
    ).eval()  # fmt: skip
    assert [ERWPipeline.vae_scale_factor_of(vae) for vae in (dc, rae)] == [2, 4]
    assert [image_channels(vae) for vae in (dc, rae)] == [3, 3]
    for vae, channels, side in ((dc, 4, 4), (rae, 64, 2)):
        transformer = ERWTransformer2DModel(sample_size=side, patch_size=1, in_channels=channels, num_layers=1)
        pipe = ERWPipeline(transformer, vae, FlowMatchEulerMaruyamaScheduler())
        with torch.no_grad():
            if vae is dc:
                encoded = vae.encode(pixels.float() / 127.5 - 1).latent
                expected, decoded = encoded * 0.4, vae.decode(encoded).sample
            else:
                expected = vae.encode(pixels.float() / 255).latent
                decoded = vae.decode(expected).sample * 2 - 1
            latents = pixels_to_latents(pixels, vae, torch.randn(2, channels, side, side))
            torch.testing.assert_close(latents, expected)
            torch.testing.assert_close(pipe.decode_latents(latents), decoded, atol=1e-5, rtol=1e-4)


def test_pixels_become_latents_the_way_the_pipeline_turns_them_back():
    from diffusers import AutoencoderKL

    from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler

    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(pixels_to_latents(pixels, None), pixels.float() / 127.5 - 1)

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()  # fmt: skip
    noise = torch.randn(2, 4, 8, 8)
    latents = pixels_to_latents(pixels, vae, noise)
    with torch.no_grad():
        posterior = vae.encode(pixels.float() / 127.5 - 1).latent_dist
        torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise - 0.1) * 0.5)
        pipe = ERWPipeline(ERWTransformer2DModel(sample_size=8, num_layers=1), vae, FlowMatchEulerMaruyamaScheduler())
        expected = vae.decode(posterior.mean).sample
        torch.testing.assert_close(pipe.decode_latents(pixels_to_latents(pixels, vae)), expected, atol=1e-5, rtol=1e-4)
        # Per-channel statistics, as a converted VA-VAE carries them.
        statistics = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 3.0, 4.0]}
        vae.register_to_config(**statistics, shift_factor=None)
        scaled = pixels_to_latents(pixels, vae)
        mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
        torch.testing.assert_close(scaled, (posterior.mean - mean.view(1, 4, 1, 1)) * 0.5 / std.view(1, 4, 1, 1))
        torch.testing.assert_close(pipe.decode_latents(scaled), expected, atol=1e-5, rtol=1e-4)
