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
"""Pictures of a run: loss curves, measurements, probes, grids of images."""

import math
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from erw_hf.trainer.run_record import read_metrics


def plot_losses(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draws the losses of both phases in a `metrics.jsonl` against the images seen."""
    from matplotlib.figure import Figure  # the object interface needs no display and no global state

    records = read_metrics(metrics_path)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = (("velocity", "tab:blue", "velocity loss"), ("alignment", "tab:orange", "alignment loss"))
    for name, color, title in lines:
        label: str | None = title
        for phase in ("warmup", "full"):  # a mean over the hand-over would be of two different things
            points = [(r["images_seen"], r[name]) for r in records if r["phase"] == phase and r.get(name) is not None]
            if points:
                images, losses = zip(*points, strict=True)
                axes.plot(images, losses, color=color, alpha=0.25, linewidth=0.8)
                axes.plot(images, _smooth(losses), color=color, label=label)
                label = None  # one entry of the legend serves both phases
    warmup = [r["images_seen"] for r in records if r["phase"] == "warmup"]
    if warmup:
        axes.axvspan(0, warmup[-1], color="tab:orange", alpha=0.08, label="warmup")
    axes.set(xlabel="images seen (warmup counted)", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(png_path, dpi=120)


def plot_quality(records: list[dict[str, Any]], png_path: str | os.PathLike[str]) -> None:
    """Draws the measurements in the lines of `evaluations.jsonl`, with their standard errors, against the images seen,
    one panel each."""
    from matplotlib.figure import Figure

    names = [name for name in ("fid", "accuracy") if any(record.get(name) is not None for record in records)]
    figure = Figure(figsize=(6 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = [(r["images_seen"], r[name], r.get(f"{name}_error", 0.0)) for r in records if r.get(name) is not None]
        seen, values, errors = zip(*points, strict=True)
        axes.errorbar(seen, values, yerr=errors, marker="o", capsize=2)
        axes.set(xlabel="images seen (warmup counted)", ylabel=name, yscale="log" if name == "fid" else "linear")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(png_path, dpi=120)


def plot_probes(probes: list[tuple[str, dict[str, Any]]], png_path: str | os.PathLike[str]) -> None:
    """Draws CKNNA and the linear probe's accuracy of every block: a column of panels for each measure, a row for each
    flow time, a line for each probe, lighter the later it was. `probes` holds a name and a result of
    [`~evaluation.probes.probe_blocks`] for each line."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    times = sorted({result["t"] for _, result in probes})
    measures = [measure for measure in ("cknna", "accuracy") if measure in probes[0][1]]
    figure = Figure(figsize=(6 * len(measures), 4 * len(times)), layout="constrained")
    for row, t in zip(figure.subplots(len(times), len(measures), squeeze=False), times, strict=True):
        lines = [(name, result) for name, result in probes if result["t"] == t]
        for axes, measure in zip(row, measures, strict=True):
            for number, (name, result) in enumerate(lines):
                color = colormaps["viridis"](number / max(1, len(lines) - 1))
                label = name if number % math.ceil(len(lines) / 8) == 0 else None  # a legend that fits
                axes.plot(range(1, len(result[measure]) + 1), result[measure], color=color, marker=".", label=label)
            axes.set(title=f"t = {t:g}", xlabel="block", ylabel=measure)
            axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(png_path, dpi=120)


def _smooth(values: tuple[float, ...]) -> np.ndarray:
    """Mean over a window around each point that is a twentieth of the curve, and shorter at its ends."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    reach = np.minimum(half, np.minimum(centre, len(values) - 1 - centre))
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


def image_grid(images: list[Image.Image], columns: int, min_side: int = 48) -> Image.Image:
    """Pastes images of one size into a grid, row by row; images smaller than `min_side` pixels are magnified first,
    without smoothing."""
    from diffusers.utils import make_image_grid

    factor = max(1, math.ceil(min_side / images[0].width))
    images = [ImageOps.scale(image, factor, resample=Image.Resampling.NEAREST) for image in images]
    images = [ImageOps.expand(image, border=2, fill="gray") for image in images]  # keeps neighbours apart
    rows = math.ceil(len(images) / columns)
    blank = Image.new(images[0].mode, images[0].size)
    return make_image_grid(images + [blank] * (rows * columns - len(images)), rows=rows, cols=columns)
