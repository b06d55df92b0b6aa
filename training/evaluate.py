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
"""Evaluate a model, or existing images: FID, sFID, Inception score, precision, recall, KID, MIND, FDr6.

    accelerate launch training/evaluate.py --model outputs/run/pipeline --num_samples 50000 \\
        --reference VIRTUAL_imagenet256_labeled.npz --output_dir outputs/run/evaluation

Noise and label of sample i depend only on (seed, i), so any number of ranks draws the same images. After a kill the same
command resumes. `evaluation.json` holds the numbers and everything that they depend on, and
`evaluate.py --record evaluation.json` repeats the evaluation and compares. Each number has its standard error.

    ... --images DIR_OR_NPZ_OR_DATASET --reference R.npz             measures images without a model
    ... --images DATASET --image_size 256 --save_reference R.npz     makes a reference, in ADM's format
    ... --verify lightningdit-xl-1 --reference R.npz                 a published checkpoint, measured beside its number
    ... --verify --list                                              the table of these
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from erw_hf import ERWPipeline, FlowMatchHeunScheduler
from erw_hf.evaluation.compare import compare_records
from erw_hf.evaluation.extractors import (
    FDR6,
    REPRESENTATIONS,
    RepresentationExtractor,
    describe_extractors,
    load_extractor,
)
from erw_hf.evaluation.images import ImageSet, NpzWriter, dataset_images, generated_images, npz_images, take
from erw_hf.evaluation.neighbours import draw_pairs
from erw_hf.evaluation.published import PUBLISHED, build_published, list_published, verification
from erw_hf.evaluation.quality import (
    METRICS,
    available_metrics,
    check_counts,
    extractor_hashes,
    feature_widths,
    images_identity,
    load_reference,
    make_reference,
    measure,
    reference_file,
)
from erw_hf.files import check_folder, write_record
from erw_hf.names import resolve_flags
from erw_hf.processes import decided_by_main, done_by_all
from erw_hf.provenance import file_hash, hardware, versions, weights_hash
from erw_hf.trainer.engines import close_accelerator, open_accelerator
from erw_hf.trainer.run_lock import RunLock


# What does not change the numbers
NOT_SETTINGS = (
    "output_dir",
    "record",
    "save_reference",
    "save_npz",
    "save_png",
    "save_steps",
    "verify",
    "list",
    "checkpoint",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="accelerate launch training/evaluate.py [--flag value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_dir",
        default="outputs/evaluation",
        help="folder for evaluation.json and unfinished work; default: outputs/evaluation",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="Hub id or folder of a pipeline, or the folder of a run")
    what.add_argument("--images", help="instead of a model: a folder of images, an npz file, or a dataset")
    what.add_argument("--record", help="an evaluation.json: repeat that evaluation and compare the numbers")
    what.add_argument(
        "--verify", nargs="?", const="", metavar="NAME", help="a published checkpoint, by its published protocol"
    )
    parser.add_argument("--list", action="store_true", help="with --verify: the table of published checkpoints")
    parser.add_argument("--checkpoint", help="with --verify: a local file, in place of the download from the Hub")
    parser.add_argument("--split", default="train", help="split of --images, if it is a dataset; default: train")
    parser.add_argument(
        "--image_size", type=int, help="crop and resize --images and the reference dataset to this side, in pixels"
    )
    parser.add_argument(
        "--image_column", help="column of images in --images and in a reference dataset; detected by default"
    )
    parser.add_argument("--label_column", help="column of labels in --images; detected by default")
    parser.add_argument(
        "--num_classes", type=int, help="classes of --images; the dataset's by default, 0 reads it without labels"
    )
    parser.add_argument("--num_samples", type=int, help="default: 50 000 for a model, all of --images")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and labels; default: 0")
    parser.add_argument(
        "--labels",
        choices=("random", "balanced"),
        default="random",
        help="random: uniform labels, as for SiT, REPA and ERW; balanced: each class in turn; default: random",
    )
    parser.add_argument(
        "--sampler",
        choices=("pipeline", "heun", "euler"),
        default="pipeline",
        help="pipeline: the sampler saved with the pipeline, usually the SDE; heun, euler: the ODE; default: pipeline",
    )
    parser.add_argument("--num_inference_steps", type=int, default=250, help="default: 250")
    parser.add_argument("--guidance_scale", type=float, default=1.8, help="1 for no guidance; default: 1.8")
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        default=(0.0, 0.7),
        metavar=("LOW", "HIGH"),
        help="times with guidance, 0 is data and 1 is noise; default: 0 0.7",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per forward pass on each rank; default: 64")
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        default="no",
        help="precision of the model; accelerate's own setting is ignored; default: no",
    )
    parser.add_argument("--reference", help="npz of statistics (ADM's or ours), or a dataset to compute them from")
    parser.add_argument(
        "--reference_split", default="train", help="split of --reference, if it is a dataset; default: train"
    )
    parser.add_argument(
        "--training_images",
        help="a dataset that the model was trained on: the median distance of samples to their nearest training image, over that "
        "of the reference's images, which were held out; nearest.png shows the closest pairs",
    )
    parser.add_argument("--training_split", default="train", help="split of --training_images; default: train")
    parser.add_argument(
        "--save_reference", help="npz file to which the statistics of the evaluated images are written, as a reference"
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, help="default: all that the extractors and labels allow"
    )
    parser.add_argument(
        "--extractor", default="inception", help="inception, or the folder of a ResNet classifier; default: inception"
    )
    parser.add_argument("--inception_weights", help="torch-fidelity's file; downloaded by default")
    parser.add_argument("--dinov2", help="Hub id or folder of a DINOv2, facebook/dinov2-large for the usual FD-DINOv2")
    parser.add_argument(
        "--representations",
        nargs="*",
        metavar="NAME=ID",
        help=f"networks of more Fréchet distances and MINDs, by Hub id or folder: {', '.join(REPRESENTATIONS)}; without "
        "any the five that FDr6 adds to Inception",
    )
    parser.add_argument("--save_npz", action="store_true", help="write the images as ADM's sample file, samples.npz")
    parser.add_argument("--save_png", action="store_true", help="write the images into samples/")
    parser.add_argument(
        "--save_steps", type=int, default=10, help="batches between two saves of unfinished work; default: 10"
    )
    args = parser.parse_args()
    if args.verify is not None:
        if args.list or args.verify == "list":
            print(list_published())
            sys.exit()
        if args.verify not in PUBLISHED:
            parser.error(
                f"--verify {args.verify} is not one of {', '.join(PUBLISHED)}; --verify --list prints the table"
            )
        parser.set_defaults(**PUBLISHED[args.verify].settings)
        args = parser.parse_args()
    elif args.list or args.checkpoint is not None:
        parser.error("--list and --checkpoint belong to --verify")
    resolve_flags(parser, args, ["record"], [])
    if args.record is not None:
        parser.set_defaults(
            **recorded_settings(parser, args.record), output_dir=str(Path(args.record).parent / "again")
        )
        args = parser.parse_args()
    elif args.verify is None and (args.model is None) == (args.images is None):
        parser.error("name what to evaluate: --model or --images")
    # Missing npz files have sentences of their own.
    files = {name for name in ("images", "reference") if (getattr(args, name) or "").endswith((".npz", ".npy"))}
    names = {"images", "reference", "training_images", "extractor", "dinov2", "representations"} - files
    paths = {"output_dir", "record", "save_reference", "inception_weights", "checkpoint"} | files
    resolve_flags(parser, args, paths, names, ["model"])
    if args.verify is not None:  # a folder for each name and file, since an evaluation that failed leaves it
        file = args.checkpoint and Path(args.checkpoint)
        of_file = f"-{file_hash(file)[:8]}" if file and file.is_file() else ""
        args.model = str(Path(args.output_dir) / f"published-{args.verify}{of_file}")
    if args.reference is None and args.save_reference is None:
        parser.error("name what to compare with, --reference, or what to make, --save_reference")
    if problem := problem_of(args):
        parser.error(problem)
    return args


def recorded_settings(parser: argparse.ArgumentParser, path: str) -> dict[str, object]:
    try:
        settings = json.loads(Path(path).read_text())["settings"]
        unknown = set(settings) - {action.dest for action in parser._actions}
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--record {path} is not an evaluation.json: {error!r}")
    if unknown:
        parser.error(f"--record {path} has settings that this version does not know: {', '.join(sorted(unknown))}")
    return {name: value for name, value in settings.items() if value is not None}


def problem_of(args: argparse.Namespace) -> str | None:
    """A problem that the flags alone show; `None` if there is none."""
    for name, fewest in (("batch_size", 1), ("num_samples", 1), ("num_inference_steps", 1), ("save_steps", 1), ("image_size", 1), ("seed", 0), ("num_classes", 0)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < fewest:
            return f"--{name} must be at least {fewest}, got {value}"
    same = [(args.training_images, args.training_split), (args.reference, args.reference_split)]
    if args.training_images is not None and same[0] == same[1]:
        return "--training_images are the reference's: name images that were held out from the training as --reference"
    if args.training_images is not None and args.reference is None:
        return "--training_images needs --reference, of images that were held out from the training"
    low, high = args.guidance_interval
    if not 0 <= low <= high <= 1:
        return f"--guidance_interval must be LOW HIGH with 0 <= LOW <= HIGH <= 1, got {low} {high}"
    if not math.isfinite(args.guidance_scale):
        return f"--guidance_scale must be a number, got {args.guidance_scale}"
    for name in ("images", "reference", "save_reference"):
        path = getattr(args, name)
        if path is not None and Path(path).suffix == ".npy":
            return f"--{name} {path}: name an npz file, np.savez makes one"
    for text in args.representations or ():
        name, _, path = text.partition("=")
        if name not in REPRESENTATIONS or not path:
            return f"--representations {text}: write NAME=ID, with one of {', '.join(REPRESENTATIONS)}"
    names = [text.partition("=")[0] for text in args.representations or ()] + ["dinov2"] * (args.dinov2 is not None)
    if len(set(names)) < len(names):
        return f"--representations {' '.join(args.representations)}: a name comes twice"
    if args.save_reference is not None:
        path = Path(args.save_reference)
        if path.suffix != ".npz" or path.is_dir():
            return f"--save_reference {path} must be a file that ends with .npz"
        if args.images is not None and path.exists() and Path(args.images).exists() and path.samefile(args.images):
            return f"--save_reference {path} would replace the images that it is made of"
    try:
        for folder in (args.output_dir, Path(args.save_reference or args.output_dir).parent):
            check_folder(folder)
    except ValueError as error:
        return str(error)
    return None


def main() -> None:
    args = parse_arguments()
    accelerator = open_accelerator(mixed_precision=args.mixed_precision)
    lock = RunLock(Path(args.output_dir))
    try:
        record = evaluate(args, accelerator, lock)
    finally:
        lock.release()
    close_accelerator(accelerator)
    if args.record is not None and record is not None:
        compare(args.record, record)
    if args.verify is not None and record is not None:
        print(verification(args.verify, record))


def evaluate(args: argparse.Namespace, accelerator: Accelerator, lock: RunLock) -> dict | None:
    """Returns the record, on the main process, if anything was compared."""
    output_dir, started = Path(args.output_dir), time.perf_counter()
    check_unfinished(args)
    if args.verify is not None:  # its pipeline is written into the folder
        decided_by_main(accelerator, partial(own_folder, args, lock))

    images, model = open_samples(args, accelerator)
    if args.num_samples is not None and images.count < args.num_samples:
        accelerator.print(f"{args.images} holds only {images.count} images, all are evaluated")
    args.num_samples = images.count
    extractors, extractor = load_extractors(args, accelerator)
    args.metrics = choose_metrics(args.metrics, extractors, images)
    leave_out_what_is_not_done(args, accelerator)
    check_reference = partial(
        load_reference, metrics=args.metrics, hashes=extractor_hashes(extractors), image_size=images.size,
        widths=feature_widths(extractors, images.size),
    )  # fmt: skip
    real = None
    if args.reference is not None:  # before any work
        if args.reference.endswith(".npz") and args.reference != args.save_reference:
            check_reference(args.reference)
        elif not args.reference.endswith(".npz"):
            real = open_images(args.reference, args.reference_split, images.size[0], args.image_column, num_classes=0)
            check_counts(args.metrics, real.count, f"images in the reference {args.reference}")
            if real.size != images.size:
                raise ValueError(
                    f"the samples are {images.size} px and the reference {args.reference}, a dataset, is cropped to {real.size}: "
                    "name an npz file of their size"
                )
        check_counts(args.metrics, images.count, "samples")
    else:
        check_counts(["fid"], images.count, "images for a reference")
    training = None
    if args.training_images is not None and args.reference.endswith(".npz") and args.reference != args.save_reference:
        npz_images(args.reference)  # raises for a file of statistics alone, before any work
    if args.training_images is not None and args.reference is not None:
        training = open_images(
            args.training_images, args.training_split, images.size[0], args.image_column, num_classes=0
        )
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    work = output_dir / "work"
    if args.verify is None:  # now, so that a mistake above leaves no folder
        decided_by_main(accelerator, partial(own_folder, args, lock))
    files = {"save_npz": args.save_npz, "save_png": args.save_png}  # batches that are done are not drawn again
    sets = {"images": images, "reference": real, "training_images": training}
    data = {
        name: images_identity(held, getattr(args, name)) for name, held in sets.items() if held and getattr(args, name)
    }
    made_of = {"settings": settings, "model": model, "extractor": extractor, "data": data, "files": files}
    begin(output_dir, made_of, accelerator)
    seconds = {"load": time.perf_counter() - started}

    if args.save_reference is not None:
        path, folder = Path(args.save_reference), work / "save_reference"
        make_reference(path, images, extractors, accelerator, folder, args.batch_size, args.seed)
        accelerator.print(f"saved {args.save_reference}")
    if args.reference is None:
        remove_work(work, accelerator)
        return None
    reference_path, stages = find_reference(args, real, extractors, accelerator)
    seconds |= stages
    reference = check_reference(reference_path)

    writer = NpzWriter(output_dir / "samples.npz", images.count) if args.save_npz else None
    write = partial(write_images, output_dir / "samples" if args.save_png else None, writer)
    quality = measure(
        images,
        args.metrics,
        reference,
        extractors,
        accelerator,
        work,
        args.batch_size,
        args.save_steps,
        write,
        training,
    )
    seconds |= quality.seconds
    if writer is not None:
        writer.close(accelerator.is_main_process)
    record = None
    if accelerator.is_main_process:
        record = {
            "metrics": quality.metrics,
            "errors": quality.errors,
            "bias": quality.bias,
            "settings": settings,
            "model": model,
            "reference": {"name": args.reference, "sha256": file_hash(reference_path)},
            "data": data,
            "extractor": extractor,
            "versions": versions(),
            "hardware": hardware(accelerator),
            "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        }
        if quality.neighbours is not None and training is not None:
            draw_pairs(quality.neighbours, images, training).save(output_dir / "nearest.png")
        write_record(output_dir / "evaluation.json", record)
        report(record, output_dir)
    remove_work(work, accelerator)
    return record


def check_unfinished(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    repeats = args.record is not None and output_dir == Path(args.record).parent / "again"
    if (output_dir / "evaluation.json").exists() and not repeats:
        raise ValueError(f"{output_dir} holds a finished evaluation: choose another --output_dir")


def own_folder(args: argparse.Namespace, lock: RunLock) -> None:
    lock.folder.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    check_unfinished(args)  # again: the one that had the folder may have finished


def open_samples(args: argparse.Namespace, accelerator: Accelerator) -> tuple[ImageSet, dict[str, object] | None]:
    """What is evaluated, and the model that draws it."""
    if args.model is None:
        images = open_images(
            args.images, args.split, args.image_size, args.image_column, args.label_column, args.num_classes
        )
        return images if args.num_samples is None else take(images, args.num_samples, args.seed), None
    if args.verify is not None:
        done_by_all(accelerator, partial(fetch_published, args, accelerator))
    pipe = load_pipeline(args, accelerator)
    images = generated_images(
        pipe, 50_000 if args.num_samples is None else args.num_samples, args.seed, args.labels,
        args.num_inference_steps, args.guidance_scale, tuple(args.guidance_interval), accelerator.autocast,
    )  # fmt: skip
    return images, describe_model(args.model, pipe)


def fetch_published(args: argparse.Namespace, accelerator: Accelerator) -> None:
    if accelerator.is_main_process and not (Path(args.model) / "model_index.json").exists():
        build_published(args.verify, args.checkpoint).save_pretrained(args.model)


def load_pipeline(args: argparse.Namespace, accelerator: Accelerator) -> ERWPipeline:
    with accelerator.main_process_first():
        pipe = ERWPipeline.from_pretrained(args.model).to(accelerator.device)
    shift = pipe.scheduler.config.get("shift", pipe.scheduler.config.get("flow_shift", 1.0))
    if args.sampler == "heun":  # diffusers' own schedulers have no path type: theirs is the linear path
        pipe.scheduler = FlowMatchHeunScheduler(path_type=pipe.scheduler.config.get("path_type", "linear"))
        if shift != 1:
            raise ValueError(
                f"--sampler heun takes equal steps, and this pipeline's scheduler has shift={shift:.3g}: use euler"
            )
    if args.sampler == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def describe_model(name: str, pipe: ERWPipeline) -> dict[str, object]:
    guide = pipe.guidance_transformer
    return {
        "name": name,
        "sha256": weights_hash(pipe.transformer),
        "weights": "of the pipeline, in which train_erw.py saves the EMA's",
        "parameters": sum(parameter.numel() for parameter in pipe.transformer.parameters()),
        "dtype": str(pipe.transformer.dtype),
        "vae": None if pipe.vae is None else pipe.vae.config.get("_name_or_path") or type(pipe.vae).__name__,
        "vae_sha256": None if pipe.vae is None else weights_hash(pipe.vae),
        **({} if guide is None else {"guidance_transformer_sha256": weights_hash(guide)}),
        "scheduler": {"class": type(pipe.scheduler).__name__, **public_config(pipe.scheduler)},
        "rounding": "round(255 clip(x / 2 + 1 / 2)), x in [-1, 1], as diffusers saves images",
    }


def public_config(component: object) -> dict[str, object]:
    return {name: value for name, value in component.config.items() if not name.startswith("_")}


def open_images(
    name: str,
    split: str,
    image_size: int | None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
) -> ImageSet:
    if name.endswith(".npz"):
        return npz_images(name)
    return dataset_images(name, split, image_size, image_column, label_column, num_classes)


def load_extractors(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[list[torch.nn.Module], dict[str, object]]:
    """The networks behind the metrics, and what the record says of them."""
    with accelerator.main_process_first():  # which downloads
        extractors = [load_extractor(args.extractor, args.inception_weights)]
        if args.dinov2 is not None:
            extractors.append(RepresentationExtractor("dinov2", args.dinov2))
        if args.representations is not None:
            paths = dict(text.split("=", 1) for text in args.representations) or dict.fromkeys(FDR6)
            extractors += [RepresentationExtractor(name, path) for name, path in paths.items()]
    extractors = [extractor.to(accelerator.device) for extractor in extractors]
    names = [args.extractor, *(extractor.hub_id for extractor in extractors[1:])]
    return extractors, describe_extractors(extractors, names)


def choose_metrics(wanted: list[str] | None, extractors: Sequence[torch.nn.Module], images: ImageSet) -> list[str]:
    available = available_metrics(extractors, images.num_classes, images.id2label)
    wanted = wanted or available
    if unavailable := [metric for metric in wanted if metric not in available]:
        raise ValueError(f"{unavailable} cannot be computed from these extractors and labels; {available} can")
    return wanted


def leave_out_what_is_not_done(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Removes flags without effect from the record, which says only what was done."""
    wanted = {name: getattr(args, name) for name in ("image_size", "mixed_precision")}
    if args.model is not None:
        args.mixed_precision = applied_precision(accelerator)
    else:
        args.mixed_precision, args.labels, args.sampler, args.num_inference_steps = "no", None, None, None
        args.guidance_scale, args.guidance_interval = None, None
    if args.images is None or args.images.endswith(".npz"):
        args.image_size = args.split = args.label_column = args.num_classes = None
    if args.reference is None or args.reference.endswith(".npz"):
        args.reference_split = None
    if args.training_images is None:
        args.training_split = None
    if args.split is None and args.reference_split is None:  # no dataset takes part
        args.image_column = None
    for name, value in wanted.items():
        if value not in (None, getattr(args, name)):
            accelerator.print(f"--{name} {value} does not apply here, {name} is {getattr(args, name)} in the record")


def applied_precision(accelerator: Accelerator) -> str:
    device = accelerator.device.type
    with accelerator.autocast():  # accelerate has no fp16 on CPUs, and goes without
        if not torch.is_autocast_enabled(device):
            return "no"
        return "fp16" if torch.get_autocast_dtype(device) == torch.float16 else "bf16"


def find_reference(
    args: argparse.Namespace, real: ImageSet | None, extractors: Sequence[torch.nn.Module], accelerator: Accelerator
) -> tuple[Path, dict[str, float]]:
    """The reference file, which is made where a dataset is named, and how long that took."""
    if real is None:
        return Path(args.reference), {}
    output_dir, started = Path(args.output_dir), time.perf_counter()
    path = reference_file(output_dir, args.reference, args.reference_split, real, extractors, args.seed)
    if not path.exists():
        folder = output_dir / "work" / "reference"
        make_reference(path, real, extractors, accelerator, folder, args.batch_size, args.seed)
    return path, {"reference": time.perf_counter() - started}


def begin(output_dir: Path, settings: dict[str, object], accelerator: Accelerator) -> None:
    """Raises ValueError if unfinished work was begun with other settings or weights; an empty attempt does not count."""
    path, settings = output_dir / "work" / "settings.json", json.loads(json.dumps(settings))
    done = any(file.suffix in (".pt", ".npy") for file in (output_dir / "work").rglob("*"))
    if done and path.exists() and (before := json.loads(path.read_text())) != settings:
        different = [
            f"{part}.{name}"
            for part in settings
            for name in settings[part] or {}
            if (before.get(part) or {}).get(name) != settings[part][name]
        ]
        what = f"other {', '.join(different)}" if different else "another version"
        raise ValueError(f"{output_dir} was begun with {what}: choose another --output_dir")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, settings)
    accelerator.wait_for_everyone()


def write_images(folder: Path | None, writer: NpzWriter | None, indices: Sequence[int], images: torch.Tensor) -> None:
    if writer is not None:
        writer.write(indices, images)
    if folder is not None:
        folder.mkdir(exist_ok=True)
        for index, image in zip(indices, images.permute(0, 2, 3, 1).numpy(), strict=True):
            Image.fromarray(image).save(folder / f"{index:06d}.png")


def report(record: dict, output_dir: Path) -> None:
    for name, value in record["metrics"].items():
        error, bias = record["errors"].get(name), record["bias"].get(name)
        more = (f" ± {error:.2g}" if error is not None else "") + (f", bias {bias:.2g}" if bias is not None else "")
        print(f"{name:22}{value:12.6g}{more}")
    print(f"{output_dir / 'evaluation.json'}, after {record['seconds']} seconds")


def compare(path: str, record: dict) -> None:
    same, table = compare_records(json.loads(Path(path).read_text()), record)
    print(table)
    if not same:
        sys.exit(f"the numbers differ from those of {path}")


def remove_work(work: Path, accelerator: Accelerator) -> None:
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
