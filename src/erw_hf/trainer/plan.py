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
"""The plan of a run: the dry run's model of cost, used backwards from a card and a time to a configuration."""

import copy
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from erw_hf.sizes import SIZES
from erw_hf.trainer.config import KEYS, MODEL_KEYS, TrainingConfig, absolute
from erw_hf.trainer.cost import MFU, DataSummary, RunCost, run_cost, run_memory, summarize_data
from erw_hf.trainer.flops import CARDS, Card, card_named
from erw_hf.trainer.initialization import pipeline_folder
from erw_hf.trainer.setup import fit_to_encoder
from erw_hf.transformer_erw import ERWTransformer2DModel


VAE = "stabilityai/sd-vae-ft-ema"  # of a plan that names neither an autoencoder nor the shape of pixels
FEWEST_IMAGES = 10_000_000  # that a model is to see: a rule of thumb
STEP_BATCH = 256  # as published; less for small data
FEWEST_STEPS_OF_PASS = 4
ROOM = 0.9  # share of the card's memory: the rest is for fragments and what the model does not know
FEWEST_SAMPLES = 16  # of a forward pass, below which the next way to save memory is taken
WAYS: tuple[dict[str, Any], ...] = (  # to save memory
    {},
    {"activation_memory_budget": 0.7},
    {"activation_memory_budget": 0.5},
    {"gradient_checkpointing": True},
)
OWN = ("plan", "gpu", "hours", "dry_run")


@dataclass(frozen=True)
class Plan:
    """
    What was chosen.

    Args:
        config ([`TrainingConfig`]): The run.
        cost ([`~trainer.cost.RunCost`]): Of an image.
        seconds (`tuple[float, float]`): Of a step of the warmup and of a full one.
        memory (`float`, *optional*): Bytes of a GPU.
    """

    config: TrainingConfig
    cost: RunCost
    seconds: tuple[float, float]
    memory: float | None

    @property
    def hours(self) -> float:
        """Of both phases."""
        full = self.config.max_train_steps - self.config.warmup_steps
        return (self.config.warmup_steps * self.seconds[0] + full * self.seconds[1]) / 3600


def write_plan(values: Mapping[str, Any], time_steps: Callable[[TrainingConfig], tuple[float, float]]) -> str:
    """
    Chooses what the command line leaves open: model, batch, accumulation, what is recomputed, and the number of steps.

    Args:
        values (`Mapping[str, Any]`): The keys that are set, `gpu` and `hours` among them.
        time_steps (`Callable`): Seconds of a step of the warmup and of a full one, measured on this machine; for `gpu` `"cpu"`.

    Returns:
        `str`: YAML that `--config` takes; its comments say what the run will cost.

    Raises:
        ValueError: for an unknown card, for less time than a step takes, and for what does not fit the card.
        OSError: for data or models that do not exist.
    """
    gpu, hours = values.get("gpu"), values.get("hours")
    if gpu is None or hours is None:
        raise ValueError("--plan needs --gpu (a card such as rtx4090, or cpu) and --hours")
    name = "cpu" if gpu.lower() == "cpu" else card_named(gpu)
    values = {key: absolute(key, value) for key, value in values.items() if key not in OWN}
    values = _architecture(values.get("init_from")) | values
    if not values.keys() & {"vae", "in_channels", "sample_size"}:
        values["vae"] = VAE
    config = _config(values, {})
    if name != "cpu" and config.mixed_precision == "no":
        raise ValueError("--plan knows the speed of cards in bf16 and fp16 alone: omit mixed_precision: no")
    data = summarize_data(config)
    if name == "cpu":
        plan = _on_this_machine(values, hours, data, time_steps)
    else:
        plan = _on_card(values, hours, data, CARDS[name])
    kept = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "gradient_checkpointing")
    chosen = {key: getattr(plan.config, key) for key in (*kept, "activation_memory_budget")}
    if not values.keys() & set(MODEL_KEYS):
        chosen["model"] = plan.config.model
    for key in ("checkpointing_steps", "validation_steps"):
        if key not in values:
            chosen[key] = max(1, min(getattr(plan.config, key), plan.config.max_train_steps // 10))
    lines = _comments(plan, hours, name, data, values)
    text = yaml.safe_dump({**values, **chosen}, sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}\n" for line in lines) + text


def _architecture(init_from: str | None) -> dict[str, Any]:
    """What a local pipeline that is fine-tuned says about its model, where it is not a run's default."""
    file = pipeline_folder(Path(init_from or "")) / "transformer" / "config.json"
    if init_from is None or not file.is_file():
        return {}
    model = json.loads(file.read_text())
    arguments = set(inspect.signature(ERWTransformer2DModel.__init__).parameters) - {"num_classes"}
    names = set(model) & arguments & set(KEYS)
    return {name: model[name] for name in sorted(names) if model[name] != KEYS[name].default}


def _config(values: Mapping[str, Any], changes: Mapping[str, Any]) -> TrainingConfig:
    config = TrainingConfig(**{**values, **changes})
    config.check_names()
    fit_to_encoder(config)
    return config


def _candidates(values: Mapping[str, Any], config: TrainingConfig) -> list[dict[str, str]]:
    """The model that is named, or that of `init_from`; else the published ones, the largest first."""
    if values.keys() & {"model", *MODEL_KEYS, "init_from", "warmup_from"}:
        return [{}]
    patch = 2 if config.vae is not None else max(1, config.sample_size // 16)
    return [{"model": f"{size}/{patch}"} for size in reversed(SIZES)]


def _on_card(values: Mapping[str, Any], hours: float, data: DataSummary, card: Card) -> Plan:
    found = None
    for changes in _candidates(values, _config(values, {})):
        config = _config(values, changes)
        cost = run_cost(config, data)
        fitted = _fit(config, values, cost, data, card)
        if fitted is None:
            continue
        config, memory, slower = fitted
        of_image = slower / (card.flops * MFU)
        batch = config.step_batch_size(processes=1)
        seconds = (batch * cost.warmup_flops * of_image, batch * cost.full_flops * of_image)
        found = Plan(_with_steps(config, hours, seconds), cost, seconds, memory)
        if found.config.max_train_steps * batch >= FEWEST_IMAGES:
            break
    if found is None:
        raise ValueError(f"not one sample fits {card.memory} GB: choose a smaller model, or a card with more memory")
    return found


def _fit(
    config: TrainingConfig, values: Mapping[str, Any], cost: RunCost, data: DataSummary, card: Card
) -> tuple[TrainingConfig, float, float] | None:
    """The configuration with the largest forward pass that fits, its bytes, and how much longer its steps take."""
    whole = _step_batch(config, values, data)
    last = None
    for changes in WAYS:
        if changes.keys() & values.keys():
            continue  # as the user wants it
        if config.torch_compile == "no" and "activation_memory_budget" in changes:
            continue  # of compiled blocks
        tried = copy.copy(config)
        for key, value in changes.items():
            setattr(tried, key, value)
        samples = whole
        while samples >= 1:
            tried.train_batch_size, tried.gradient_accumulation_steps = samples, math.ceil(whole / samples)
            memory = sum(run_memory(tried, cost, data).values())
            if memory <= ROOM * card.memory * 1e9:
                last = copy.copy(tried), memory, _slower(tried)
                break
            samples = max((part for part in range(1, samples) if whole % part == 0), default=0)
        if last is not None and last[0].train_batch_size >= min(whole, FEWEST_SAMPLES):
            break
    return last


def _slower(config: TrainingConfig) -> float:
    """How much longer a step takes than one that recomputes nothing."""
    if config.gradient_checkpointing:
        return 4 / 3
    budget = 1.0 if config.torch_compile == "no" else config.activation_memory_budget
    return 1.0 if budget == 1 else 1.05 if budget >= 0.7 else 1.1


def _step_batch(config: TrainingConfig, values: Mapping[str, Any], data: DataSummary) -> int:
    if values.keys() & {"train_batch_size", "gradient_accumulation_steps"}:
        return config.step_batch_size(processes=1)
    batch = STEP_BATCH
    while data.num_images and batch > FEWEST_SAMPLES and batch * FEWEST_STEPS_OF_PASS > data.num_images:
        batch //= 2
    return batch


def _on_this_machine(
    values: Mapping[str, Any],
    hours: float,
    data: DataSummary,
    time_steps: Callable[[TrainingConfig], tuple[float, float]],
) -> Plan:
    config = _config(values, _candidates(values, _config(values, {}))[-1])
    seconds = time_steps(config)
    return Plan(_with_steps(config, hours, seconds), run_cost(config, data), seconds, None)


def _with_steps(config: TrainingConfig, hours: float, seconds: tuple[float, float]) -> TrainingConfig:
    left = hours * 3600 - config.warmup_steps * seconds[0]
    steps = math.floor(left / seconds[1])
    fewest = max(1, config.lr_warmup_steps)
    if steps < fewest:
        needed = (config.warmup_steps * seconds[0] + fewest * seconds[1]) / 3600
        after = f" after a warmup of {config.warmup_steps}" * (config.warmup_steps > 0)
        lower = f"set lr_warmup_steps, which is {fewest}, lower, " * (fewest > 1)
        raise ValueError(
            f"only {max(0, steps)} full steps of {seconds[1]:.3g} s fit in {hours:g} h{after}, fewer than {fewest}: {lower}allow "
            f"{needed:.2g} h, or choose a smaller model or batch"
        )
    config.max_train_steps = config.warmup_steps + steps
    return config


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _comments(plan: Plan, hours: float, name: str, data: DataSummary, values: Mapping[str, Any]) -> list[str]:
    config, cost = plan.config, plan.cost
    images = config.max_train_steps * config.step_batch_size(processes=1)
    card = CARDS.get(name)
    where = "this machine's CPU" if card is None else f"one {name} ({card.memory} GB)"
    size = (
        config.model or f"{config.num_layers} blocks of width {config.num_attention_heads * config.attention_head_dim}"
    )
    chosen = "as given" if values.keys() & {"model", *MODEL_KEYS, "init_from"} else "chosen by a rule of thumb:"
    if chosen != "as given":
        chosen += f" the largest that sees {FEWEST_IMAGES / 1e6:.0f} M images in this time, else the smallest"
    lines = [
        f"A plan for {hours:g} h on {where}, by train_erw.py --plan. It promises no quality.",
        f"model: {size}, {cost.parameters / 1e6:.1f} M parameters ({cost.trained / 1e6:.1f} M trained), {chosen}",
    ]
    if card is None:
        lines.append(
            f"time: {_duration(plan.hours)}, measured: {plan.seconds[1]:.3g} s per full step on this machine, the median of a few; "
            "without start, pictures and evaluations"
        )
        lines.append("memory: not modelled for a CPU")
    else:
        lines.append(
            f"time: {_duration(plan.hours)}, modelled: {cost.full_flops:.2e} FLOPs per image are counted, {MFU:.0%} of "
            f"{card.flops / 1e12:.0f} TFLOP/s is assumed; `mfu` in metrics.jsonl will show the real share"
        )
        assert plan.memory is not None
        lines.append(
            f"memory: {plan.memory / 1e9:.1f} of {card.memory} GB, modelled: a block's activations are counted, "
            "the CUDA context is assumed; `peak_memory_gib` in metrics.jsonl will show the real peak"
        )
    lines.append(
        f"images: {images:,}".replace(",", " ")
        + (f", each {images / data.num_images:.0f} times" if data.num_images else "")
    )
    if data.num_images and images > 1000 * data.num_images:
        advice = "stop early (patience) or lower max_train_steps"
        if config.init_from is None:
            advice = f"fine-tune published weights (init_from, lora_rank), {advice}"
        lines.append(f"  so few images will be memorised: {advice}")
    if cost.vae_flops:
        share = cost.vae_flops / cost.full_flops
        lines.append(
            f"cache: the data is not a latent cache. cache_latents.py would save {share:.0%} of each step's FLOPs (modelled) and pays after the first "
            "epoch; instead of random_flip it has --flipped"
        )
    return lines
