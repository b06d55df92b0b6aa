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
import json
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from datasets.arrow_writer import ArrowWriter
from diffusers import AutoencoderKL
from helpers import check_ended, run_ranks, run_script, train
from PIL import Image as PILImage
from safetensors.torch import load_file

from erw_hf import RepresentationEncoder
from erw_hf.data.cache import check_cache, check_cache_weights
from erw_hf.data.decoding import center_crop
from erw_hf.data.digits import load_digits_dataset
from erw_hf.data.identity import data_identity
from erw_hf.data.latents import encode_moments
from erw_hf.data.source import load_source
from erw_hf.trainer import flops
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.run_record import read_metrics


def cache(folder, vae_path, *flags, processes=1):
    flags = ["--dataset_name=digits", "--dataset_split=test", f"--vae={vae_path}", "--sample_size=8",
             "--rows_per_file=100", f"--output_dir={folder}", *flags]  # fmt: skip
    if processes > 1:
        check_ended(run_ranks(processes, "training/cache_latents.py", *flags))
    else:
        run_script("cache_latents", *flags)


@pytest.fixture(scope="module")
def cached(tmp_path_factory, vae_path):
    folder = tmp_path_factory.mktemp("caches") / "digits"
    cache(folder, vae_path, processes=2)
    return folder


def test_an_encoder_that_overflows_is_upcast_where_it_says_so(vae_path):
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for force_upcast in (True, False):
        vae = AutoencoderKL.from_pretrained(vae_path)
        vae.register_to_config(force_upcast=force_upcast)
        vae.encoder.conv_in.weight.data *= 3e5
        vae.half()
        assert encode_moments(pixels, vae).isfinite().all() == force_upcast and vae.dtype == torch.float16


def test_cache_holds_every_row_once_shuffled_with_its_moments(cached, vae_path):
    assert len(list((cached / "data").glob("*.parquet"))) == 4
    assert not (cached / ".lock").exists()
    rows = load_dataset(str(cached), split="train")
    keys = [int(key) for key in rows["key"]]
    assert sorted(keys) == list(range(359)) and keys != list(range(359))
    source, vae = load_digits_dataset()["test"], AutoencoderKL.from_pretrained(vae_path)
    assert rows.features["label"].names == [str(i) for i in range(10)]
    for row in rows.select([0, 150, 358]):
        image = center_crop(source[int(row["key"])]["image"].convert("RGB"), 16)
        pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]
        expected = encode_moments(pixels, vae)[0]
        stored = np.frombuffer(row["moments"], dtype=np.float16).reshape(8, 8, 8).copy()
        torch.testing.assert_close(torch.from_numpy(stored).float(), expected, atol=2e-3, rtol=2e-3)
        assert row["label"] == source[int(row["key"])]["label"]
        assert np.abs(np.asarray(row["image"], dtype=int) - np.asarray(image, dtype=int)).mean() < 3


def test_statistics_are_those_of_the_moments(cached):
    rows = load_dataset(str(cached), split="train")
    moments = np.stack([np.frombuffer(m, dtype=np.float16).reshape(8, 8, 8) for m in rows["moments"]]).astype(float)
    mean, std = moments[:, :4], moments[:, 4:]
    statistics = json.loads((cached / "latent_statistics.json").read_text())
    np.testing.assert_allclose(statistics["latents_mean"], mean.mean(axis=(0, 2, 3)), atol=1e-3)
    variance = (mean**2 + std**2).mean(axis=(0, 2, 3)) - mean.mean(axis=(0, 2, 3)) ** 2
    np.testing.assert_allclose(statistics["latents_std"], np.sqrt(variance), rtol=1e-2)


def test_a_stopped_run_goes_on_and_other_settings_are_refused(cached, vae_path, tmp_path):

    folder = tmp_path / "cut"
    shutil.copytree(cached, folder)
    first, *others = sorted((folder / "data").glob("*.parquet"))
    time_of_first, expected = first.stat().st_mtime_ns, others[0].read_bytes()
    others[0].unlink()
    cache(folder, vae_path)
    assert first.stat().st_mtime_ns == time_of_first  # not written again
    assert others[0].read_bytes() == expected
    with pytest.raises(ValueError, match="was begun with another seed"):
        cache(folder, vae_path, "--seed=1")


def test_an_autoencoder_with_other_weights_is_refused_whatever_its_name(cached, vae_path, tmp_path):
    """Trained anew in place, or another run's: every pipeline's is called vae."""
    vae, other = AutoencoderKL.from_pretrained(vae_path), tmp_path / vae_path.name
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(other)
    folder = tmp_path / "cut"
    shutil.copytree(cached, folder)
    with pytest.raises(ValueError, match="was begun with another vae and vae_sha256"):
        cache(folder, other)
    check_cache_weights(str(cached), "v", AutoencoderKL.from_pretrained(vae_path))
    with pytest.raises(ValueError, match="made with other weights than v has"):
        check_cache_weights(str(cached), "v", vae)
    before = data_identity(load_source(str(folder)), str(folder))
    record = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(record | {"vae_sha256": "another"}))
    assert data_identity(load_source(str(folder)), str(folder))["fingerprint"] != before["fingerprint"]


def test_a_cache_without_its_record_is_warned_of(cached, vae_path, tmp_path, caplog):
    shutil.copytree(cached / "data", tmp_path / "moved")
    check_cache(False, [], vars(TrainingConfig(dataset_name=f"{tmp_path}/moved", vae=str(vae_path), sample_size=8)))
    assert "nothing tells which autoencoder made it" in caplog.text


@pytest.mark.parametrize(
    ("flag", "allowed"),
    [
        ("rows_per_file=0", "be at least 1"), ("batch_size=-1", "be at least 1"), ("sample_size=0", "be at least 1"),
        ("jpeg_quality=101", "lie in [1, 100]"), ("seed=-1", "lie in [0, 4294967295]"), ("num_classes=-1", "be at least 0"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_end_it_at_once(flag, allowed, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_script("cache_latents", "--dataset_name=digits", "--vae=a/b", f"--output_dir={tmp_path}/c", f"--{flag}")
    assert f"--{flag.split('=')[0]} must {allowed}, got" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_cache_has_one_owner(tmp_path, monkeypatch):
    def in_use(lock):
        raise ValueError(f"{lock.folder} belongs to a run that goes on")

    monkeypatch.setattr("erw_hf.trainer.run_lock.RunLock.acquire", in_use)
    with pytest.raises(ValueError, match="belongs to a run that goes on"):
        run_script("cache_latents", "--dataset_name=digits", "--vae=no/vae", f"--output_dir={tmp_path}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("streaming", [False, True])
def test_training_reads_the_cache_and_never_encodes(cached, vae_path, tmp_path, tiny_flags, monkeypatch, streaming):
    monkeypatch.setattr(flops, "encode_moments", encode_moments)  # imported before the other is replaced
    monkeypatch.setattr("erw_hf.data.latents.encode_moments", _refuse_after_the_check())
    flags = [*tiny_flags, f"--dataset_name={cached}", f"--vae={vae_path}", "--in_channels=4"]
    flags += ["--streaming"] if streaming else []
    train(*flags, f"--output_dir={tmp_path}/run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 7 and all(np.isfinite(record["loss"]) for record in records)
    assert load_file(tmp_path / "run" / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="set vae to"):
        train(*tiny_flags, f"--dataset_name={cached}", f"--output_dir={tmp_path}/other")
    with pytest.raises(ValueError, match="--flipped"):
        train(*flags, "--random_flip", f"--output_dir={tmp_path}/third")


def _refuse_after_the_check():
    """The one call that training may make is the check of the autoencoder's shape, on one black image."""

    def encode(pixels, vae):
        assert pixels.shape[0] == 1 and pixels.abs().max() == 0, "training encoded images that are cached"
        return encode_moments(pixels, vae)

    return encode


def test_flipped_twins(vae_path, tmp_path):
    cache(tmp_path / "cache", vae_path, "--flipped")
    rows = load_dataset(str(tmp_path / "cache"), split="train")
    by_key = {key: i for i, key in enumerate(rows["key"])}
    assert len(by_key) == 2 * 359
    plain, flipped = rows[by_key["17"]], rows[by_key["17-flipped"]]
    difference = np.asarray(plain["image"], dtype=int)[:, ::-1] - np.asarray(flipped["image"], dtype=int)
    assert np.abs(difference).mean() < 3 and plain["label"] == flipped["label"]


def test_a_file_of_broken_images_alone_is_no_end(vae_path, tmp_path, capsys):
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    images = [PILImage.new("RGB", (16, 16))] + [{"bytes": b"no image", "path": "bad.png"}] * 2
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"image": images, "label": [0] * 3}, features=features).to_parquet(
        tmp_path / "data" / "a.parquet"
    )
    cache(
        tmp_path / "cache", vae_path, f"--dataset_name={tmp_path}/data", "--dataset_split=train", "--rows_per_file=1"
    )
    assert load_dataset(str(tmp_path / "cache"), split="train")["key"] == ["0"]
    assert "1 rows in 3 files (left out 2 that cannot be read): " in capsys.readouterr().out
    assert len(json.loads((tmp_path / "cache" / "latent_statistics.json").read_text())["latents_mean"]) == 4


def test_tokens_wait_in_memory_for_one_batch_alone(vae_path, encoder_path, tmp_path, monkeypatch):
    """Those of a file of 20,000 images are 8 GB."""
    sizes = []
    write = ArrowWriter.write_batch
    monkeypatch.setattr(
        ArrowWriter, "write_batch", lambda self, batch: sizes.append(len(batch["features"])) or write(self, batch)
    )
    run_script(
        "cache_latents", "--dataset_name=digits", "--dataset_split=test", f"--vae={vae_path}", "--sample_size=8",
        f"--encoder={encoder_path}", "--rows_per_file=200", "--batch_size=32", f"--output_dir={tmp_path}/cache",
    )  # fmt: skip
    assert max(sizes) == 32 and sum(sizes) == 359
    rows = load_dataset(str(tmp_path / "cache"), split="train")
    assert sorted(map(int, rows["key"])) == list(range(359)) and len(rows[0]["features"]) == 4 * 4 * 16 * 2
    assert not list((tmp_path / "cache" / "data").glob(".*"))


def test_cached_features_stand_in_for_the_encoder(vae_path, encoder_path, tmp_path, tiny_flags, monkeypatch):
    """The same losses as with the encoder running, up to bfloat16, and neither images nor encoder are touched."""
    cache(tmp_path / "cache", vae_path, f"--encoder={encoder_path}")
    flags = [*tiny_flags, f"--vae={vae_path}", "--in_channels=4", "--seed=3"]
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "cache", plain)
    for path in (plain / "data").glob("*.parquet"):
        Dataset.from_parquet(str(path)).remove_columns("features").to_parquet(path)
    train(*flags, f"--dataset_name={plain}", f"--output_dir={tmp_path}/encoded")

    def refuse(*args):
        raise AssertionError("looked at what is cached")

    monkeypatch.setattr("erw_hf.data.samples.decode_image", refuse)
    forward = RepresentationEncoder.forward
    monkeypatch.setattr(
        RepresentationEncoder, "forward", lambda self, x: refuse() if x.abs().sum() else forward(self, x)
    )
    losses = {}
    for streaming in ([], ["--streaming"]):
        run = tmp_path / f"cached{len(streaming)}"
        train(*flags, *streaming, f"--dataset_name={tmp_path}/cache", f"--output_dir={run}")
        losses[len(streaming)] = [record["loss"] for record in read_metrics(run / "metrics.jsonl")]
    encoded = [record["loss"] for record in read_metrics(tmp_path / "encoded" / "metrics.jsonl")]
    # Images are cached as JPEG, tokens come of the images themselves: close, not equal.
    assert losses[0] == pytest.approx(encoded, rel=2e-2)
    assert len(losses[1]) == len(encoded)
    with pytest.raises(ValueError, match="the cache holds tokens of"):
        train(
            *flags,
            "--patch_size=4",
            "--attention_head_dim=32",
            f"--dataset_name={tmp_path}/cache",
            f"--output_dir={tmp_path}/other",
        )


def test_without_an_encoder_no_image_is_decoded(cached, vae_path, tmp_path, tiny_flags, monkeypatch):
    def refuse(*args):
        raise AssertionError("decoded an image that nobody needs")

    monkeypatch.setattr("erw_hf.data.samples.decode_image", refuse)
    monkeypatch.setattr("erw_hf.data.streaming.decode_image", refuse)
    flags = [*tiny_flags, f"--dataset_name={cached}", f"--vae={vae_path}", "--in_channels=4", "--warmup_steps=0"]
    for streaming in ([], ["--streaming"]):
        train(*flags, *streaming, "--alignment_weight=0", f"--output_dir={tmp_path}/run{len(streaming)}")
