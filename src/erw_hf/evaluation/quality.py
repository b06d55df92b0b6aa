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
The Fréchet distance is in `metrics`; Inception score, KID, precision and recall are torch-fidelity's, called here.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from erw_hf.evaluation.extractors import weights_hash
from erw_hf.evaluation.feature_statistics import Features, extract_features
from erw_hf.evaluation.images import ImageSet, npz_images, open_npz, take
from erw_hf.evaluation.metrics import frechet_distance
from erw_hf.files import written_whole
from erw_hf.processes import done_by_all


METRICS = ("fid", "sfid", "inception_score", "precision_recall", "kid", "fd_dinov2", "accuracy")
ADM_REFERENCE = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)

# Metric -> the layer that it is a Fréchet distance of, and layer -> its names in an npz; the first two are ADM's.
_FRECHET = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "dinov2"}
_NAMES = {
    "pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dinov2": ("mu_dinov2", "sigma_dinov2"),
}  # fmt: skip
_HOW_TO_MAKE = (
    "make the statistics from a dataset with `evaluate.py --images DATASET --save_reference FILE.npz` and the same "
    f"--extractor and --dinov2, or take ADM's, which are of Inception: {ADM_REFERENCE}"
)
# Fewest images for each metric; precision and recall look at 3 neighbours of each.
_FEWEST = {"fid": 2, "sfid": 2, "fd_dinov2": 2, "kid": 2, "precision_recall": 4}
REFERENCE_IMAGES = 10_000  # that a reference file holds for precision, recall and KID, as ADM's does
KID_SUBSET_SIZE = 1000


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Args:
        path (`Path`): The npz file.
        statistics (`dict[str, tuple[numpy.ndarray, numpy.ndarray]]`): Mean and covariance of each layer that it has.
    """

    path: Path
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]


def save_reference(
    path: str | os.PathLike[str], features: Features, images: ImageSet, seed: int, extractor_hash: str
) -> None:
    """
    Writes statistics as ADM's reference files hold them: `mu`, `sigma`, `mu_s`, `sigma_s` of all images, and 10 000 of
    the images as `arr_0`. Beside ADM's names: `mu_dinov2`, `sigma_dinov2`, and the hash of the extractor.

    Args:
        path (`str` or `os.PathLike`): The npz file.
        features ([`Features`]): Of the images.
        images ([`ImageSet`]): The images.
        seed (`int`): Seed of the choice of the images.
        extractor_hash (`str`): [`~evaluation.extractors.weights_hash`] of the extractor.
    """
    arrays = {"extractor": np.array(extractor_hash)}
    for layer, statistics in features.statistics.items():
        arrays |= dict(zip(_NAMES[layer], statistics.mean_and_covariance(), strict=True))
    some = take(images, REFERENCE_IMAGES, seed)
    arrays["arr_0"] = np.empty((some.count, *images.size, 3), dtype=np.uint8)
    for start in range(0, some.count, 100):
        indices = range(start, min(start + 100, some.count))
        arrays["arr_0"][list(indices)] = some.read(indices)[0].permute(0, 2, 3, 1).numpy()
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def check_counts(metrics: Sequence[str], count: int, what: str) -> None:
    """
    Args:
        metrics (`Sequence[str]`): Some of `METRICS`.
        count (`int`): Number of images.
        what (`str`): What they are called in the error, as `"samples"`.

    Raises:
        ValueError: if a metric needs more of them.
    """
    for metric in metrics:
        if count < (fewest := _FEWEST.get(metric, 1)):
            raise ValueError(
                f"{metric} needs at least {fewest} {what}, there are {count}: take more, or set --metrics"
            )


@torch.no_grad()
def feature_widths(extractors: Sequence[torch.nn.Module], image_size: tuple[int, int]) -> dict[str, int]:
    """
    Args:
        extractors (`Sequence[torch.nn.Module]`): Networks.
        image_size (`tuple[int, int]`): Height and width of the images.

    Returns:
        `dict[str, int]`: Width of the features of each layer, found on a black image.
    """
    widths: dict[str, int] = {}
    for extractor in extractors:
        tensor = next(iter(extractor.parameters()), torch.zeros(0))
        black = torch.zeros(1, 3, *image_size, dtype=torch.uint8, device=tensor.device)
        widths |= {layer: features.shape[1] for layer, features in extractor(black).items()}
    return widths


def load_reference(
    path: str | os.PathLike[str],
    metrics: Sequence[str],
    extractor_hash: str,
    image_size: tuple[int, int],
    widths: Mapping[str, int] | None = None,
) -> Reference:
    """
    Reads a reference and checks that it serves the metrics.

    Args:
        path (`str` or `os.PathLike`): An npz file, ours or ADM's.
        metrics (`Sequence[str]`): Some of `METRICS`.
        extractor_hash (`str`): [`~evaluation.extractors.weights_hash`] of the extractor of the samples.
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
        if not has_images and ("precision_recall" in metrics or "kid" in metrics):
            raise ValueError(
                f"{path} has no images (arr_0), which precision, recall and KID need: {_HOW_TO_MAKE}; or skip them "
                "with --metrics"
            )
        if "extractor" in file and str(file["extractor"]) != extractor_hash:
            raise ValueError(f"{path} was made with another extractor or other weights of it: {_HOW_TO_MAKE}")
        statistics = {
            layer: (file[mu], file[sigma]) for layer, (mu, sigma) in _NAMES.items() if mu in file and sigma in file
        }
    for layer in {_FRECHET[metric] for metric in metrics if metric in _FRECHET}:
        mu, sigma = statistics[layer]
        if (
            mu.ndim != 1
            or sigma.shape != (mu.size, mu.size)
            or not (np.isfinite(mu).all() and np.isfinite(sigma).all())
        ):
            raise ValueError(
                f"{' and '.join(_NAMES[layer])} of {path} must be finite, (D,) and (D, D), they are {mu.shape} and "
                f"{sigma.shape}: {_HOW_TO_MAKE}"
            )
        if widths is not None and widths[layer] != mu.size:
            raise ValueError(_other_extractor(path, mu.size, widths[layer]))
    if has_images:
        needing = [metric for metric in metrics if metric in ("precision_recall", "kid")]
        check_counts(needing, npz_images(path).count, f"images in the reference {path}")
    if has_images and npz_images(path).size != image_size:
        raise ValueError(
            f"{path} is of {npz_images(path).size} px images, the samples are {image_size} px: take a reference of their "
            "size, or set --image_size"
        )
    return Reference(path, statistics)


def _other_extractor(path: Path, theirs: int, ours: int) -> str:
    return f"{path} has {theirs} features, the extractor {ours}: it was made with another extractor; {_HOW_TO_MAKE}"


def available_metrics(extractors: Sequence[torch.nn.Module], num_classes: int) -> list[str]:
    """
    Args:
        extractors (`Sequence[torch.nn.Module]`): Networks.
        num_classes (`int`): Number of classes of the images; 0 for images without.

    Returns:
        `list[str]`: Those of `METRICS` that can be computed; accuracy only if the first network knows the same classes.
    """
    layers = {layer for extractor in extractors for layer in extractor.layers}  # type: ignore[union-attr]
    needs = {"inception_score": "logits", "precision_recall": "pool", "kid": "pool", "accuracy": "logits", **_FRECHET}
    reads_classes = num_classes > 0 and extractors[0].num_classes == num_classes
    return [metric for metric in METRICS if needs[metric] in layers and (metric != "accuracy" or reads_classes)]


def kept_layers(metrics: Sequence[str]) -> list[str]:
    """
    Args:
        metrics (`Sequence[str]`): Some of `METRICS`.

    Returns:
        `list[str]`: Layers whose features must be kept for them; sums serve the Fréchet distances.
    """
    keep = ["pool"] if "precision_recall" in metrics or "kid" in metrics else []
    return keep + (["logits"] if "inception_score" in metrics or "accuracy" in metrics else [])


def quality_metrics(
    metrics: Sequence[str],
    samples: Features,
    reference: Reference,
    reference_pool: torch.Tensor | None = None,
) -> dict[str, float]:
    """
    The numbers. Inception score, KID, precision and recall by torch-fidelity's functions; the score over consecutive
    5 000 samples, unshuffled, as ADM's evaluator; precision and recall with k = 3.

    Args:
        metrics (`Sequence[str]`): Some of `METRICS`.
        samples ([`Features`]): Of the samples, with [`kept_layers`].
        reference ([`Reference`]): What they are compared with.
        reference_pool (`torch.Tensor` of shape `(M, D)`, *optional*): Features of the reference's images.

    Returns:
        `dict[str, float]`: Value of each metric.

    Raises:
        ImportError: for a metric of torch-fidelity where it is not installed.
        ValueError: if the features do not fit the reference's, or are not finite.
    """
    results: dict[str, float] = {}
    for metric in metrics:
        if metric in _FRECHET:
            mu, sigma = samples.statistics[_FRECHET[metric]].mean_and_covariance()
            expected_mu, expected_sigma = reference.statistics[_FRECHET[metric]]
            if mu.shape != expected_mu.shape:
                raise ValueError(_other_extractor(reference.path, expected_mu.size, mu.size))
            results[metric] = frechet_distance(mu, sigma, expected_mu, expected_sigma)
        elif metric == "accuracy":
            results[metric] = (samples.layer("logits").argmax(dim=1) == samples.layer("labels")).double().mean().item()
        else:
            results |= _fidelity_metric(metric, samples, reference_pool)
    return results


def _fidelity_metric(metric: str, samples: Features, reference_pool: torch.Tensor | None) -> dict[str, float]:
    try:
        from torch_fidelity.metric_isc import isc_features_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric
    except ImportError as error:
        raise ImportError(f"{metric} comes from torch-fidelity: pip install erw-hf[eval]") from error
    if metric == "inception_score":
        logits = samples.layer("logits")
        found = isc_features_to_metric(logits, splits=max(1, len(logits) // 5000), shuffle=False)
        return {
            "inception_score": found["inception_score_mean"], "inception_score_std": found["inception_score_std"],
        }  # fmt: skip
    pool = samples.layer("pool")
    assert reference_pool is not None
    if metric == "kid":
        size = min(KID_SUBSET_SIZE, len(pool), len(reference_pool))
        # float64: the cubes of a 2 048-wide inner product lose digits in float32.
        found = kid_features_to_metric(pool.double(), reference_pool.double(), kid_subset_size=size, verbose=False)
        return {"kid": found["kernel_inception_distance_mean"], "kid_std": found["kernel_inception_distance_std"]}
    found = prc_features_to_metric(pool, reference_pool, save_cpu_ram=True, verbose=False)
    return {"precision": found["precision"], "recall": found["recall"]}


def reference_file(
    folder: Path, name: str, split: str, image_size: int, extractors: Sequence[torch.nn.Module], seed: int
) -> Path:
    """
    The path of the reference made from a dataset; the file name depends on all arguments.

    Args:
        folder (`Path`): Folder of the evaluation or of the run.
        name (`str`): The dataset.
        split (`str`): Its split.
        image_size (`int`): Side of the images.
        extractors (`Sequence[torch.nn.Module]`): Networks.
        seed (`int`): Seed of the choice of the images that the file holds.

    Returns:
        `Path`: The npz file, there or not.
    """
    made_of = repr((name, split, image_size, [weights_hash(extractor) for extractor in extractors], seed))
    return folder / f"reference-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.npz"


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
        extractors (`Sequence[torch.nn.Module]`): Networks; the first is the one whose hash the file holds.
        accelerator (`Accelerator`): The processes.
        folder (`Path`): Folder for the work.
        batch_size (`int`): Images of one batch.
        seed (`int`): Seed of the choice of the images that the file holds.

    Returns:
        `dict[str, float]`: Seconds of each stage.
    """
    # Here, so that a failing write shows before the images are read.
    path.parent.mkdir(parents=True, exist_ok=True)
    features = extract_features(images, extractors, accelerator, folder, batch_size, description="reference")
    if accelerator.is_main_process:
        save_reference(path, features, images, seed, weights_hash(extractors[0]))
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
) -> tuple[dict[str, float], dict[str, float]]:
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

    Returns:
        `tuple[dict[str, float], dict[str, float]]`: Value of each metric, on the main process alone, and seconds of each
        stage.

    Raises:
        ValueError: for fewer samples than the metrics need.
    """
    check_counts(metrics, images.count, "samples")
    keep = kept_layers(metrics)
    samples = extract_features(
        images, extractors, accelerator, folder / "samples", batch_size, keep, save_steps, write, "samples"
    )
    seconds = {"samples": samples.seconds["read"], "features": samples.seconds["extract"]}
    pool = None
    if "pool" in keep:
        features = extract_features(
            npz_images(reference.path), extractors[:1], accelerator, folder / "reference_images", batch_size, ["pool"],
            description="reference",
        )  # fmt: skip
        pool, seconds["reference_images"] = features.layer("pool"), sum(features.seconds.values())

    def compute() -> dict[str, float]:
        return quality_metrics(metrics, samples, reference, pool) if accelerator.is_main_process else {}

    started = time.perf_counter()
    results = done_by_all(accelerator, compute)
    seconds["metrics"] = time.perf_counter() - started
    return results, seconds
