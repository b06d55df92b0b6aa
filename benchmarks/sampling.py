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
"""What sampling costs, beside diffusers' DiTPipeline, compiled, and with step caches.

    python benchmarks/sampling.py --output benchmarks/results/sampling.json

`speed`: 50 steps of our pipeline with guidance in (0, 0.7) beside DiTPipeline of the same size and step count, which
guides at every step; random weights, the same tiny autoencoder for both, runs in turns. `caching`: step caches of diffusers
on the shipped digits, and their cost in quality: Fréchet distance to the training digits over a classifier's
features, and squared pixel difference to the pictures drawn without a cache from the same seeds.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from common import (
    NOT_MEASURED,
    add_flags,
    begin,
    describe,
    draw_bars,
    dtypes,
    finish,
    in_turns,
    ratio,
    shown,
    spread,
    table,
    verdict,
    write,
)
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    FirstBlockCacheConfig,
    TaylorSeerCacheConfig,
)
from matplotlib.figure import Figure
from train_step import build_dit, build_ours, model_config

from erw_hf import ERWPipeline, FlowMatchEulerMaruyamaScheduler
from erw_hf.evaluation.extractors import load_extractor
from erw_hf.evaluation.images import dataset_images, generated_images
from erw_hf.evaluation.quality import extractor_hashes, load_reference, make_reference, measure
from erw_hf.objective import AlignedTransformer
from erw_hf.trainer.flops import count_step_flops


SECTIONS = ("speed", "caching")
PIPELINES = Path(__file__).parent.parent / "pipelines"
INTERVAL = (0.0, 0.7)
GUIDANCE = 1.8
BOTH = [r"transformer_blocks\.\d+\.(attn|ff)"]  # by default TaylorSeer predicts the attentions alone
CACHES = {
    "no cache": None,
    "FirstBlockCache 0.1": FirstBlockCacheConfig(threshold=0.1),
    "FirstBlockCache 0.2": FirstBlockCacheConfig(threshold=0.2),
    "TaylorSeer 3": TaylorSeerCacheConfig(cache_interval=3, taylor_factors_dtype=torch.float32),
    "TaylorSeer 3, feed-forward too": TaylorSeerCacheConfig(
        cache_interval=3, taylor_factors_dtype=torch.float32, cache_identifiers=BOTH
    ),
}


def tiny_autoencoder() -> AutoencoderKL:
    """An autoencoder with SD's compression and one layer of 8 channels per level: negligible beside the transformer."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guided_steps(pipe: ERWPipeline, steps: int) -> int:
    """Seconds of a draw of so many steps."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    times = [t / scheduler.config.num_train_timesteps for t in scheduler.timesteps.tolist()]
    return sum(INTERVAL[0] - 1e-6 <= time <= INTERVAL[1] + 1e-6 for time in times)


# Speed


def measure_speed(
    size: str, batch: int, steps: int, repeats: int, device: str, dtype: torch.dtype, quick: bool
) -> dict[str, object]:
    """Our pipeline, eager and compiled, and diffusers'."""
    config = model_config(size)
    vae = tiny_autoencoder()
    transformer = build_ours(config).eval()
    flops = count_step_flops(AlignedTransformer(transformer, [], 1), []) / 3  # a forward is a third of a step
    pipes = {
        "DiTPipeline": DiTPipeline(build_dit(config).eval(), vae, DDIMScheduler()),
        "ours": ERWPipeline(transformer, vae, FlowMatchEulerMaruyamaScheduler()),
        "ours, compiled": ERWPipeline(copy.deepcopy(transformer), vae, FlowMatchEulerMaruyamaScheduler()),
    }
    pipes = {name: quiet(pipe).to(device, dtype) for name, pipe in pipes.items()}
    # `dynamic`: outside the interval a batch is half as large, and one graph should serve both.
    backend = "eager" if quick else "inductor"
    pipes["ours, compiled"].transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=backend)

    def draw(name: str, steps: int):
        ours = {"guidance_interval": INTERVAL} if name != "DiTPipeline" else {}
        return pipes[name](
            class_labels=list(range(batch)), num_inference_steps=steps, guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0), output_type="np", **ours,
        ).images  # fmt: skip

    drawn = {name: draw(name, 4) for name in pipes}  # warm-up, across the border of the interval
    difference = float(abs(drawn["ours"] - drawn["ours, compiled"]).max())
    if difference > (1e-3 if dtype == torch.float32 else 0.1):
        raise AssertionError(f"compiled and eager pictures differ by {difference}")
    seconds = in_turns({name: lambda n=name: draw(n, steps) for name in pipes}, repeats, 0, device, f"sampling {size}")
    guided = guided_steps(pipes["ours"], steps)
    return {
        "steps": steps,
        "guided_steps": guided,
        "expected_ratio": (steps + guided) / (2 * steps),
        "flops_of_a_forward": flops,
        "seconds": seconds,
        "ratio": {name: ratio(seconds[name], seconds["DiTPipeline"]) for name in ("ours", "ours, compiled")},
        "compiled_over_eager": ratio(seconds["ours, compiled"], seconds["ours"]),
    }


# Step caches


def digits_pipe(cache, device: str) -> ERWPipeline:
    # A new model for each: diffusers 0.40 does not find the hooks of a cache that is enabled after a call.
    pipe = quiet(ERWPipeline.from_pretrained(PIPELINES / "erw-digits")).to(device)
    if cache is not None:
        pipe.transformer.enable_cache(copy.deepcopy(cache))
    return pipe


def count_work(pipe: ERWPipeline, batch: int, steps: int) -> dict[str, float]:
    """Share of attentions and feed-forwards that run, in steps without guidance and in those with it, whose batch is
    twice as large."""
    calls = {(part, guided): 0 for part in ("attention", "feed_forward") for guided in (False, True)}

    def count(part: str) -> Callable[..., None]:
        def hook(module, inputs, output) -> None:
            calls[part, len(output) > batch] += 1

        return hook

    handles = []
    for block in pipe.transformer.transformer_blocks:
        handles.append(block.attn.to_out[0].register_forward_hook(count("attention")))
        handles.append(block.ff.net[2].register_forward_hook(count("feed_forward")))
    draw_digits(pipe, range(batch), steps)
    for handle in handles:
        handle.remove()
    guided = guided_steps(pipe, steps)
    layers = len(pipe.transformer.transformer_blocks)
    return {
        f"{part}, {'guided' if inside else 'not guided'}": number / (layers * (guided if inside else steps - guided))
        for (part, inside), number in calls.items()
    }


def draw_digits(pipe: ERWPipeline, numbers: Sequence[int], steps: int) -> torch.Tensor:
    return generated_images(pipe, len(numbers), 0, "balanced", steps, GUIDANCE, INTERVAL).read(numbers)[0]


def measure_caching(
    count: int, batch: int, steps: int, repeats: int, device: str, names: Sequence[str] = tuple(CACHES)
) -> dict[str, object]:
    """Speed in turns, then quality."""
    pipes = {name: digits_pipe(CACHES[name], device) for name in names}
    work = {name: count_work(pipe, 4, steps) for name, pipe in pipes.items()}
    ways = {name: lambda p=pipe: draw_digits(p, range(batch), steps) for name, pipe in pipes.items()}
    seconds = in_turns(ways, repeats, 1, device, "caching")
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
    extractor = load_extractor(str(PIPELINES / "digits-classifier")).to(device)
    quality: dict[str, dict[str, float]] = {}
    pictures: dict[str, dict[int, torch.Tensor]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = pipes["no cache"].transformer.config.sample_size
        real = dataset_images("digits", "train", side)
        make_reference(folder / "reference.npz", real, [extractor], accelerator, folder / "reference", 100, seed=0)
        reference = load_reference(folder / "reference.npz", ["fid"], extractor_hashes([extractor]), (side, side))
        for way, pipe in pipes.items():
            drawn: dict[int, torch.Tensor] = {}
            images = generated_images(pipe, count, 0, "balanced", steps, GUIDANCE, INTERVAL)
            measured = measure(
                images, ["fid", "accuracy"], reference, [extractor], accelerator, folder / way, batch,
                write=lambda indices, pixels, drawn=drawn: drawn.update(zip(indices, pixels, strict=True)),
            )  # fmt: skip
            pictures[way] = drawn
            difference = [
                (picture.float() - pictures["no cache"][index].float()).div(255).square().mean()
                for index, picture in drawn.items()
            ]
            quality[way] = {**measured.metrics, "mean_squared_difference": float(torch.stack(difference).mean())}
            print(f"{way}: {quality[way]}", flush=True)
    return {
        "samples": count,
        "steps": steps,
        "seconds": seconds,
        "ratio": {way: ratio(values, seconds["no cache"]) for way, values in seconds.items()},
        "share_that_runs": work,
        "quality": quality,
    }


# Reporting


def report(result: dict[str, object]) -> str:
    rows, targets = [], []
    for key, found in result["speed"].items():
        rows += [(key, way, shown(spread(values))) for way, values in found["seconds"].items()]
        held = "" if "tiny" in key else verdict(found["ratio"]["ours"]["median"], 0.87)
        expected = f"{found['expected_ratio']:.2f}: {found['guided_steps']} of {found['steps']} steps are guided"
        targets.append((f"ours / DiTPipeline, {key}", shown(found["ratio"]["ours"]), expected, "<= 0.87", held))
        targets.append((f"ours, compiled / DiTPipeline, {key}", shown(found["ratio"]["ours, compiled"]), "", "", ""))
        targets.append((f"ours, compiled / eager, {key}", shown(found["compiled_over_eager"]), "", "", ""))
    for missing in result["not_measured"]:
        targets.append((missing["what"], NOT_MEASURED, "", "", missing["why"]))
    parts = [table(("figure", "median (min - max)", "by the FLOPs", "target", ""), targets)]
    if rows:
        parts.append(table(("model", "pipeline", "s"), rows))
    if found := result["caching"]:
        rows = []
        for way, quality in found["quality"].items():
            work = found["share_that_runs"][way]
            rows.append(
                (
                    way, shown(found["ratio"][way]), f"{quality['fid']:.3f}", f"{quality['accuracy']:.1%}",
                    f"{quality['mean_squared_difference']:.5f}",
                    *(f"{work[f'{part}, {where}']:.0%}" for part in ("attention", "feed_forward")
                      for where in ("not guided", "guided")),
                )
            )  # fmt: skip
        header = (
            "shipped digits", "time of no cache", "Fréchet distance", "classifier agrees", "mean squared difference",
            "attention run, not guided", "guided", "feed-forward run, not guided", "guided",
        )  # fmt: skip
        parts.append(table(header, rows))
        parts.append(
            f"{found['samples']} digits, {found['steps']} steps, equal seeds; pixels in [0, 1]; distance over the "
            "features of `pipelines/digits-classifier` to the training digits. Guided steps run a batch twice as large, "
            "under a cache context of its own.\n"
        )
    parts.append(
        f"{result['rounds']} rounds. Batch {result['batch']}, guidance {GUIDANCE} in {INTERVAL}, the SDE; DiTPipeline with DDIM guides at all steps. "
        f"{describe(result['environment'])}\n"
    )
    return "\n".join(parts)


def plot(result: dict[str, object]) -> Figure:
    """Speed beside DiTPipeline; speed of the caches against what they cost."""
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    bars = [
        (f"{key}\n{way}", statistics.median(values) / statistics.median(found["seconds"]["DiTPipeline"]))
        for key, found in result["speed"].items()
        for way, values in found["seconds"].items()
    ]
    if bars:
        draw_bars(left, bars, "time over DiTPipeline's")
    if found := result["caching"]:
        for way, quality in found["quality"].items():
            right.plot(found["ratio"][way]["median"], quality["fid"], "o")
            right.annotate(way, (found["ratio"][way]["median"], quality["fid"]), fontsize=7)
        right.set_xlabel("time over that without a cache")
        right.set_ylabel("Fréchet distance")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, SECTIONS, batch=2, repeats=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=500, help="digits drawn per Fréchet distance")
    args = parser.parse_args(arguments)
    digits_batch, names = 50, tuple(CACHES)
    if args.quick:
        args.sizes, args.batch, args.steps, args.samples, args.repeats = "tiny", 1, 8, 10, 2
        digits_batch, names = 5, ("no cache", "TaylorSeer 3")
    result = begin(args, SECTIONS)
    if "speed" in args.only:
        for name in dtypes(args, result):
            for size in args.sizes.split(","):
                result["speed"][f"{size} {name}"] = measure_speed(
                    size, args.batch, args.steps, args.repeats, args.device, getattr(torch, name), args.quick
                )
                torch._dynamo.reset()
                write(args.output, result, report(result))
    if "caching" in args.only:
        repeats = max(args.repeats, 2)
        result["caching"] = measure_caching(args.samples, digits_batch, args.steps, repeats, args.device, names)
    finish(args.output, result, report, plot)


if __name__ == "__main__":
    main()
