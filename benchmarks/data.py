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
"""How many images per second one core reads, and whether memory stays flat.

    python benchmarks/data.py --output benchmarks/results/data.json

Three ways of reading training samples, every random draw of training included, in one process with one thread:
parquet shards of 256 px JPEG files streamed; a latent cache streamed, with and without its images; and a dataset in
memory, read in random order. The images are noise over gradients, which JPEG makes about as large as photographs of that size.
"""

import argparse
import io
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from common import describe, environment, finish, shown, spread, table
from datasets import ClassLabel, Dataset, Features, Image, Value
from matplotlib.figure import Figure
from PIL import Image as PILImage
from tqdm.auto import tqdm

from erw_hf.data.samples import SampleMaker, StepSampler, TrainingSamples
from erw_hf.data.source import load_source
from erw_hf.data.streaming import StreamingSamples


LATENT = (4, 32, 32)
FEATURES = {"image": Image(), "label": ClassLabel(names=[str(i) for i in range(1000)])}


def photographs(count: int, seed: int) -> list[bytes]:
    """JPEG files of 256 x 256 px and about 20 kB."""
    rng, files = np.random.default_rng(seed), []
    ramp = np.linspace(0, 255, 256)
    for _ in range(count):
        smooth = np.stack([np.outer(np.roll(ramp, rng.integers(256)), np.ones(256)) for _ in range(3)], axis=-1)
        coarse = np.kron(rng.normal(0, 40, (64, 64, 3)), np.ones((4, 4, 1)))
        pixels = np.clip(smooth + coarse + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        PILImage.fromarray(pixels).save(buffer, "JPEG", quality=75)
        files.append(buffer.getvalue())
    return files


def write_images(folder: Path, rows: int, files: list[bytes]) -> float:
    """Parquet shards of 1000 images; returns the mean size of an image in kB."""
    for shard in range(0, rows, 1000):
        images = [{"bytes": files[i % len(files)], "path": f"{i}.jpg"} for i in range(shard, min(shard + 1000, rows))]
        table = {"image": images, "label": [i % 1000 for i in range(len(images))]}
        Dataset.from_dict(table, features=Features(FEATURES)).to_parquet(folder / f"train-{shard:07d}.parquet")
    return statistics.mean(map(len, files)) / 1000


def write_cache(folder: Path, rows: int, files: list[bytes], side: int = 32) -> None:
    """A latent cache as cache_latents.py writes it, of noise."""
    features = Features({"moments": Value("binary"), "key": Value("string"), **FEATURES})
    rng = np.random.default_rng(0)
    moments = [rng.standard_normal((8, side, side)).astype(np.float16).tobytes() for _ in range(1000)]
    for shard in range(0, rows, 5000):
        numbers = range(shard, min(shard + 5000, rows))
        table = {
            "moments": [moments[i % 1000] for i in numbers],
            "key": [str(i) for i in numbers],
            "image": [{"bytes": files[i % len(files)], "path": None} for i in numbers],
            "label": [i % 1000 for i in numbers],
        }
        Dataset.from_dict(table, features=features).to_parquet(folder / f"train-{shard:07d}.parquet")


def samples_of(folder: Path, streaming: bool, needs_images: bool) -> Iterable[dict[str, torch.Tensor]]:
    source = load_source(str(folder), streaming=streaming, needs_images=needs_images)
    maker = SampleMaker(source, 256, 3, LATENT, seed=0, class_dropout_prob=0.1, random_flip=False)
    if streaming:
        return StreamingSamples(maker, 1, 0)
    sampler = StepSampler(len(source.dataset), 100, 1, 1, 0, 0, 10**6, seed=0)
    data = TrainingSamples(maker)
    return (data[position] for batch in sampler for position in batch)


def rate(samples: Iterator[dict[str, torch.Tensor]], count: int) -> float:
    started = time.process_time()  # of this process alone: other load on the machine does not count
    for _ in range(count):
        next(samples)
    return count / (time.process_time() - started)


def memory_in_use() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20  # MiB


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="rounds; results are their medians")
    parser.add_argument("--count", type=int, default=2000, help="samples per repeat")
    parser.add_argument("--memory_rows", type=int, default=100_000, help="samples over which memory must stay flat")
    parser.add_argument(
        "--rows", type=int, default=10_000, help="rows of the cache; the image dataset has half as many"
    )
    parser.add_argument("--output", type=Path, help="where to write JSON and, beside it, a Markdown table")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("images", "cache"):
            (folder / part).mkdir()
        files = photographs(200, seed=0)
        size = write_images(folder / "images", args.rows // 2, files)
        write_cache(folder / "cache", args.rows, files)
        ways = {
            "cached moments and labels, streamed": samples_of(folder / "cache", True, False),
            "cached moments, labels and images, streamed": samples_of(folder / "cache", True, True),
            "parquet of JPEG, streamed": samples_of(folder / "images", True, True),
            "parquet of JPEG, in memory": samples_of(folder / "images", False, True),
        }
        iterators = {way: iter(samples) for way, samples in ways.items()}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for samples in iterators.values():
            rate(samples, 100)  # opened, and the first block read
        for _ in tqdm(range(args.repeats), desc="rates"):
            for way, samples in iterators.items():  # interleaved
                rates[way].append(rate(samples, args.count))
        streamed, memory = iter(samples_of(folder / "cache", True, False)), []
        for _ in tqdm(range(20), desc="memory"):
            rate(streamed, args.memory_rows // 20)
            memory.append(memory_in_use())
    result = {
        "images_per_second_and_core": {way: statistics.median(values) for way, values in rates.items()},
        "all": rates,
        "jpeg_kilobytes": size,
        "memory_mib_after": {args.memory_rows // 20 * (i + 1): value for i, value in enumerate(memory)},
        "environment": environment(),
    }
    finish(args.output, result, report, plot)


def report(result: dict) -> str:
    rows = []
    for way, values in result["all"].items():
        median = statistics.median(values)
        rows.append((way, shown(spread(values), 0), f"{550 / median:.1f}", f"{2900 / median:.1f}"))
    memory = list(result["memory_mib_after"].items())
    highest = max(value for _, value in memory[1:])
    header = ("reading", "images/s per core (min - max)", "cores for XL/2, 550 img/s", "cores for B/2, 2900 img/s")
    return "\n".join(
        [
            table(header, rows),
            f"CPU time of one thread; JPEG files of {result['jpeg_kilobytes']:.0f} kB. {describe(result['environment'])}",
            f"Memory while the cache is streamed: {memory[0][1]:.0f} MiB after {memory[0][0]} samples, then at most "
            f"{highest:.0f} MiB, {memory[-1][1]:.0f} MiB after {memory[-1][0]}.",
            "The needs of XL/2 and B/2 are those of one H200 at about 45 % of its bf16 peak.",
            "",
        ]
    )


def plot(result: dict) -> Figure:
    """Rates, and memory over the samples."""
    figure = Figure(figsize=(11, 3.5))
    left, right = figure.subplots(1, 2)
    names = list(result["all"])
    left.barh(range(len(names)), [statistics.median(values) for values in result["all"].values()])
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set_xlabel("images/s per core")
    right.plot([int(count) for count in result["memory_mib_after"]], result["memory_mib_after"].values())
    right.set_ylim(bottom=0)
    right.set_xlabel("samples streamed")
    right.set_ylabel("MiB")
    return figure


if __name__ == "__main__":
    main()
