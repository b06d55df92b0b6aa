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
"""Encode a dataset once, so that training reads latents instead of running the autoencoder in every step.

    accelerate launch training/cache_latents.py --dataset_name ILSVRC/imagenet-1k --vae stabilityai/sd-vae-ft-ema \\
        --sample_size 32 --output_dir caches/imagenet256

Writes `data/train-*.parquet` in a shuffled order: the posterior's moments in float16, the label, a key, and the cropped
image as JPEG for the encoder that the run aligns with. The folder is a dataset like any other: train with
`--dataset_name caches/imagenet256 --vae stabilityai/sd-vae-ft-ema`, streamed or not, or with `--push_to_hub` from the Hub.

All ranks write files, each complete or not at all; the same command resumes an interrupted run.
"""

import argparse
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, Value
from datasets.arrow_writer import ArrowWriter
from diffusers import AutoModel
from tqdm.auto import tqdm

from erw_hf import ERWPipeline, RepresentationEncoder
from erw_hf.data.cache import FEATURES_COLUMN, KEY_COLUMN, MOMENTS_COLUMN
from erw_hf.data.decoding import BadImageError, decode_image, prepare_image, to_pixels
from erw_hf.data.identity import data_identity, describe_changes
from erw_hf.data.latents import check_finite, encode_moments, image_channels
from erw_hf.data.samples import read_row
from erw_hf.data.source import Source, load_source
from erw_hf.files import check_folder, write_record, written_whole
from erw_hf.hub.push import push_cache
from erw_hf.hub.upload import prepare_repo
from erw_hf.names import resolve_flags
from erw_hf.processes import decided_by_main
from erw_hf.provenance import weights_hash
from erw_hf.trainer.config import AT_LEAST_1, check_flags
from erw_hf.trainer.engines import close_accelerator, open_accelerator
from erw_hf.trainer.run_lock import RunLock


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="accelerate launch training/cache_latents.py [--flag value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True, help="folder of the cache; required")
    parser.add_argument("--dataset_name", required=True, help='Hub id, local folder, or "digits"; required')
    parser.add_argument("--dataset_config_name", help="configuration of a Hub dataset that has several")
    parser.add_argument("--dataset_split", default="train", help="default: train")
    parser.add_argument("--image_column", help="column of images; detected by default")
    parser.add_argument("--label_column", help="column of labels; detected by default")
    parser.add_argument("--num_classes", type=int, help="from the dataset by default; 0 caches it without labels")
    parser.add_argument("--vae", required=True, help="Hub id or folder of a diffusers autoencoder; required")
    parser.add_argument(
        "--sample_size",
        type=int,
        default=32,
        help="side of the latent, for most autoencoders an eighth of the image's; default: 32",
    )
    parser.add_argument("--encoder", help="also store this encoder's tokens, in bfloat16: large, for short warmups")
    parser.add_argument(
        "--patch_size",
        type=int,
        default=2,
        help="of the transformer, which sets the grid of --encoder's tokens; default: 2",
    )
    parser.add_argument("--encoder_image_size", type=int, help="as in training")
    parser.add_argument("--encoder_antialias", action="store_true", help="as in training")
    parser.add_argument("--flipped", action="store_true", help="store each image's mirror image too")
    parser.add_argument("--rows_per_file", type=int, default=20_000, help="default: 20000")
    parser.add_argument("--batch_size", type=int, default=32, help="images encoded at once; default: 32")
    parser.add_argument("--jpeg_quality", type=int, default=95, help="of the images that the cache keeps; default: 95")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the rows; default: 0")
    parser.add_argument("--push_to_hub", action="store_true", help="push the finished cache as a dataset")
    parser.add_argument("--hub_dataset_id", help="Hub repo; the name of output_dir by default")
    parser.add_argument("--hub_private", action="store_true", help="make the repo private")
    args = parser.parse_args()
    resolve_flags(parser, args, ["output_dir"], ["dataset_name", "vae", "encoder"])
    check_flags(parser, args, rows_per_file=AT_LEAST_1, batch_size=AT_LEAST_1, jpeg_quality="[1, 100]")
    try:
        check_folder(args.output_dir)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_arguments()
    accelerator = open_accelerator()
    lock = RunLock(Path(args.output_dir))
    try:
        decided_by_main(accelerator, lambda: own_folder(lock))
        repo_id = write_cache(args, accelerator)
    finally:
        lock.release()
    close_accelerator(accelerator)
    if args.push_to_hub and accelerator.is_main_process:
        try:
            push_cache(Path(args.output_dir), repo_id, args.hub_private)
        except Exception:
            finish = f"python -m erw_hf.hub.push {args.output_dir} --hub_dataset_id {repo_id}"
            print(f"The cache is complete, but its push failed. To finish it: {finish}", flush=True)
            raise


def own_folder(lock: RunLock) -> None:
    lock.folder.mkdir(parents=True, exist_ok=True)
    lock.acquire()


def write_cache(args: argparse.Namespace, accelerator: Accelerator) -> str:
    """The whole cache; returns the repo that it is for."""
    repo_id = args.hub_dataset_id or Path(args.output_dir).resolve().name
    if args.push_to_hub and accelerator.is_main_process:  # now, not hours later
        repo_id = prepare_repo(repo_id, args.hub_private, repo_type="dataset")
    source = load_source(
        args.dataset_name, args.dataset_split, args.dataset_config_name, args.image_column, args.label_column,
        args.num_classes,
    )  # fmt: skip
    read_row(source, 0)  # fails now if no image is readable
    vae = AutoModel.from_pretrained(args.vae).to(accelerator.device).eval().requires_grad_(False)
    side = args.sample_size * ERWPipeline.vae_scale_factor_of(vae)
    encoder = None
    if args.encoder is not None:
        dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
        encoder = RepresentationEncoder.from_pretrained(
            args.encoder,
            token_grid=args.sample_size // args.patch_size,
            image_size=args.encoder_image_size,
            dtype=dtype,
            antialias_positions=args.encoder_antialias,
        ).to(accelerator.device)
    rows = len(source.dataset) * (2 if args.flipped else 1)
    order = np.random.default_rng(args.seed).permutation(rows)
    files = math.ceil(rows / args.rows_per_file)

    folder = Path(args.output_dir) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    check_same_run(
        args, Path(args.output_dir), data_identity(source, args.dataset_name), weights_hash(vae), accelerator
    )
    for number in tqdm(
        range(accelerator.process_index, files, accelerator.num_processes),
        desc="files",
        disable=not accelerator.is_main_process,
    ):
        path = folder / f"train-{number:05d}-of-{files:05d}.parquet"
        if not path.exists():
            mine = order[number * args.rows_per_file : (number + 1) * args.rows_per_file]
            write_file(args, source, vae, encoder, side, mine, path)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        statistics, skipped = merge_statistics(folder, Path(args.output_dir))
        unreadable = f" (left out {skipped} that cannot be read)" * (skipped > 0)
        print(f"{rows - skipped} rows in {files} files{unreadable}: {json.dumps(statistics)}")
    return repo_id


def check_same_run(
    args: argparse.Namespace, folder: Path, data: dict[str, object], vae_sha256: str, accelerator: Accelerator
) -> None:
    """Raises ValueError if a folder was begun with other settings, other weights or other data."""
    free = ("output_dir", "batch_size", "push_to_hub", "hub_dataset_id", "hub_private")
    settings = {key: value for key, value in vars(args).items() if key not in free} | {"vae_sha256": vae_sha256}
    path = folder / "cache.json"
    if path.exists():
        before = settings | {"num_classes": None} | json.loads(path.read_text())  # older caches lack some
        data_before = before.pop("data", None)
        if changed := [key for key, value in settings.items() if before[key] != value]:
            raise ValueError(
                f"{folder} was begun with another {' and '.join(changed)} ({path}): use what it was begun with, or another --output_dir"
            )
        if data_before is None:
            print(f"{path} does not record its data: continuing without comparing it")
        elif (changes := describe_changes(data_before, data)) is not None:
            raise ValueError(
                f"{folder} was begun when {args.dataset_name} held other data: {changes}. Samples would be cached twice or "
                f"not at all: delete {folder}, or use another --output_dir"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_record(path, {**settings, "data": data})


def write_file(
    args: argparse.Namespace,
    source: Source,
    vae: torch.nn.Module,
    encoder: RepresentationEncoder | None,
    side: int,
    indices: np.ndarray,
    path: Path,
) -> None:
    """One parquet file, and beside it the sums for the statistics; under another name until they are complete."""
    channels = image_channels(vae)
    features = {MOMENTS_COLUMN: Value("binary"), "image": Image(), KEY_COLUMN: Value("string")}
    if encoder is not None:
        features[FEATURES_COLUMN] = Value("binary")
    if source.label_column is not None:
        features["label"] = source.dataset.features[source.label_column]
    sums, squares, count = torch.zeros(()), torch.zeros(()), 0  # of each channel, once there is an image
    skipped = 0
    # Batch by batch to the disk: 20,000 images' tokens are 8 GB.
    batches = path.with_name(f".{path.stem}.arrow")
    with ArrowWriter(path=str(batches), features=Features(features)) as writer:
        for start in range(0, len(indices), args.batch_size):
            pixels = []
            columns: dict[str, list] = {name: [] for name in features}
            for index in indices[start : start + args.batch_size].tolist():
                row, flip = index % len(source.dataset), index >= len(source.dataset)
                record = source.dataset[row]
                try:
                    image, _ = decode_image(record[source.image_column])
                except BadImageError as error:
                    skipped += 1
                    tqdm.write(f"skipped row {row}: {error}")
                    continue
                image = prepare_image(image, side, channels)
                image = image.transpose(0) if flip else image  # mirrored
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=args.jpeg_quality, subsampling=0)
                pixels.append(to_pixels(image))
                columns["image"].append({"bytes": buffer.getvalue(), "path": None})
                columns[KEY_COLUMN].append(f"{row}{'-flipped' if flip else ''}")
                if source.label_column is not None:
                    columns["label"].append(record[source.label_column])
            if not pixels:
                continue
            batch = torch.stack(pixels).to(vae.device)
            moments = encode_moments(batch, vae)
            check_finite(moments.half(), args.vae, vae, columns[KEY_COLUMN])
            mean, std = moments.cpu().double().chunk(2, dim=1)  # not every device has float64
            sums = sums + mean.sum(dim=(0, 2, 3))
            squares = squares + (mean.square() + std.square()).sum(dim=(0, 2, 3))  # of a draw, in expectation
            count += mean[:, 0].numel()
            if encoder is not None:
                tokens = encoder(batch.float() / 255).bfloat16().cpu().view(torch.int16)  # NumPy has no bfloat16
                columns[FEATURES_COLUMN] = [row.tobytes() for row in tokens.numpy()]
            columns[MOMENTS_COLUMN] = [row.tobytes() for row in moments.half().cpu().numpy()]
            writer.write_batch(columns)
        writer.finalize()
    with written_whole(path) as temporary:
        Dataset.from_file(str(batches)).to_parquet(temporary)
        statistics = {"sum": sums.tolist(), "square": squares.tolist(), "count": count, "skipped": skipped}
        with written_whole(path.with_suffix(".json")) as record:
            record.write_text(json.dumps(statistics))
    batches.unlink()


def merge_statistics(folder: Path, output_dir: Path) -> tuple[dict[str, list[float]], int]:
    """Mean and deviation of each latent channel, unscaled, in `latent_statistics.json`; and how many rows were skipped."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("train-*.json"))]
    skipped = sum(part.get("skipped", 0) for part in parts)
    parts = [part for part in parts if part["count"] > 0]  # a file may hold broken images alone
    count = sum(part["count"] for part in parts)
    mean = np.sum([part["sum"] for part in parts], axis=0) / count
    deviation = np.sqrt(np.sum([part["square"] for part in parts], axis=0) / count - mean**2)
    statistics = {"latents_mean": mean.tolist(), "latents_std": deviation.tolist()}
    write_record(output_dir / "latent_statistics.json", statistics)
    return statistics, skipped


if __name__ == "__main__":
    main()
