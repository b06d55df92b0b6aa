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
"""The metrics that papers report, from images to numbers: which metric takes which features, and the reference files.

A reference, in ADM's format, holds mean and covariance of real images, which `feature_statistics` sums up, and some of the images.
The formulas are in `metrics`, with the standard error of every number.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from erw_hf.data.folder import nfc
from erw_hf.data.identity import data_identity
from erw_hf.evaluation.extractors import FDR6, INCEPTION_VALIDATION, REPRESENTATIONS
from erw_hf.evaluation.feature_statistics import Features, extract_features
from erw_hf.evaluation.images import ImageSet, npz_images, open_npz, take
from erw_hf.evaluation.metrics import (
    Estimate,
    frechet_estimate,
    inception_score,
    kernel_distance,
    mind_estimate,
    precision_recall,
    share_error,
    standard_error,
)
from erw_hf.evaluation.neighbours import Neighbours, compare_neighbours
from erw_hf.files import written_whole
from erw_hf.processes import done_by_all
from erw_hf.provenance import weights_hash


logger = logging.getLogger(__name__)

METRICS = (
    "fid", "sfid", "inception_score", "precision_recall", "kid", "mind", *(f"fd_{name}" for name in REPRESENTATIONS), "fdr6",
    "accuracy",
)  # fmt: skip
ADM_REFERENCE = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)

# Metric -> the layer that it is a Fréchet distance of, and layer -> its names in an npz; the first two are ADM's.
_FRECHET = {"fid": "pool", "sfid": "spatial", **{f"fd_{name}": name for name in REPRESENTATIONS}}
_NAMES = {
    "pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), **{name: (f"mu_{name}", f"sigma_{name}") for name in REPRESENTATIONS},
}  # fmt: skip
_HOW_TO_MAKE = (
    "make the statistics from a dataset with `evaluate.py --images DATASET --save_reference FILE.npz` and the same "
    f"--extractor, --dinov2 and --representations, or take ADM's, which are of Inception: {ADM_REFERENCE}"
)
# Fewest images for each metric; precision and recall look at 3 neighbours of each.
_FEWEST = {**dict.fromkeys(_FRECHET, 2), "fdr6": 2, "kid": 2, "mind": 2, "precision_recall": 4}
_NEED_IMAGES = ("precision_recall", "kid", "mind")  # of the reference, beside its statistics
REFERENCE_IMAGES = 10_000  # that a reference file holds for precision, recall and KID, as ADM's does
KID_SUBSET_SIZE, KID_SUBSETS = 1000, 100
INCEPTION_CHUNK = 5000  # ADM's


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Args:
        path (`Path`): The npz file.
        statistics (`dict[str, tuple[numpy.ndarray, numpy.ndarray]]`): Mean and covariance of each layer that it has.
        stored (`tuple[str, ...]`): Layers whose features of its images are in the file.
    """

    path: Path
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]
    stored: tuple[str, ...] = ()


@dataclass
class Quality:
    """The numbers of an evaluation.

    Args:
        metrics (`dict[str, float]`): Value of each.
        errors (`dict[str, float]`): Standard error over the samples, of each but those that are deviations themselves.
        bias (`dict[str, float]`): What so few samples add, estimated, where that is known.
        seconds (`dict[str, float]`): Of each stage.
        neighbours ([`~evaluation.neighbours.Neighbours`], *optional*): Of samples in the training images.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    bias: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    neighbours: Neighbours | None = None

    def add(self, name: str, value: float, error: float | None = None, bias: float | None = None) -> None:
        """Adds a number, its standard error and its bias."""
        self.metrics[name] = value
        for numbers, number in ((self.errors, error), (self.bias, bias)):
            if number is not None and np.isfinite(number):  # NaN is not JSON
                numbers[name] = number


def save_reference(
    path: str | os.PathLike[str],
    features: Features,
    images: ImageSet,
    seed: int,
    hashes: Mapping[str, str],
    some: Features | None = None,
) -> None:
    """
    Writes statistics as ADM's reference files hold them: `mu`, `sigma`, `mu_s`, `sigma_s` of all images, and 10 000 of
    the images as `arr_0`. Beside ADM's names: `mu_<name>`, `sigma_<name>` of other representations, the hashes of the
    extractors, `extractor` and `extractor_<name>`, and the features of the 10 000, `features_<layer>`, so that no evaluation
    has to compute them again.

    Args:
        path (`str` or `os.PathLike`): The npz file.
        features ([`Features`]): Of the images.
        images ([`ImageSet`]): The images.
        seed (`int`): Seed of the choice of the images.
        hashes (`Mapping[str, str]`): [`extractor_hashes`].
        some ([`Features`], *optional*): Of the 10 000 images, kept.
    """
    arrays = {name: np.array(value) for name, value in hashes.items()}
    for layer, statistics in features.statistics.items():
        arrays |= dict(zip(_NAMES[layer], statistics.mean_and_covariance(), strict=True))
        if some is not None and layer != "spatial":
            arrays[f"features_{layer}"] = some.layer(layer).numpy()
    shown = take(images, REFERENCE_IMAGES, seed)
    arrays["arr_0"] = np.empty((shown.count, *images.size, 3), dtype=np.uint8)
    for start in range(0, shown.count, 100):
        indices = range(start, min(start + 100, shown.count))
        arrays["arr_0"][list(indices)] = shown.read(indices)[0].permute(0, 2, 3, 1).numpy()
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def extractor_hashes(extractors: Sequence[torch.nn.Module]) -> dict[str, str]:
    """[`~provenance.weights_hash`] of each network, by its name in a reference; the first is Inception or a
    classifier."""
    names = ["extractor", *(f"extractor_{extractor.layers[0]}" for extractor in extractors[1:])]  # type: ignore[index]
    return {name: weights_hash(extractor) for name, extractor in zip(names, extractors, strict=True)}


def check_counts(metrics: Sequence[str], count: int, what: str) -> None:
    """Raises ValueError if a metric needs more images than there are; `what` they are called in the error, as
    `"samples"`."""
    for metric in metrics:
        if count < (fewest := _FEWEST.get(metric, 1)):
            raise ValueError(
                f"{metric} needs at least {fewest} {what}, there are {count}: take more, or set --metrics"
            )


@torch.no_grad()
def feature_widths(extractors: Sequence[torch.nn.Module], image_size: tuple[int, int]) -> dict[str, int]:
    """Width of the features of each layer, found on a black image of that height and width."""
    widths: dict[str, int] = {}
    for extractor in extractors:
        tensor = next(iter(extractor.parameters()), torch.zeros(0))
        black = torch.zeros(1, 3, *image_size, dtype=torch.uint8, device=tensor.device)
        widths |= {layer: features.shape[1] for layer, features in extractor(black).items()}
    return widths


def load_reference(
    path: str | os.PathLike[str],
    metrics: Sequence[str],
    hashes: Mapping[str, str],
    image_size: tuple[int, int],
    widths: Mapping[str, int] | None = None,
) -> Reference:
    """
    Reads a reference and checks that it serves the metrics.

    Args:
        path (`str` or `os.PathLike`): An npz file, ours or ADM's.
        metrics (`Sequence[str]`): Some of `METRICS`.
        hashes (`Mapping[str, str]`): [`extractor_hashes`] of the samples' extractors.
        image_size (`tuple[int, int]`): Height and width of the samples.
        widths (`Mapping[str, int]`, *optional*): Of the extractors' layers, [`feature_widths`], to be checked.

    Returns:
        [`Reference`]: Its statistics.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, lacks something, is of images of another size, or was made with another extractor.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no reference {path}: {_HOW_TO_MAKE}")
    open_npz(path).close()
    with np.load(path) as file:
        for metric in metrics:
            missing = [name for name in (_NAMES[_FRECHET[metric]] if metric in _FRECHET else ()) if name not in file]
            if missing:
                raise ValueError(
                    f"{path} has no {' and '.join(missing)}, which {metric} needs (it has {file.files}): {_HOW_TO_MAKE}"
                )
        has_images = "arr_0" in file.files
        if not has_images and set(metrics) & set(_NEED_IMAGES):
            raise ValueError(
                f"{path} has no images (arr_0), which precision, recall, KID and MIND need: {_HOW_TO_MAKE}; or skip them "
                "with --metrics"
            )
        for name, digest in hashes.items():
            if name in file and str(file[name]) != digest:
                raise ValueError(
                    f"{path} was made with another extractor or other weights of it ({name}): {_HOW_TO_MAKE}"
                )
        try:
            statistics = {
                layer: (file[mu], file[sigma]) for layer, (mu, sigma) in _NAMES.items() if mu in file and sigma in file
            }
        except ValueError as error:  # pickled objects
            raise ValueError(f"{path} holds no arrays of numbers ({error}): {_HOW_TO_MAKE}") from error
        # Of networks whose weights were found to be these.
        stored = tuple(
            layer
            for layer in _NAMES
            if f"features_{layer}" in file and ("extractor" if layer == "pool" else f"extractor_{layer}") in file
        )
    for layer in {_FRECHET[metric] for metric in metrics if metric in _FRECHET}:
        mu, sigma = statistics[layer]
        if (
            mu.ndim != 1
            or mu.dtype.kind not in "fiu"
            or sigma.dtype.kind not in "fiu"
            or sigma.shape != (mu.size, mu.size)
            or not (np.isfinite(mu).all() and np.isfinite(sigma).all())
        ):
            raise ValueError(
                f"{' and '.join(_NAMES[layer])} of {path} must be finite, (D,) and (D, D), they are {mu.shape} {mu.dtype} and "
                f"{sigma.shape} {sigma.dtype}: {_HOW_TO_MAKE}"
            )
        largest = abs(sigma).max()
        rounded = 1e-3 * largest + 1e-6 * abs(mu).max() ** 2  # of nearly constant features, rounding is all there is
        if not np.allclose(sigma, sigma.T, 1e-3, 1e-6 * largest) or np.linalg.eigvalsh(sigma)[0] < -rounded:
            raise ValueError(f"{_NAMES[layer][1]} of {path} is not a covariance: {_HOW_TO_MAKE}")
        if widths is not None and widths[layer] != mu.size:
            raise ValueError(_other_extractor(path, mu.size, widths[layer]))
    if has_images:
        needing = [metric for metric in metrics if metric in _NEED_IMAGES]
        check_counts(needing, npz_images(path).count, f"images in the reference {path}")
    if has_images and npz_images(path).size != image_size:
        raise ValueError(
            f"{path} is of {npz_images(path).size} px images, the samples are {image_size} px: take a reference of their "
            "size, or set --image_size"
        )
    return Reference(path, statistics, stored)


def _other_extractor(path: Path, theirs: int, ours: int) -> str:
    return f"{path} has {theirs} features, the extractor {ours}: it was made with another extractor; {_HOW_TO_MAKE}"


def available_metrics(
    extractors: Sequence[torch.nn.Module], num_classes: int, id2label: Mapping[int, str] | None = None
) -> list[str]:
    """Those of `METRICS` that can be computed; accuracy only if the first network has as many classes, which are compared by
    id; a warning names the first whose name differs. `num_classes` is 0 for images without."""
    layers = {layer for extractor in extractors for layer in extractor.layers}  # type: ignore[union-attr]
    needs = {"inception_score": "logits", "accuracy": "logits", **dict.fromkeys(_NEED_IMAGES, "pool"), **_FRECHET}
    reads_classes = num_classes > 0 and extractors[0].num_classes == num_classes
    theirs = getattr(extractors[0], "id2label", {})
    for key, name in sorted((id2label or {}).items() if reads_classes else ()):
        known = theirs.get(key, name)
        if nfc(known) != nfc(name) and known != f"LABEL_{key}":
            logger.warning(f"class {key} is {name!r}, but {known!r} to the classifier: accuracy compares ids")
            break
    # FDr is in units of FD-loss's validation distances, which are of these very networks.
    published = {"spatial", *FDR6} <= layers and all(getattr(extractor, "published", True) for extractor in extractors)
    return [
        metric
        for metric in METRICS
        if (published if metric == "fdr6" else needs[metric] in layers) and (metric != "accuracy" or reads_classes)
    ]


def kept_layers(metrics: Sequence[str], layers: Sequence[str]) -> list[str]:
    """Layers whose features must be kept: for what compares samples one by one, and for the errors."""
    needed = {_FRECHET[metric] for metric in metrics if metric in _FRECHET}
    needed |= {"pool"} if set(metrics) & set(_NEED_IMAGES) else set()
    needed |= {"pool", *FDR6} if "fdr6" in metrics else set()
    needed |= {name for name in REPRESENTATIONS if "mind" in metrics}
    needed |= {"logits"} if "inception_score" in metrics or "accuracy" in metrics else set()
    return [layer for layer in layers if layer in needed]


def quality_metrics(
    metrics: Sequence[str],
    samples: Features,
    reference: Reference,
    real: Mapping[str, torch.Tensor] | None = None,
) -> Quality:
    """
    The numbers and their errors. Inception score over consecutive 5 000 samples, unshuffled, as ADM's evaluator; KID over the
    100 subsets of 1 000 that torch-fidelity takes; precision and recall with k = 3. MIND is of each representation whose
    features of the reference's images are given, Inception's by that name alone.

    Args:
        metrics (`Sequence[str]`): Some of `METRICS`.
        samples ([`Features`]): Of the samples, with [`kept_layers`].
        reference ([`Reference`]): What they are compared with.
        real (`Mapping[str, torch.Tensor]`, *optional*): Layer -> features (M, D) of the reference's images.

    Returns:
        [`Quality`]: Numbers, errors and biases.

    Raises:
        ValueError: if the features do not fit the reference's, or are not finite.
    """
    quality, real = Quality(), real or {}
    estimates: dict[str, Estimate] = {}
    for metric in metrics:
        if metric in _FRECHET:
            estimate = _frechet_of(_FRECHET[metric], samples, reference, estimates)
            quality.add(metric, estimate.value, estimate.error, estimate.bias)
        elif metric == "fdr6":
            units = {"pool": INCEPTION_VALIDATION} | {
                name: REPRESENTATIONS[name].validation or np.nan for name in FDR6
            }
            parts = {layer: _frechet_of(layer, samples, reference, estimates) for layer in units}
            # Of the same samples, so the influences are added up, not the errors.
            value, bias = (
                float(np.mean([getattr(parts[x], part) / units[x] for x in units])) for part in ("value", "bias")
            )
            influence = np.mean([parts[x].shrinkage * parts[x].influence / units[x] for x in units], axis=0)
            quality.add(metric, value, standard_error(influence), bias)
        elif metric == "mind":
            for layer, features in real.items():
                estimate = mind_estimate(samples.layer(layer).numpy(), features.numpy())
                name = "mind" if layer == "pool" else f"mind_{layer}"
                quality.add(name, estimate.value, estimate.error, estimate.bias)
        elif metric == "accuracy":
            right = (samples.layer("logits").argmax(dim=1) == samples.layer("labels")).double()
            quality.add(metric, right.mean().item(), share_error(right.mean().item(), len(right)))
        elif metric == "inception_score":
            logits = samples.layer("logits").numpy()
            value, deviation, error, bias = inception_score(logits, INCEPTION_CHUNK)
            shuffled = inception_score(np.random.default_rng(0).permutation(logits), INCEPTION_CHUNK)[0]
            if value < shuffled - 5 * error:
                logger.warning(
                    f"the images are in the order of their classes: Inception score {value:.4g}, of consecutive "
                    f"{INCEPTION_CHUNK} images as ADM's evaluator finds it, would be {shuffled:.4g} in a random order"
                )
            quality.add(metric, value, error, bias)
            quality.add("inception_score_std", deviation)
        elif metric == "kid":
            pool = samples.layer("pool").numpy(), real["pool"].numpy()
            value, deviation, error = kernel_distance(*pool, KID_SUBSET_SIZE, KID_SUBSETS)
            quality.add(metric, value, error)
            quality.add("kid_std", deviation)
        elif metric == "precision_recall":
            precision, recall = precision_recall(samples.layer("pool"), real["pool"])
            # Each sample lies in the reference's manifold or not; recall asks the same of each image of the reference.
            quality.add("precision", precision, share_error(precision, len(samples.layer("pool"))))
            quality.add("recall", recall, share_error(recall, len(real["pool"])))
    return quality


def _frechet_of(layer: str, samples: Features, reference: Reference, estimates: dict[str, Estimate]) -> Estimate:
    if layer not in estimates:
        found, expected = samples.statistics[layer].mean_and_covariance(), reference.statistics[layer]
        if found[0].shape != expected[0].shape:
            raise ValueError(_other_extractor(reference.path, expected[0].size, found[0].size))
        estimates[layer] = frechet_estimate(samples.layer(layer).numpy(), found, expected)
    return estimates[layer]


def reference_file(
    folder: Path, name: str, split: str, images: ImageSet, extractors: Sequence[torch.nn.Module], seed: int
) -> Path:
    """The path of the reference made from a dataset, there or not; its name depends on all arguments and on what the dataset
    holds. `seed` is of the choice of the images that it holds."""
    identity = images.source and data_identity(images.source, name)
    made_of = repr((name, split, images.size, identity, [weights_hash(extractor) for extractor in extractors], seed))
    return folder / f"reference-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.npz"


def images_identity(images: ImageSet, name: str) -> str:
    """Recognises images that are there before an evaluation: a dataset, or an npz file by its checksums."""
    if images.source is not None:
        return str(data_identity(images.source, name)["fingerprint"])
    return ", ".join(f"{member.filename} {member.CRC:08x}" for member in open_npz(name).infolist())


def make_reference(
    path: Path,
    images: ImageSet,
    extractors: Sequence[torch.nn.Module],
    accelerator: Accelerator,
    folder: Path,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """
    Makes a reference file from images. All ranks call it.

    Args:
        path (`Path`): The npz file.
        images ([`ImageSet`]): The images.
        extractors (`Sequence[torch.nn.Module]`): Networks.
        accelerator (`Accelerator`): The processes.
        folder (`Path`): Folder for the work.
        batch_size (`int`): Images of one batch.
        seed (`int`): Seed of the choice of the images that the file holds.

    Returns:
        `dict[str, float]`: Seconds of each stage.
    """
    # Here, so that a failing write shows before the images are read.
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [layer for extractor in extractors for layer in extractor.layers if layer not in ("spatial", "logits")]  # type: ignore[union-attr]
    few = images.count <= REFERENCE_IMAGES
    features = extract_features(
        images, extractors, accelerator, folder, batch_size, layers if few else (), description="reference"
    )
    some = features if few else extract_features(
        take(images, REFERENCE_IMAGES, seed), extractors, accelerator, folder / "some", batch_size, layers,
        description="reference",
    )  # fmt: skip
    if accelerator.is_main_process:
        save_reference(path, features, images, seed, extractor_hashes(extractors), some)
    accelerator.wait_for_everyone()
    return features.seconds


def measure(
    images: ImageSet,
    metrics: Sequence[str],
    reference: Reference,
    extractors: Sequence[torch.nn.Module],
    accelerator: Accelerator,
    folder: Path,
    batch_size: int,
    save_steps: int = 10,
    write: Callable[[Sequence[int], torch.Tensor], None] | None = None,
    training: ImageSet | None = None,
) -> Quality:
    """
    A whole evaluation. All ranks call it.

    Args:
        images ([`ImageSet`]): The samples.
        metrics (`Sequence[str]`): Some of `METRICS`.
        reference ([`Reference`]): What they are compared with.
        extractors (`Sequence[torch.nn.Module]`): Networks; the first gives `pool`.
        accelerator (`Accelerator`): The processes.
        folder (`Path`): Folder for the work; a call after a kill continues from its content.
        batch_size (`int`): Images of one batch.
        save_steps (`int`, *optional*, defaults to 10): Batches between two saves.
        write (`Callable`, *optional*): Called with the indices and the pixels of each batch of samples.
        training ([`ImageSet`], *optional*): Images that the model was trained on, for the report on nearest neighbours.

    Returns:
        [`Quality`]: The numbers, on the main process alone, and the seconds of each stage.

    Raises:
        ValueError: for fewer samples than the metrics need.
    """
    check_counts(metrics, images.count, "samples")
    keep = kept_layers(metrics, [layer for extractor in extractors for layer in extractor.layers])  # type: ignore[union-attr]
    if training is not None:
        keep = list(dict.fromkeys(["pool", *keep]))
    samples = extract_features(
        images, extractors, accelerator, folder / "samples", batch_size, keep, save_steps, write, "samples"
    )
    seconds = {"samples": samples.seconds["read"], "features": samples.seconds["extract"]}
    real = {}
    if set(metrics) & set(_NEED_IMAGES) or training is not None:
        started = time.perf_counter()
        compared = [layer for layer in keep if layer == "pool" or (layer in REPRESENTATIONS and "mind" in metrics)]
        missing = [layer for layer in compared if layer not in reference.stored]  # as in ADM's file
        if missing:
            networks = [extractor for extractor in extractors if set(extractor.layers) & set(missing)]  # type: ignore[arg-type]
            features = extract_features(
                npz_images(reference.path), networks, accelerator, folder / "reference_images", batch_size, missing,
                description="reference",
            )  # fmt: skip
        with np.load(reference.path) as file:
            real = {
                layer: features.layer(layer) if layer in missing else torch.from_numpy(file[f"features_{layer}"])
                for layer in compared
            }
        seconds["reference_images"] = time.perf_counter() - started

    trained_on = None
    if training is not None:
        features = extract_features(
            training,
            extractors[:1],
            accelerator,
            folder / "training_images",
            batch_size,
            ["pool"],
            description="training",
        )
        trained_on = features.layer("pool")
        seconds["training_images"] = sum(features.seconds.values())

    def compute() -> Quality:
        if not accelerator.is_main_process:
            return Quality()
        quality = quality_metrics(metrics, samples, reference, real)
        if trained_on is not None:
            quality.neighbours = compare_neighbours(samples.layer("pool"), trained_on, real["pool"])
            quality.add("nearest_neighbour_ratio", quality.neighbours.ratio, quality.neighbours.error)
        return quality

    started = time.perf_counter()
    quality = done_by_all(accelerator, compute)
    quality.seconds = seconds | {"metrics": time.perf_counter() - started}
    return quality
