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
import errno
import io
import struct
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageOps, PngImagePlugin

from erw_hf.data import decoding
from erw_hf.data.decoding import BadImageError, center_crop, crop_at, decode_image, prepare_image
from erw_hf.data.samples import SampleMaker, TrainingSamples
from erw_hf.data.source import load_source, read_images
from erw_hf.evaluation.images import dataset_images
from erw_hf.evaluation.probes import load_probe_images


NOISE = np.random.default_rng(0).integers(0, 256, (12, 9, 4), dtype=np.uint8)


def encoded(image: PILImage.Image | np.ndarray, format: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    (PILImage.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": f"some.{format.lower()}"}


def decoded(*args, **options) -> PILImage.Image:
    return decode_image(encoded(*args, **options))[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (13, 9), (9, 13), (64, 48), (200, 40), (3, 40), (500, 333)])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "1", "RGBA"])
def test_ordinary_images_are_prepared_as_ever(mode, size, channels):
    """PIL's conversion, ADM's crop, to the last bit; of RGBA the opaque ones."""
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = PILImage.fromarray(pixels).convert(mode)
    plain = image.convert({1: "L", 3: "RGB"}[channels])
    while min(plain.size) >= 32:
        plain = plain.resize((plain.width // 2, plain.height // 2), resample=PILImage.Resampling.BOX)
    scale = 16 / min(plain.size)
    plain = plain.resize((round(plain.width * scale), round(plain.height * scale)), PILImage.Resampling.BICUBIC)
    left, top = (plain.width - 16) // 2, (plain.height - 16) // 2
    expected = plain.crop((left, top, left + 16, top + 16))
    made = prepare_image(decoded(image, "TIFF" if mode == "CMYK" else "PNG"), 16, channels)
    assert made.mode == expected.mode and np.array_equal(np.asarray(made), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_upright(format, orientation):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    stored = PILImage.fromarray(NOISE[..., :3])
    record = encoded(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    expected = ImageOps.exif_transpose(PILImage.open(io.BytesIO(record["bytes"])))
    assert expected.size == ((12, 9) if 5 <= orientation <= 8 else (9, 12))
    assert np.array_equal(np.asarray(decode_image(record)[0]), np.asarray(expected))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"nonsense"])
def test_broken_exif_leaves_the_pixels(exif):
    assert np.array_equal(np.asarray(decoded(NOISE[..., :3], "PNG", exif=exif)), NOISE[..., :3])


RAMP = np.linspace(0, 1, 300).reshape(20, 15)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ((RAMP * 65535).astype(np.uint16), (RAMP * 65535).astype(int) >> 8),
        (np.full((4, 4), 300, dtype=np.uint16), np.full((4, 4), 1)),  # dark stays dark
        ((RAMP * 65535).astype(np.int32), (RAMP * 65535).astype(int) >> 8),
        ((RAMP * 255).astype(np.int32), (RAMP * 255).astype(int)),
        ((RAMP * 2e9 - 1e9).astype(np.int32), RAMP * 255),
        (RAMP.astype(np.float32), RAMP * 255),
        ((RAMP / 2).astype(np.float32), RAMP * 127.5),
        ((RAMP * 254).astype(np.float32), RAMP * 254),
        ((RAMP * 2 - 1).astype(np.float32), RAMP * 255),
        ((RAMP * 1e30).astype(np.float32), RAMP * 255),
        (np.full((4, 4), -3.0, dtype=np.float32), np.zeros((4, 4))),
    ],
)
def test_deep_grey_is_scaled_to_8_bit(stored, expected):
    image = decoded(stored, "TIFF")
    assert image.mode == "L"
    np.testing.assert_allclose(np.asarray(image, dtype=float), expected, atol=0.51)


def test_deep_grey_of_a_png_is_as_deep_colour():
    """Pillow takes the high byte of 16-bit RGB; grey is not a shade off."""
    assert decoded((RAMP * 65535).astype(np.uint16)).getextrema() == (0, 255)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_a_bad_image(value):
    with pytest.raises(BadImageError, match=r"some.tiff .*NaN or infinity"):
        decoded(np.array([[0.5, value]], dtype=np.float32), "TIFF")


def transparent(mode: str) -> dict:
    """Black ink on the left, noise under full transparency on the right."""
    pixels = NOISE.copy()
    pixels[:, :4], pixels[:, :4, 3], pixels[:, 4:, 3] = 0, 255, 0
    if mode == "RGBA":
        return encoded(pixels)
    if mode == "LA":
        return encoded(np.ascontiguousarray(pixels[..., [0, 3]]))
    if mode == "webp":
        return encoded(pixels, "WEBP", lossless=True, exact=True)
    image = PILImage.fromarray(np.where(pixels[..., 3] > 0, 0, 7).astype(np.uint8))
    if mode == "P":
        image = image.convert("P")
    if mode == "RGB":
        return encoded(image.convert("RGB"), transparency=(7, 7, 7))
    return encoded(image, "GIF" if mode == "gif" else "PNG", transparency=7)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "gif", "webp"])
def test_transparency_is_white(mode):
    image = decode_image(transparent(mode))[0]
    pixels = np.asarray(image.convert("RGB"))
    assert image.mode == "RGB" and (pixels[:, :4] == 0).all() and (pixels[:, 4:] == 255).all()


def test_half_transparent_is_half_white():
    assert decoded(np.full((2, 2, 4), (0, 100, 200, 128), dtype=np.uint8)).getpixel((0, 0)) == (127, 177, 227)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_many(format):
    frames = [PILImage.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    image = decoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert image.getpixel((4, 4)) == (255, 0, 0)


def test_thin_images_are_cropped_before_they_are_enlarged(monkeypatch):
    """20000 x 1 pixels at side 256 took 5.7 GB; the square is what it was."""
    largest, resize = [], PILImage.Image.resize

    def watched(self, size, *args, **kwargs):
        largest.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    line = np.arange(20000)[None].astype(np.uint8)
    for pixels in (line, line.T, np.repeat(line[:, :700], 3, axis=0)):
        image = PILImage.fromarray(np.ascontiguousarray(pixels))
        scale = 64 / min(image.size)
        whole = image.resize((round(image.width * scale), round(image.height * scale)), PILImage.Resampling.BICUBIC)
        left, top = (whole.width - 64) // 2, (whole.height - 64) // 2
        expected = np.asarray(whole.crop((left, top, left + 64, top + 64)), dtype=int)
        monkeypatch.setattr(PILImage.Image, "resize", watched)
        made = np.asarray(center_crop(image, 64), dtype=int)
        monkeypatch.undo()
        assert np.abs(made - expected).max() <= 1
    assert max(largest) == 64 * 64


def png_of(width: int, height: int) -> bytes:
    """The header of a PNG of this size, and nothing behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    buffer = io.BytesIO()
    buffer.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(buffer, b"IHDR", header)
    return buffer.getvalue()


BROKEN = {
    "zero bytes": b"",
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "truncated": encoded(NOISE[..., :3])["bytes"][:-60],
    "truncated jpeg": encoded(PILImage.new("RGB", (64, 64)), "JPEG")["bytes"][:400],
    "190 Mpx": png_of(19000, 10000),
    "dds": b"DDS " + struct.pack("<I", 124) + b"\xff" * 200,
    "qoi": b"qoif" + struct.pack(">II", 9, 9) + b"\x03\x00\xff",
    "avif": encoded(PILImage.new("RGB", (64, 64)), "AVIF")["bytes"][:200],
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "webp": encoded(PILImage.new("RGB", (64, 64)), "WEBP")["bytes"][:30],
    "tiff": b"II*\0\x08\0\0\0\x01\0",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_a_plugin_raises_is_a_bad_image_with_its_name(kind):
    with pytest.raises(BadImageError, match="cat/7.bin holds no readable image"):
        decode_image({"bytes": BROKEN[kind], "path": "cat/7.bin"})


@pytest.mark.parametrize("raised", [RuntimeError, KeyError, struct.error, ZeroDivisionError, RecursionError, OSError])
def test_other_errors_of_a_plugin_are_bad_images_and_memory_is_not(monkeypatch, raised):
    def load(self):
        raise raised("in the plug-in")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(BadImageError, match="some.png holds no readable image.*in the plug-in"):
        decoded(NOISE)
    raised = MemoryError
    with pytest.raises(MemoryError):
        decoded(NOISE)
    raised = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        decoded(NOISE)


def folder_of(path, contents: dict[str, bytes]) -> str:
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return str(path)


def grey(value: int) -> bytes:
    return encoded(PILImage.new("L", (8, 8), value))["bytes"]


def training_samples(source, retry_seconds: float = 0) -> TrainingSamples:
    return TrainingSamples(SampleMaker(source, 8, 1, (1, 8, 8), 0, 0.1, False), retry_seconds)


@pytest.mark.parametrize("kind", ["zero bytes", "html", "truncated", "190 Mpx"])
@pytest.mark.parametrize("in_files", [False, True])
def test_a_broken_first_row_is_skipped_like_any_other(tmp_path, caplog, kind, in_files):
    if in_files:
        contents = {"a/0.png": BROKEN[kind], "a/1.png": grey(1), "b/0.png": grey(2)}
        source = load_source(folder_of(tmp_path / "images", contents))
    else:
        images = [{"bytes": BROKEN[kind], "path": "0.png"}, PILImage.new("L", (8, 8), 1)]
        table = Dataset.from_dict({"image": images}, features=Features({"image": Image()}))
        (tmp_path / "data").mkdir()
        table.to_parquet(tmp_path / "data" / "train.parquet")
        source = load_source(str(tmp_path / "data"))
    assert training_samples(source)[0, 0]["pixels"].unique().tolist() == [1]
    assert "skipped row 0: " in caplog.text and "0.png holds no readable image" in caplog.text


@pytest.mark.parametrize(
    ("number", "workers"),
    [(errno.ESTALE, 2), (errno.EACCES, 0), (errno.EIO, 0), (errno.ENOENT, 0), (errno.EMFILE, 0), (errno.ENETDOWN, 0)],
)
def test_a_failing_system_is_tried_again_and_never_a_bad_image(tmp_path, monkeypatch, number, workers):
    contents = {f"a/{i}.png": grey(i) for i in range(4)}
    source = load_source(folder_of(tmp_path, contents))
    failures = [0]

    def failing(path, mode, times=2):
        failures[0] += 1
        if failures[0] <= times:
            raise OSError(number, "so says the system")  # of a class that depends on the number
        return open(path, mode)

    monkeypatch.setattr("erw_hf.data.decoding.xopen", failing)
    monkeypatch.setattr("erw_hf.data.retrying.time.sleep", lambda seconds: None)
    samples = training_samples(source, retry_seconds=300)
    order = [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]
    loader = torch.utils.data.DataLoader(samples, batch_sampler=order, num_workers=workers)
    assert [int(p) for batch in loader for p in batch["pixels"][:, 0, 0, 0]] == [0, 1, 2, 3]
    assert samples.skipped == 0

    monkeypatch.setattr("erw_hf.data.decoding.xopen", lambda path, mode: failing(path, mode, times=1e9))
    loader = torch.utils.data.DataLoader(training_samples(source), batch_sampler=order, num_workers=workers)
    with pytest.raises(OSError, match=r"so says the system.*a/[02].png"):
        list(loader)


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path, monkeypatch):
    source = load_source(folder_of(tmp_path, {"a/0.png": grey(0)}))

    class Failing(io.BytesIO):
        def read(self, *args):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("erw_hf.data.decoding.xopen", lambda path, mode: Failing())
    with pytest.raises(OSError, match=r"Input/output error: '.*/a/0.png'"):
        training_samples(source)[0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_without_a_readable_image_is_said_at_once(tmp_path, monkeypatch, workers):
    source = load_source(folder_of(tmp_path, {f"a/{i}.png": BROKEN["truncated"] for i in range(5)}))
    loader = torch.utils.data.DataLoader(training_samples(source), batch_sampler=[[(0, 0)]], num_workers=workers)
    with pytest.raises(ValueError, match=r"none of 5 rows in a row holds a readable image.*a/4.png"):
        list(loader)
    monkeypatch.setattr("erw_hf.data.samples.IN_A_ROW", 3)
    samples = training_samples(source)
    with pytest.raises(ValueError, match=r"none of 3 rows"):
        samples[0, 0]
    assert samples.skipped == 0


def test_evaluation_and_probes_see_what_training_sees(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    pixels = NOISE[:9, :9].copy()
    pixels[..., 3] = np.arange(81).reshape(9, 9) * 3
    contents = {
        "a/0.png": encoded(pixels)["bytes"],
        "a/1.png": encoded(NOISE[:9, :9, :3].copy(), exif=exif)["bytes"],
        "a/2.png": encoded(np.arange(81, dtype=np.uint16).reshape(9, 9) * 800)["bytes"],
    }
    source = load_source(folder_of(tmp_path, contents))
    maker = SampleMaker(source, 8, 3, (3, 8, 8), 0, 0.1, False)
    trained = torch.stack([TrainingSamples(maker)[0, i]["pixels"] for i in range(3)])
    assert torch.equal(dataset_images(str(tmp_path), image_size=8).read([0, 1, 2])[0], trained)
    probed = load_probe_images(source, 3, 8, 3, seed=0).pixels
    assert sorted(probed.flatten(1).tolist()) == sorted(trained.flatten(1).tolist())


def test_images_in_memory_keep_their_order_and_leave_broken_ones_out(tmp_path, caplog):
    """As the trainers of tiny networks and the probes read them."""
    contents = {f"{c}/{i}.png": encoded(NOISE[..., :3] // (1 + i))["bytes"] for c in "ab" for i in (0, 2)}
    source = load_source(folder_of(tmp_path, contents | {"b/1.png": b"no picture"}))
    pixels, labels, paths = read_images(source, 8, 3)
    assert [path[-7:] for path in paths] == ["a/0.png", "a/2.png", "b/0.png", "b/2.png"]
    assert labels.tolist() == [0, 0, 1, 1] and "b/1.png holds no readable image" in caplog.text
    wanted = np.asarray(prepare_image(PILImage.fromarray(NOISE[..., :3] // 3), 8, 3))
    assert np.array_equal(pixels[3].movedim(0, -1), wanted) and pixels.dtype == torch.uint8
    assert read_images(load_source(str(tmp_path), num_classes=0), 8, 3)[1] is None
    with pytest.raises(ValueError, match="none of the images could be read"):
        read_images(replace(source, dataset=source.dataset.select([3])), 8, 3)


def test_nothing_is_said_of_an_ordinary_image(recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded(NOISE[..., :3], "JPEG")


def test_a_random_crop_takes_a_mild_part_and_changes_no_other_draw():
    image = PILImage.fromarray(np.arange(20 * 10, dtype=np.uint8).reshape(20, 10))
    assert crop_at(image, 0, 0, 0).size == (8, 8) and crop_at(image, 0.999, 0.999, 0.999).size == (10, 10)
    corner = np.asarray(crop_at(image, 0, 0.999, 0.999))
    assert corner[-1, -1] == 199 and corner[0, 0] == np.asarray(image)[12, 2]
    assert crop_at(PILImage.new("L", (1, 3)), 0, 0, 0.5).size == (1, 1)
    source = SimpleNamespace(dataset=None)
    plain, cropped = (SampleMaker(source, 8, 1, (1, 8, 8), 0, 0.1, False, random_crop=crop) for crop in (False, True))
    a, b, again = plain(image, 1, 0, 5), cropped(image, 1, 0, 5), cropped(image, 1, 0, 5)
    assert torch.equal(b["pixels"], again["pixels"]) and not torch.equal(a["pixels"], b["pixels"])
    assert all(torch.equal(a[name], b[name]) for name in a if name != "pixels")


def test_12_bits_in_16_are_warned_of_once(caplog):
    decoding._say_dark.cache_clear()
    for high in (4095, 255, 65535):
        buffer = io.BytesIO()
        PILImage.fromarray(np.array([[0, high]], dtype=np.uint16)).save(buffer, "PNG")
        assert decode_image({"bytes": buffer.getvalue(), "path": None})[0].getpixel((1, 0)) == high >> 8
    assert caplog.text.count("so it is nearly black") == 1
