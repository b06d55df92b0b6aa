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
"""What the benchmarks share: flags, timing in turns, the record of the machine, and how results are written."""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from erw_hf.files import write_record
from erw_hf.provenance import device_name, versions
from erw_hf.trainer.device import cpu_has_bf16


NOT_MEASURED = "not measured"


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of the names, with commas."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(names):
            raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}, but {', '.join(names)}")
        return chosen

    return parse


def add_flags(parser: argparse.ArgumentParser, sections: Sequence[str], batch: int, repeats: int) -> None:
    """The flags of a benchmark with sections, and its defaults."""
    parser.add_argument("--only", type=some_of(sections), default=sections, help="sections, separated by commas")
    parser.add_argument("--sizes", default="S/2,B/2", help="models, separated by commas")
    parser.add_argument(
        "--dtypes", default="float32,bfloat16", help="commas between; bfloat16 needs a CPU with it, or CUDA"
    )
    parser.add_argument("--batch", type=int, default=batch, help="images per step, or per draw")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds; results are their medians")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few steps: only checks that it runs")
    parser.add_argument("--output", type=Path, help="where to write JSON and, beside it, Markdown and a plot")


def begin(args: argparse.Namespace, sections: Sequence[str]) -> dict[str, object]:
    """For the flags of [`add_flags`]: sets the threads, and returns the result before anything is measured."""
    torch.set_num_threads(args.threads)
    missing = [{"what": "everything on CUDA", "why": "this run is of the CPU"}] if args.device == "cpu" else []
    return {section: {} for section in sections} | {
        "batch": args.batch,
        "rounds": args.repeats,
        "environment": environment(args.device),
        "not_measured": missing,
    }


def dtypes(args: argparse.Namespace, result: dict[str, object]) -> list[str]:
    """The precisions that this machine can be measured in; the result names the others."""
    names = args.dtypes.split(",")
    if "bfloat16" in names and args.device == "cpu" and not cpu_has_bf16():
        result["not_measured"].append({"what": "all figures in bf16", "why": "this CPU has no bf16"})
        names.remove("bfloat16")
    return names


def environment(device: str = "cpu") -> dict[str, object]:
    """The hardware and versions that belong to the figures."""
    installed = versions()
    packages = ("python", "torch", "diffusers", "transformers", "datasets", "erw-hf")
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "versions": {name: installed[name] for name in packages if installed[name] is not None},
    }


def describe(record: Mapping[str, object]) -> str:
    """The record of the machine in one line, for under a table."""
    packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['device']}, {record['threads']} of {record['cores']} cores; {packages}."


def seconds_of(function: Callable[[], object], device: str = "cpu") -> float:
    """Wall seconds of one call, a GPU's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(
    ways: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, device: str = "cpu", name: str = ""
) -> dict[str, list[float]]:
    """Times every way once per round, A B C A B C ..., so that other load on the machine affects all of them alike."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    bar = tqdm(range(warmup + repeats), desc=name or "rounds", mininterval=1)
    for round_number in bar:
        for way, function in ways.items():
            elapsed = seconds_of(function, device)
            if round_number >= warmup:
                seconds[way].append(elapsed)
        if round_number >= warmup:
            medians = ", ".join(f"{way} {statistics.median(values):.3g}" for way, values in seconds.items())
            bar.write(f"{name} {round_number - warmup + 1}/{repeats}, median s: {medians}")
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """The ratio of two ways timed in the same rounds: median, minimum and maximum over the rounds."""
    return spread([ours / theirs for ours, theirs in zip(seconds, reference, strict=True)])


def shown(value: Mapping[str, float], digits: int = 2) -> str:
    """`median (min - max)`."""
    return f"{value['median']:.{digits}f} ({value['min']:.{digits}f} - {value['max']:.{digits}f})"


def verdict(value: float, target: float, at_least: bool = False) -> str:
    """Whether a figure meets its target."""
    return "met" if (value >= target if at_least else value <= target) else "missed"


def matmul(side: int, dtype: torch.dtype, device: str = "cpu", times: int = 1) -> tuple[Callable[[], object], int]:
    """A large matrix product, the ceiling of what a model can reach, and its FLOPs."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: [torch.mm(left, right, out=out) for _ in range(times)], 2 * side**3 * times


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def draw_bars(axes: Axes, bars: Sequence[tuple[str, float]], label: str) -> None:
    """A bar chart of times, ours in orange."""
    names, values = zip(*bars, strict=True)
    axes.barh(range(len(values)), values, color=["tab:orange" if "ours" in name else "0.7" for name in names])
    axes.set_yticks(range(len(values)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def write(path: Path | None, result: Mapping[str, object], markdown: str | None = None) -> None:
    """Writes JSON, completely or not at all, and Markdown beside it, if any."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, result)
        if markdown is not None:
            path.with_suffix(".md").write_text(markdown)


def finish(
    path: Path | None,
    result: Mapping[str, object],
    report: Callable[[Mapping[str, object]], str],
    plot: Callable[[Mapping[str, object]], Figure],
) -> None:
    """Writes and prints the result, and draws it."""
    markdown = report(result)
    write(path, result, markdown)
    print(markdown)
    if path is not None:
        figure = plot(result)
        figure.tight_layout()
        figure.savefig(path.with_suffix(".png"), dpi=110)
