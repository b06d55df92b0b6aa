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
"""The statistics and the numbers of an evaluation, on features, against torch-fidelity and ADM's formulas."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import REPOSITORY, REPRESENTATION_ARCHITECTURES, run_forked
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from erw_hf.data.digits import load_digits_dataset
from erw_hf.evaluation import frechet_distance, quality
from erw_hf.evaluation.extractors import (
    REPRESENTATIONS,
    ClassifierExtractor,
    InceptionExtractor,
    RepresentationExtractor,
    describe_extractors,
    load_extractor,
)
from erw_hf.evaluation.feature_statistics import Features, FeatureStatistics, extract_features
from erw_hf.evaluation.images import ImageSet, NpzWriter, dataset_images, npz_images, take
from erw_hf.evaluation.metrics import (
    frechet_estimate,
    inception_score,
    mind_estimate,
    precision_recall,
    standard_error,
)
from erw_hf.evaluation.quality import (
    Reference,
    available_metrics,
    extractor_hashes,
    load_reference,
    make_reference,
    measure,
    quality_metrics,
    reference_file,
    save_reference,
)
from erw_hf.provenance import weights_hash


CLASSIFIER = REPOSITORY / "pipelines" / "digits-classifier"


def draw(seed, count=600, dim=48):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7)) / dim**0.5
    return torch.randn(count, dim, generator=generator) @ mix + 0.3 * torch.randn(dim, generator=generator)


def process(index=0, count=1):
    """What extract_features uses of an Accelerator, one process after another."""
    return SimpleNamespace(
        process_index=index, num_processes=count, is_main_process=index == 0, device=torch.device("cpu"),
        wait_for_everyone=lambda: None,
    )  # fmt: skip


def images_of(pixels, labels=None):
    return ImageSet(
        len(pixels), tuple(pixels.shape[2:]),
        lambda indices: (pixels[list(indices)], None if labels is None else labels[list(indices)]),
    )  # fmt: skip


class MeanColours(torch.nn.Module):
    """An extractor whose features are easy to foresee."""

    layers, num_classes = ("pool", "logits"), 3

    def forward(self, images):
        pool = images.float().flatten(2)[:, :, ::7].flatten(1) / 255
        return {"pool": pool, "logits": pool[:, :3]}


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def measured(tmp_path):
    """Samples and a reference, as extract_features leaves them."""
    samples, real, logits = draw(0), draw(1, 500), 3 * draw(2, 600, 10)
    statistics = []
    for features in (samples, real):
        statistics.append(FeatureStatistics(features.shape[1]))
        statistics[-1].update(features)
    for batch, name in ((0, "pool-0000000"), (1, "pool-0000001")):
        np.save(tmp_path / f"{name}.npy", samples[batch * 300 : (batch + 1) * 300].numpy())
    np.save(tmp_path / "logits-0000000.npy", logits.numpy())
    np.save(tmp_path / "labels-0000000.npy", np.arange(600) % 10)
    features = Features({"pool": statistics[0]}, tmp_path, {})
    reference = Reference(tmp_path / "r.npz", {"pool": statistics[1].mean_and_covariance()})
    return samples, real, logits, features, reference


def test_streamed_statistics_are_those_of_the_whole_matrix():
    features = draw(0, 1000)
    parts = [FeatureStatistics(48) for _ in range(3)]
    for number, batch in enumerate(features.split(64)):
        parts[number % 3].update(batch)
    for other in parts[1:]:
        parts[0].merge(other)
    mu, sigma = parts[0].mean_and_covariance()
    np.testing.assert_allclose(mu, features.double().mean(0).numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.double().numpy(), rowvar=False), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="at least 2 samples, there are 1"):
        one = FeatureStatistics(48)
        one.update(features[:1])
        one.mean_and_covariance()


def test_fid_is_torch_fidelitys_and_adms(measured):
    samples, real, _, features, reference = measured
    fid = quality_metrics(["fid"], features, reference).metrics["fid"]
    statistics = [fid_features_to_statistics(x.double()) for x in (samples, real)]
    assert fid == pytest.approx(
        fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"], rel=1e-6
    )
    (mu1, sigma1), (mu2, sigma2) = ((s["mu"], s["sigma"]) for s in statistics)
    adm = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * scipy.linalg.sqrtm(sigma1 @ sigma2).real)
    assert fid == pytest.approx(adm, rel=1e-6)


def test_inception_score_is_adms(measured):
    _, _, logits, features, reference = measured
    found = quality_metrics(["inception_score", "accuracy"], features, reference).metrics
    p = torch.softmax(logits.double(), dim=1).numpy()
    divergence = (p * (np.log(p) - np.log(p.mean(0, keepdims=True)))).sum(1).mean()
    assert found["inception_score"] == pytest.approx(np.exp(divergence), rel=1e-9)
    assert found["accuracy"] == pytest.approx((p.argmax(1) == np.arange(600) % 10).mean())


def test_inception_score_takes_consecutive_5000_as_adm(tmp_path, measured):
    logits = 3 * draw(3, 10_000, 10)
    np.save(tmp_path / "logits-0000000.npy", logits.numpy())
    found = quality_metrics(["inception_score"], measured[3], measured[4]).metrics
    scores = []
    for p in torch.softmax(logits.double(), dim=1).split(5000):
        scores.append((p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item())
    assert found["inception_score"] == pytest.approx(np.mean(scores), rel=1e-9)
    assert found["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-6)


def test_precision_and_recall_are_torch_fidelitys_and_adms(measured):
    samples, real, _, features, reference = measured
    found = quality_metrics(["precision_recall"], features, reference, {"pool": real}).metrics
    expected = prc_features_to_metric(samples, real, verbose=False)
    for name in ("precision", "recall"):  # theirs is a mean in float32
        assert found[name] == pytest.approx(expected[name], abs=1e-7)

    def inside(points, manifold, k=3):
        """ADM: within the distance of some point of the manifold to its k-th neighbour."""
        points, manifold = points.double().numpy(), manifold.double().numpy()
        radii = np.sort(((manifold[:, None] - manifold) ** 2).sum(-1), axis=1)[:, k]
        return (((points[:, None] - manifold) ** 2).sum(-1) <= radii).any(axis=1).mean()

    assert found["precision"] == pytest.approx(inside(samples, real), abs=1e-9)
    assert found["recall"] == pytest.approx(inside(real, samples), abs=1e-9)
    assert 0.05 < found["recall"] < 0.95


def test_kid_is_torch_fidelitys_and_its_definition(measured):
    samples, real, _, features, reference = measured
    found = quality_metrics(["kid"], features, reference, {"pool": real}).metrics
    expected = kid_features_to_metric(samples.double(), real.double(), kid_subset_size=500, verbose=False)
    assert found["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert found["kid_std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    # One subset of all: the unbiased estimate itself.
    x, y = samples[:500].double().numpy(), real.double().numpy()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    mmd = sum((kernel(a, a).sum() - np.trace(kernel(a, a))) / (n * (n - 1)) for a in (x, y)) - 2 * kernel(x, y).mean()
    whole = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=500, kid_subsets=1, verbose=False
    )
    assert whole["kernel_inception_distance_mean"] == pytest.approx(mmd, rel=1e-6)


def test_without_torch_fidelity_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"pip install torch-fidelity"):
        load_extractor("inception")


def test_any_number_of_processes_gives_the_same_statistics(pixels, tmp_path):
    runs = {}
    for count in (1, 2, 3):
        for index in reversed(range(count)):  # the last one sees what all have done
            features = extract_features(
                images_of(pixels, torch.arange(50)), [MeanColours()], process(index, count), tmp_path / str(count), 8,
                ["pool"],
            )  # fmt: skip
        runs[count] = features
    mu, sigma = runs[1].statistics["pool"].mean_and_covariance()
    for count in (2, 3):
        other_mu, other_sigma = runs[count].statistics["pool"].mean_and_covariance()
        assert abs(other_mu - mu).max() <= 1e-12 and abs(other_sigma - sigma).max() <= 1e-12
        assert torch.equal(runs[count].layer("pool"), runs[1].layer("pool"))
        assert torch.equal(runs[count].layer("labels"), torch.arange(50))
    assert runs[3].statistics["pool"].count == 50 and "logits" not in runs[3].statistics


@pytest.mark.parametrize("restart", [1, 2])
def test_what_was_done_is_not_done_again(pixels, tmp_path, restart):
    """Stopped inside a batch and gone on with, by as many processes: the very bits; by others: the same to 1e-12."""
    whole = extract_features(images_of(pixels), [MeanColours()], process(), tmp_path / "whole", 8, ["pool"])
    read = []

    def stop(indices):
        read.append(indices[0])
        if len(read) == 5:
            raise KeyboardInterrupt
        return pixels[list(indices)], None

    stopping = ImageSet(50, (8, 8), stop)
    with pytest.raises(KeyboardInterrupt):
        extract_features(stopping, [MeanColours()], process(), tmp_path / "cut", 8, ["pool"], save_steps=2)
    for index in reversed(range(restart)):
        cut = extract_features(stopping, [MeanColours()], process(index, restart), tmp_path / "cut", 8, ["pool"])
    # Batches 0 to 3 were saved; the fifth was not, and is read again.
    assert read[:5] == [0, 8, 16, 24, 32] and sorted(read[5:]) == [32, 40, 48]
    assert torch.equal(cut.layer("pool"), whole.layer("pool"))
    difference = (cut.statistics["pool"].products - whole.statistics["pool"].products).abs().max()
    assert difference == 0 if restart == 1 else difference <= 1e-12


def test_reference_file_has_adms_names_and_reads_back(pixels, tmp_path):
    features = extract_features(images_of(pixels), [MeanColours()], process(), tmp_path / "work", 8, ["pool"])
    save_reference(tmp_path / "r.npz", features, images_of(pixels), 0, {"extractor": "hash"})
    with np.load(tmp_path / "r.npz") as file:
        assert {"mu", "sigma", "arr_0"} <= set(file.files)
        assert file["arr_0"].shape == (50, 8, 8, 3)
    reference = load_reference(tmp_path / "r.npz", ["fid", "kid"], {"extractor": "hash"}, (8, 8))
    assert quality_metrics(["fid"], features, reference).metrics["fid"] == pytest.approx(0, abs=1e-9)
    assert torch.equal(npz_images(tmp_path / "r.npz").read([3, 49])[0], pixels[[3, 49]])


def test_the_name_of_a_reference_tells_what_it_is_made_of(tmp_path):
    networks = [torch.nn.Linear(2, 2) for _ in range(2)]
    for index in range(3):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{index}.png")
    small, large = (dataset_images(str(tmp_path), image_size=size, num_classes=0) for size in (8, 16))
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "2.png")
    changed = dataset_images(str(tmp_path), image_size=8, num_classes=0)
    made_of = ("digits", "train", changed, networks[:1], 0)
    others = [("faces", *made_of[1:]), ("digits", "test", *made_of[2:]), (*made_of[:2], large, networks[:1], 0)]
    others += [(*made_of[:3], networks[1:], 0), (*made_of[:3], networks, 0), (*made_of[:4], 1)]
    assert len({reference_file(tmp_path, *arguments) for arguments in (made_of, *others, made_of)}) == 7


def test_a_reference_that_does_not_serve_says_what_to_get(pixels, tmp_path, measured):
    path = tmp_path / "r.npz"
    with pytest.raises(FileNotFoundError, match="VIRTUAL_imagenet256"):
        load_reference(path, ["fid"], {"extractor": "hash"}, (8, 8))
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="no mu and sigma, which fid needs.*--save_reference.*https://"):
        load_reference(path, ["fid"], {"extractor": "hash"}, (8, 8))
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match="no mu_s and sigma_s, which sfid needs"):
        load_reference(path, ["fid", "sfid"], {"extractor": "hash"}, (8, 8))
    with pytest.raises(ValueError, match="no images .*--metrics"):
        load_reference(path, ["fid", "kid"], {"extractor": "hash"}, (8, 8))
    with pytest.raises(ValueError, match="4 features, the extractor 48"):
        quality_metrics(["fid"], measured[3], load_reference(path, ["fid"], {"extractor": "hash"}, (8, 8)))
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), extractor="other")
    with pytest.raises(ValueError, match="another extractor"):
        load_reference(path, ["fid"], {"extractor": "hash"}, (8, 8))
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"of \(8, 8\) px images, the samples are \(16, 16\) px"):
        load_reference(path, ["fid"], {"extractor": "hash"}, (16, 16))


def test_images_that_cannot_be_measured(pixels, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(4))
    with pytest.raises(ValueError, match="holds no images"):
        npz_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match="uint8"):
        npz_images(tmp_path / "a.npz")
    from PIL import Image

    folder = tmp_path / "folder"
    folder.mkdir()
    for name, size in (("a", (8, 8)), ("b", (8, 10))):
        Image.new("L", size).save(folder / f"{name}.png")
    with pytest.raises(ValueError, match="image 1 of .* is 8x10 px, others are 8x8: set --image_size"):
        dataset_images(str(folder)).read([0, 1])
    assert dataset_images(str(folder), image_size=4).read([0, 1])[0].shape == (2, 3, 4, 4)


def test_npz_writer_fills_adms_layout_from_any_process(pixels, tmp_path, monkeypatch):
    monkeypatch.delattr("os.link")  # which not every file system has
    writers = [NpzWriter(tmp_path / "s.npz", 50) for _ in range(2)]
    for start in range(0, 50, 8):
        writers[start // 8 % 2].write(range(start, min(start + 8, 50)), pixels[start : start + 8])
    for writer in writers:
        writer.close(is_main_process=writer is writers[1])
    assert torch.equal(npz_images(tmp_path / "s.npz").read(range(50))[0], pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
    some = take(npz_images(tmp_path / "s.npz"), 20, seed=0)
    assert some.count == 20 and len({tuple(image.flatten().tolist()) for image in some.read(range(20))[0]}) == 20


def test_inception_is_torch_fidelitys_with_adms_spatial_features(inception_weights, pixels):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_weights))
    mixed = []
    theirs.Mixed_6d.register_forward_hook(lambda module, inputs, output: mixed.append(output))
    pool, logits = theirs(pixels[:2])
    ours = load_extractor("inception", str(inception_weights))(pixels[:2])
    assert torch.equal(ours["pool"], pool) and torch.equal(ours["logits"], logits)
    assert pool.std() > 1e-3 and ours["spatial"].std() > 1e-3
    # mixed_6/conv is the first branch of the concatenation; ADM takes [..., :7] of NHWC.
    expected = mixed[0].permute(0, 2, 3, 1)[..., :7].reshape(2, -1)
    assert ours["spatial"].shape == (2, 2023) and torch.equal(ours["spatial"], expected)


def test_missing_inception_weights_say_where_they_are(monkeypatch):
    from urllib.error import URLError

    from torch_fidelity import feature_extractor_inceptionv3 as module

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="https://github.com/toshas/.*--inception_weights"):
        InceptionExtractor()
    with pytest.raises(OSError, match="--inception_weights"):
        InceptionExtractor("nowhere.pth")


def test_dinov2_features_are_the_class_token_at_224_px(encoder_path, pixels):
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    extractor = RepresentationExtractor("dinov2", str(encoder_path))
    found = extractor(pixels[:1])["dinov2"]
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    processor = AutoImageProcessor.from_pretrained(encoder_path, backend="pil")  # whose mean is not ImageNet's
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std))
    values = (values - mean) / std
    expected = AutoModel.from_pretrained(encoder_path).eval()(values[None]).last_hidden_state[:, 0]
    assert torch.allclose(found, expected, atol=0.02)  # PIL rounds to 8 bits


def test_the_shipped_classifier_reads_digits_it_has_not_seen():
    extractor = ClassifierExtractor(str(CLASSIFIER))
    assert extractor.layers == ("pool", "logits") and extractor.num_classes == 10
    split = load_digits_dataset()["test"]
    images = torch.stack([torch.from_numpy(np.asarray(image.convert("RGB")).copy()) for image in split["image"]])
    features = extractor(images.permute(0, 3, 1, 2))
    assert features["pool"].shape == (359, 64)
    assert (features["logits"].argmax(1) == torch.tensor(list(split["label"]))).float().mean() > 0.97
    assert (CLASSIFIER / "model.safetensors").stat().st_size < 2**20
    assert available_metrics([extractor], 10) == [
        "fid", "inception_score", "precision_recall", "kid", "mind", "accuracy",
    ]  # fmt: skip
    assert "accuracy" not in available_metrics([extractor], 0)


def test_a_classifier_of_other_classes_is_warned_of(caplog):
    extractor = ClassifierExtractor(str(CLASSIFIER))
    names = {i: str(i) for i in range(10)}
    assert "accuracy" in available_metrics([extractor], 10, names) and not caplog.records
    available_metrics([extractor], 10, names | {3: "4", 4: "3"})
    assert "class 3 is '4', but '3' to the classifier" in caplog.text


def test_hash_tells_weights_apart():
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    assert weights_hash(models[0]) == weights_hash(models[0]) != weights_hash(models[1])


def test_frechet_distance_at_the_width_of_inception():
    """Fewer samples than dimensions, as in every small evaluation."""
    x, y = draw(0, 100, 256).double(), draw(1, 100, 256).double()
    statistics = [fid_features_to_statistics(features) for features in (x, y)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    found = frechet_distance(*(s[name] for s in statistics for name in ("mu", "sigma")))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", REPRESENTATION_ARCHITECTURES)
def test_representations_are_timms_vectors_of_the_whole_image(name, representation_paths, pixels):
    from PIL import Image

    extractor = RepresentationExtractor(name, str(representation_paths[name]))
    found = extractor(pixels[:2])
    assert list(found) == [name] and not extractor.published
    size = REPRESENTATIONS[name].size
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), 3) for image in pixels[:2]]
    values = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in images]).permute(0, 3, 1, 2) / 255
    values = (values - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    network = extractor.model.timm_model
    with torch.no_grad():
        features = network.forward_features(values)
        expected = {
            "convnext": lambda: features.mean((2, 3)),
            "siglip_cls": lambda: network.attn_pool(features),
        }.get(name, lambda: features[:, 0])()
    torch.testing.assert_close(found[name], expected, atol=0.05, rtol=0.02)  # PIL rounds to 8 bits
    assert found[name].shape == (2, 16) and found[name].std() > 0


def test_a_representation_without_its_weights_is_refused_and_its_processor_followed(encoder_path, tmp_path):
    """A training checkpoint's names; transformers would leave the model random."""
    shutil.copytree(encoder_path, tmp_path / "dino")
    settings = json.loads((tmp_path / "dino/preprocessor_config.json").read_text())
    (tmp_path / "dino/preprocessor_config.json").write_text(json.dumps({**settings, "do_normalize": False}))
    extractor = RepresentationExtractor("dinov2", str(tmp_path / "dino"))
    assert extractor.mean.flatten().tolist() == [0.0] * 3 and extractor.std.flatten().tolist() == [1.0] * 3
    file = tmp_path / "dino/model.safetensors"
    save_file({f"student.backbone.{name}": x for name, x in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights of"):
        RepresentationExtractor("dinov2", str(tmp_path / "dino"))


def test_a_classifier_in_half_precision_runs_in_float32(tmp_path):
    shutil.copytree(CLASSIFIER, tmp_path / "classifier")
    file = tmp_path / "classifier/model.safetensors"
    save_file(
        {name: x.half() if x.is_floating_point() else x for name, x in load_file(file).items()}, file, {"format": "pt"}
    )
    config = json.loads((tmp_path / "classifier/config.json").read_text()) | {"dtype": "float16"}
    (tmp_path / "classifier/config.json").write_text(json.dumps(config))
    features = load_extractor(str(tmp_path / "classifier"))(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert features["pool"].dtype == torch.float32


def test_a_model_without_a_vector_for_the_image_is_refused(tmp_path, pixels):
    from transformers import IJepaConfig, IJepaModel, ViTImageProcessorPil

    IJepaModel(
        IJepaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224)
    ).save_pretrained(tmp_path)
    ViTImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="IJepaModel. has neither a class token nor a pooled vector"):
        RepresentationExtractor("dinov2", str(tmp_path))(pixels[:1])


def features_of(draws, folder):
    """Of layer -> (N, D), as extract_features leaves them."""
    folder.mkdir(exist_ok=True)
    statistics = {}
    for layer, values in draws.items():
        np.save(folder / f"{layer}-0000000.npy", values)
        statistics[layer] = FeatureStatistics(values.shape[1])
        statistics[layer].update(torch.from_numpy(values))
    return Features(statistics, folder, {})


def test_fdr6_is_the_mean_of_six_distances_in_units_of_validation_images(tmp_path):
    rng = np.random.default_rng(0)
    layers = ["pool", *REPRESENTATION_ARCHITECTURES]
    shared = rng.standard_normal((400, 1))
    draws = {layer: (rng.standard_normal((400, 6)) + shared).astype(np.float32) for layer in layers}
    samples = features_of(draws, tmp_path / "samples")
    reference = Reference(tmp_path, {layer: (np.zeros(6), 2 * np.eye(6)) for layer in layers})
    names = ["fid", *(f"fd_{name}" for name in REPRESENTATION_ARCHITECTURES)]
    found = quality_metrics([*names, "fdr6"], samples, reference)
    units = [1.68, 56.87, 14.19, 0.04, 0.60, 5.60]  # FD-loss's FDR_VALIDATION_FD
    ratios = [found.metrics[name] / unit for name, unit in zip(names, units, strict=True)]
    assert found.metrics["fdr6"] == pytest.approx(np.mean(ratios))
    # Of the same samples: the error of the mean is not that of independent terms.
    independent = np.sqrt(sum((found.errors[name] / unit) ** 2 for name, unit in zip(names, units, strict=True))) / 6
    assert found.errors["fdr6"] > 1.02 * independent
    assert found.bias["fdr6"] == pytest.approx(np.mean([found.bias[n] / u for n, u in zip(names, units, strict=True)]))


def test_fdr6_is_of_the_published_networks_alone(representation_paths):
    others = [
        SimpleNamespace(layers=(name,), published=name != "mae_cls", num_classes=0) for name in representation_paths
    ]
    inception = SimpleNamespace(layers=("pool", "spatial", "logits"), num_classes=0)
    assert "fdr6" not in available_metrics([inception, *others], 0)
    others[2].published = True
    assert "fdr6" in available_metrics([inception, *others], 0)
    assert "fdr6" not in available_metrics([inception, *others[1:]], 0)
    assert "fdr6" not in available_metrics([SimpleNamespace(layers=("pool",), num_classes=0), *others], 0)


def test_a_reference_knows_the_weights_of_every_network(pixels, tmp_path, representation_paths):
    networks = [MeanColours(), RepresentationExtractor("mae_cls", str(representation_paths["mae_cls"]))]
    features = extract_features(images_of(pixels), networks, process(), tmp_path / "work", 25)
    hashes = extractor_hashes(networks)
    assert set(hashes) == {"extractor", "extractor_mae_cls"}
    save_reference(tmp_path / "r.npz", features, images_of(pixels), 0, hashes)
    assert (
        load_reference(tmp_path / "r.npz", ["fid", "fd_mae_cls"], hashes, (8, 8)).statistics["mae_cls"][0].size == 16
    )
    with pytest.raises(ValueError, match=r"other weights of it \(extractor_mae_cls\)"):
        load_reference(tmp_path / "r.npz", ["fid"], hashes | {"extractor_mae_cls": "other"}, (8, 8))
    described = describe_extractors(networks, ["colours", "some/mae"])
    assert described["mae_cls"] == "some/mae" and len(described["mae_cls_sha256"]) == 64
    assert (
        described["mae_cls_preprocessing"]
        == "bicubic with antialias to 224 px, mean [0.1, 0.2, 0.3], std [0.4, 0.5, 0.6]"
    )


DRAWS = 20


def test_standard_errors_are_the_spread_of_repeated_draws(tmp_path):
    """Within 25 %, which is also how well 20 draws know their own spread."""
    rng, dim, count = np.random.default_rng(1), 8, 600
    mix = rng.standard_normal((dim, dim)).astype(np.float32) / dim**0.5
    real = np.maximum(rng.standard_normal((800, dim)).astype(np.float32) @ mix, -0.3)
    reference = Reference(tmp_path, {"pool": (real.mean(0, dtype=np.float64), np.cov(real, rowvar=False))})
    metrics, found = ["fid", "inception_score", "precision_recall", "kid", "mind", "accuracy"], []
    for _ in range(DRAWS):
        x = 1.1 * np.maximum(rng.standard_normal((count, dim)).astype(np.float32) @ mix, -0.25)
        samples = features_of(
            {"pool": x.astype(np.float32), "logits": (4 * x).astype(np.float32)}, tmp_path / "samples"
        )
        np.save(tmp_path / "samples" / "labels-0000000.npy", np.full(count, 3))
        found.append(quality_metrics(metrics, samples, reference, {"pool": torch.from_numpy(real)}))
    for name in ("fid", "inception_score", "precision", "recall", "kid", "mind", "accuracy"):
        spread = np.std([quality.metrics[name] for quality in found], ddof=1)
        assert np.mean([quality.errors[name] for quality in found]) == pytest.approx(spread, rel=0.25), name


@pytest.mark.parametrize("per_feature", [0.5, 3, 12])
def test_the_error_of_a_frechet_distance_holds_for_few_samples_per_feature(per_feature):
    """From influences alone it is up to 1.65 times the spread; 40 draws know that within 11 %."""
    rng, dim, found = np.random.default_rng(0), 24, []
    mix = rng.standard_normal((dim, dim)) / dim**0.5
    for _ in range(40):
        x = np.maximum(rng.standard_normal((int(per_feature * dim), dim)) @ mix, -0.3)
        found.append(frechet_estimate(x, (x.mean(0), np.cov(x, rowvar=False)), (np.zeros(dim), 0.9 * mix.T @ mix)))
    spread = np.std([estimate.value for estimate in found], ddof=1)
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(spread, rel=0.3)
    assert np.mean([standard_error(estimate.influence) for estimate in found]) > 1.02 * np.mean(
        [x.error for x in found]
    )


def test_bias_is_what_few_samples_add(tmp_path):
    rng, dim = np.random.default_rng(0), 16
    mu, sigma = np.zeros(dim), 1.2 * np.eye(dim)
    few = [rng.standard_normal((500, dim)) + 0.05 for _ in range(DRAWS)]
    estimates = [frechet_estimate(x, (x.mean(0), np.cov(x, rowvar=False)), (mu, sigma)) for x in few]
    true = dim * (0.05**2 + (1 - 1.2**0.5) ** 2)
    added = np.mean([estimate.value for estimate in estimates]) - true
    assert added > 0.02 and np.mean([estimate.bias for estimate in estimates]) == pytest.approx(added, rel=0.25)
    logits = 2 * rng.standard_normal((200, 400, 10))
    scores = [np.exp(kl_of(x)) for x in logits]
    whole = np.exp(kl_of(logits.reshape(-1, 10)))
    found = np.mean([inception_score(x, 5000)[3] for x in logits])
    assert found == pytest.approx(np.mean(scores) - whole, rel=0.25) and found < 0


def test_bias_does_not_depend_on_the_order_of_the_classes():
    """`--labels balanced` alternates between them."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((10, 8))
    x, y = (rng.standard_normal((1000, 8)) + centres[np.arange(1000) % 10] for _ in range(2))
    mixed = rng.permutation(x)
    statistics = (y.mean(0), np.cov(y, rowvar=False))
    found = [frechet_estimate(z, (z.mean(0), np.cov(z, rowvar=False)), statistics).bias for z in (x, mixed)]
    assert abs(found[0]) < 3 * abs(found[1]) + 0.1
    found = [mind_estimate(z.astype(np.float32), y.astype(np.float32), 200).bias for z in (x, mixed)]
    assert abs(found[0]) < 3 * abs(found[1]) + 0.5


def kl_of(logits):
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return (p * np.log(p / p.mean(0))).sum(1).mean()


def test_influence_is_the_derivative_along_the_weight_of_a_sample():
    """Against moving a little weight to one sample, by the weighted definition."""
    rng = np.random.default_rng(0)
    x, mu, sigma = rng.standard_normal((200, 5)), rng.standard_normal(5), np.diag(rng.uniform(0.5, 2, 5))

    def distance(weights):
        mean = weights @ x
        return frechet_distance(mean, (x - mean).T @ (weights[:, None] * (x - mean)), mu, sigma)

    even = np.full(200, 1 / 200)
    estimate = frechet_estimate(x, (x.mean(0), np.cov(x, rowvar=False, bias=True)), (mu, sigma))
    for i in (0, 7, 199):
        moved = (1 - 1e-6) * even + 1e-6 * (np.arange(200) == i)
        assert (distance(moved) - distance(even)) / 1e-6 == pytest.approx(estimate.influence[i], rel=1e-3, abs=1e-4)


def test_mind_is_its_definition_and_three_times_a_shift():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((300, 4)).astype(np.float32), 1.5 * rng.standard_normal((300, 4)).astype(np.float32)
    directions = np.random.default_rng(5)
    for side in (x, y):
        directions.permutation(len(side))
    directions = directions.standard_normal((4, 250)).astype(np.float32)
    costs = [((np.sort(x @ d) - np.sort(y @ d)) ** 2).mean() / (d @ d) for d in directions.T]
    assert mind_estimate(x, y, 250, seed=5).value == pytest.approx(3 * 4 * np.mean(costs), rel=1e-4)
    # A shift by v costs |v|^2 / D along a random direction, so 3 |v|^2 in all: nothing else is moved.
    shift = np.array([1.0, 2.0, 0.0, 0.0], dtype=np.float32)
    assert mind_estimate(y + shift, y, 4000).value == pytest.approx(3 * 5, rel=0.05)
    assert mind_estimate(y, y).value == 0
    assert mind_estimate(x[:100], y).influence.shape == (100,)  # as many of the other


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_samples_have_no_error_that_is_not_a_number(count, tmp_path):
    x = np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)
    assert np.isnan(standard_error(x[:1, 0]))
    if count > 1:
        found = quality_metrics(["fid", "mind"], features_of({"pool": x}, tmp_path), Reference(tmp_path, {"pool": (np.zeros(6), np.eye(6))}), {"pool": torch.from_numpy(x)})  # fmt: skip
        assert all(np.isfinite([*found.metrics.values(), *found.errors.values(), *found.bias.values()]))
        assert ("fid" in found.bias) == (count > 3)


@pytest.mark.parametrize("samples", [torch.zeros(3, 2), torch.full((9, 2), torch.nan)])
def test_precision_and_recall_of_too_few_or_broken_features_are_refused(samples):
    with pytest.raises(ValueError, match="more than 3 finite samples"):
        precision_recall(samples, torch.rand(9, 2))


def test_a_collapsed_model_is_precise_and_recalls_nothing():
    """The other way round in torch-fidelity before 0.4 (toshas/torch-fidelity#58)."""
    real = draw(1, 500)
    precision, recall = precision_recall(
        real[:1] + 1e-3 * torch.randn(400, 48, generator=torch.Generator().manual_seed(0)), real
    )
    assert precision == 1 and recall < 0.01


@pytest.mark.parametrize("collapsed", ["samples", "reference", "both"])
def test_images_that_are_all_alike_have_finite_numbers(collapsed, tmp_path):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((60, 6)).astype(np.float32) for _ in range(2))
    x = np.full_like(x, 0.3) if collapsed != "reference" else x
    y = np.full_like(y, 0.3) if collapsed != "samples" else y
    reference = Reference(tmp_path, {"pool": (y.mean(0, dtype=np.float64), np.cov(y, rowvar=False))})
    samples = features_of({"pool": x, "logits": x}, tmp_path)
    found = quality_metrics(
        ["fid", "kid", "mind", "precision_recall", "inception_score"],
        samples,
        reference,
        {"pool": torch.from_numpy(y)},
    )
    assert all(np.isfinite([*found.metrics.values(), *found.errors.values(), *found.bias.values()]))
    if collapsed == "both":
        assert (found.metrics["fid"], found.metrics["mind"], found.metrics["precision"]) == (
            pytest.approx(0, abs=1e-6),
            0,
            1,
        )


def test_networks_run_in_full_float32_and_share_resized_images(pixels, tmp_path):
    seen = []

    def forward(images):
        seen.append((torch.get_float32_matmul_precision(), images.dtype, images.shape[-1], images.data_ptr()))
        return {"pool": images.float().mean((2, 3))}

    torch.set_float32_matmul_precision("high")
    try:
        network = type("Network", (), {"__call__": lambda self, images: forward(images)})
        networks = [network() for _ in range(4)]
        for one, size in zip(networks, (None, 12, 12, 16), strict=True):
            one.size = size
        extract_features(images_of(pixels[:4]), networks, process(), tmp_path, 4)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [(precision, size) for precision, _, size, _ in seen] == [("highest", size) for size in (8, 12, 12, 16)]
    assert seen[0][1] == torch.uint8 and seen[1][1] == torch.float32 and seen[1][3] == seen[2][3]


def test_networks_run_where_torchs_newer_names_set_the_precision():
    """They do not mix with the older ones in a process."""
    script = """
import torch
from erw_hf.evaluation.feature_statistics import _layers
from erw_hf.provenance import _matmul_precision
torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
seen = []
def network(images):
    seen.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
    return {"pool": images.float().mean((2, 3))}
_layers([network], torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
assert seen == [("ieee", "ieee")], seen
assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == ("tf32", "tf32")
assert _matmul_precision() == "tf32"
"""
    result = run_forked("-c", script)
    assert result.returncode == 0, result.stderr[-2000:]


def test_features_that_are_not_finite_are_named(pixels, tmp_path):
    broken = MeanColours()
    broken.forward = lambda images: {
        "pool": torch.full((len(images), 2), torch.nan),
        "logits": torch.zeros(len(images), 2),
    }
    with pytest.raises(ValueError, match="features 'pool' of images 0 to 7 hold NaN"):
        extract_features(images_of(pixels), [broken], process(), tmp_path, 8)


def test_images_in_the_order_of_their_classes_are_said_to_spoil_the_inception_score(tmp_path, caplog):
    logits = 20 * np.eye(10, dtype=np.float32)[np.arange(10_000) // 1000]
    for values, warned in ((logits, True), (np.random.default_rng(0).permutation(logits), False)):
        caplog.clear()
        quality_metrics(["inception_score"], features_of({"logits": values}, tmp_path), Reference(tmp_path, {}))
        assert ("in a random order" in caplog.text) == warned


def test_a_reference_holds_the_features_of_its_images(pixels, tmp_path, monkeypatch):
    """Of another choice of images where there are more than it shows; other weights are not trusted."""
    monkeypatch.setattr(quality, "REFERENCE_IMAGES", 30)
    network = MeanColours()
    for name, images in (("few", pixels[:20]), ("many", pixels)):
        path = tmp_path / f"{name}.npz"
        make_reference(path, images_of(images), [network], process(), tmp_path / name, 8, seed=0)
        shown = npz_images(path).read(range(npz_images(path).count))[0]
        with np.load(path) as file:
            assert np.array_equal(file["features_pool"], network(shown)["pool"].numpy()) and len(shown) == min(
                len(images), 30
            )
        reference = load_reference(path, ["fid", "kid"], extractor_hashes([network]), (8, 8))
        with monkeypatch.context() as patch:
            patch.setattr(quality, "npz_images", None)  # not read
            found = measure(images_of(pixels), ["kid"], reference, [network], process(), tmp_path / f"{name}-work", 8)
        again = measure(
            images_of(pixels), ["kid"], Reference(path, {}), [network], process(), tmp_path / f"{name}-again", 8
        )
        assert again.metrics == found.metrics  # from the images
    arrays = dict(np.load(path))
    np.savez(path, **{key: value for key, value in arrays.items() if key != "extractor"})
    assert load_reference(path, ["fid"], {}, (8, 8)).stored == ()


def test_another_network_is_not_taken_for_an_extractor(encoder_path):
    with pytest.raises(ValueError, match="not a ResNet classifier"):
        load_extractor(str(encoder_path))


@pytest.mark.parametrize(("size", "side"), [({"shortest_edge": 40}, 40), ({"height": 24, "width": 24}, 24)])
def test_the_size_of_a_classifiers_images_is_its_processors(tmp_path, size, side):
    """microsoft/resnet-50's names no crop."""
    shutil.copytree(CLASSIFIER, tmp_path / "classifier")
    settings = {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875, "do_normalize": True}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size}
    (tmp_path / "classifier/preprocessor_config.json").write_text(json.dumps(settings))
    assert load_extractor(str(tmp_path / "classifier")).size == side
