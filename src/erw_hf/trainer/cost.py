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
"""The dry run: checks a configuration and computes its cost without running it or downloading weights or images."""

import os
from dataclasses import dataclass

import torch
from datasets import Dataset, DatasetInfo, load_dataset_builder
from diffusers import AutoModel as Autoencoder
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from transformers import AutoConfig

from erw_hf.data.cache import FEATURES_COLUMN, MOMENTS_COLUMN
from erw_hf.data.folder import find_label_column
from erw_hf.data.latents import check_autoencoder, image_channels
from erw_hf.data.retrying import hub_or_cache
from erw_hf.data.samples import read_row
from erw_hf.data.source import (
    IMAGE_COLUMNS,
    Source,
    check_split,
    class_columns,
    find_column,
    first_classes,
    is_local,
)
from erw_hf.encoders import RepresentationEncoder
from erw_hf.objective import Teacher
from erw_hf.pipeline_erw import ERWPipeline
from erw_hf.provenance import device_name
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.device import choose_precision, found_device
from erw_hf.trainer.ema import ema_profiles
from erw_hf.trainer.flops import CARDS, count_encoder_flops, count_step_flops, count_vae_flops
from erw_hf.trainer.memory import GIB, step_memory
from erw_hf.trainer.optimizers import muon_matrices
from erw_hf.trainer.run_record import split_names
from erw_hf.trainer.setup import (
    add_lora,
    build_full_model,
    build_teacher,
    build_warmup_model,
    check_start,
    fit_to_encoder,
    open_source,
    teaches_embedding,
    vae_precision,
)
from erw_hf.transformer_erw import ERWTransformer2DModel


MFU = 0.4  # share of the GPU's peak that the hours assume
SHOWN_CLASSES = 5


@dataclass(frozen=True)
class DataSummary:
    """What is known of the data before training: `num_images` is `None` for a stream, `class_names` may be empty."""

    num_images: int | None
    num_classes: int
    class_names: list[str]
    has_features: bool  # an encoder's tokens are cached
    image_size: int
    channels: int
    has_latents: bool = False  # moments are cached


def summary_of(source: Source, image_size: int, channels: int) -> DataSummary:
    """What the reports show of data that has been opened, for images of a side in pixels."""
    images = len(source.dataset) if isinstance(source.dataset, Dataset) else None
    names = [] if source.id2label is None else [source.id2label[i] for i in sorted(source.id2label)]
    return DataSummary(
        images, source.num_classes, names, source.has_features, image_size, channels, source.is_latent_cache
    )


def start_report(
    config: TrainingConfig, data: DataSummary, precision: tuple[str, str], device: torch.device, processes: int
) -> str:
    """What is about to happen, in one block; a run and its dry run print the same. `precision` is what
    [`~trainer.device.choose_precision`] chose."""
    with torch.device("meta"):
        transformer = ERWTransformer2DModel(**config.model_config(data.num_classes))
    processor = next(iter(transformer.attn_processors.values()))
    kernel = AttentionBackendName(processor._attention_backend or DIFFUSERS_ATTN_BACKEND).value
    images = "streamed, not counted" if data.num_images is None else f"{data.num_images}"
    classes = str(data.num_classes or "none: unconditional")
    if data.class_names:
        classes += f": {first_names(data.class_names)}"
    side, channels = data.image_size, data.channels
    latents = f"latents {config.in_channels}x{config.sample_size}x{config.sample_size}" if config.vae else "no latents"
    size = f"{config.num_layers} blocks of width {config.num_attention_heads * config.attention_head_dim}"
    name = f"{config.model}: " if config.model else ""
    vae = (
        f"{config.vae}, in every step in {'bf16' if vae_precision(device.type, precision[0]) == 'bf16' else 'float32'}"
    )
    if data.has_latents:
        vae = f"{config.vae}, not run: latents are cached"
    batch, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    return _table([
        ("data", f"{config.dataset_name}, split {config.dataset_split}"),
        ("images", f"{images}; {side}x{side} px, {channels} channel{'s' * (channels > 1)}; {latents}"),
        *([("vae", vae)] if config.vae else []),
        ("classes", classes),
        ("model", f"{name}{size}, {config.token_grid}x{config.token_grid} tokens"),
        ("encoder", ", ".join(config.encoders) or "none"),
        *([("start", start)] if (start := _start(config)) else []),
        (
            "batch",
            f"{processes} process{'es' * (processes > 1)} x {batch} x {accumulation} accumulated = "
            f"{config.step_batch_size(processes)}",
        ),
        ("precision", f"{'float32' if precision[0] == 'no' else precision[0]} ({precision[1]})"),
        ("device", f"{device.type}: {device_name(device)}"),
        ("attention", f"{kernel}{', torch chooses the kernel' * (kernel == 'native')}"),
        ("steps", f"{config.warmup_steps} warmup + {config.max_train_steps - config.warmup_steps} full"),
        ("writes to", config.output_dir),
    ])  # fmt: skip


def first_names(names: list[str]) -> str:
    """The first few of the names of classes, for a line of the log."""
    return ", ".join(names[:SHOWN_CLASSES]) + ", ..." * (len(names) > SHOWN_CLASSES)


def _start(config: TrainingConfig) -> str | None:
    if config.lora_rank > 0:
        alpha = config.lora_alpha or config.lora_rank
        return f"{config.init_from}, with a LoRA of rank {config.lora_rank} and alpha {alpha} on {config.lora_targets}"
    if not config.start_from_encoder:
        return config.init_from or config.warmup_from
    frozen = "" if config.warmup_trains_blocks else ", frozen in the warmup"
    return (
        f"the first {config.start_from_encoder} blocks of {split_names(config.encoder or '')[0]}{frozen}; "
        f"{config.activation_fn}, norm_eps {config.norm_eps:g}, {config.pos_embed_type} positions"
    )


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@dataclass(frozen=True)
class RunCost:
    """
    What a run costs, counted on the meta device.

    Args:
        parameters (`int`): Of the transformer.
        whole (`int`): Of transformer and projectors.
        trained (`int`): Of these, those that are trained.
        averaged (`int`): Of the transformer's, those that are trained: each average has them.
        moments (`int`): Numbers that the optimizer keeps: two for each trained parameter, one where Muon steps it.
        frozen (`int`): Parameters of the encoders.
        warmup_flops (`int`): Of an image in the warmup, autoencoder and encoder counted; 0 without one.
        full_flops (`int`): Of an image in full training.
        vae_flops (`int`): Of encoding one image.
        encoding_flops (`int`): Of the autoencoder and the encoders.
        total_flops (`float`): Of the run, for each process.
        vae (a diffusers autoencoder, *optional*): What a step encodes images with; on the meta device.
    """

    parameters: int
    whole: int
    trained: int
    averaged: int
    moments: int
    frozen: int
    warmup_flops: int
    full_flops: int
    vae_flops: int
    encoding_flops: int
    total_flops: float
    vae: ModelMixin | None


def run_cost(config: TrainingConfig, data: DataSummary) -> RunCost:
    """
    Args:
        config ([`TrainingConfig`]): The run.
        data ([`DataSummary`]): Its data.

    Returns:
        [`RunCost`]: What it costs.

    Raises:
        ValueError: for depths or grids that do not fit.
    """
    num_classes = data.num_classes
    with torch.device("meta"):
        encoders = [_encoder_on_meta(config, name) for name in config.encoders]
        full = build_full_model(config, num_classes, encoders)
        if config.lora_rank > 0:
            add_lora(full, config)
        teacher = build_teacher(config, encoders, data.has_features)
        full_flops = count_step_flops(full, teacher.encoders_for(aligned=bool(full.projectors)))
        unaligned_flops = full_flops
        if full.projectors:
            unaligned_flops = count_step_flops(full, teacher.encoders_for(aligned=False))
        warmup_flops = 0
        warmup_teacher, start_encoder = teacher, None
        if config.start_from_encoder > 0 and config.warmup_from is None:
            name = split_names(config.encoder or "")[0]
            start_encoder = _encoder_on_meta(config, name)
            check_start(config, start_encoder, data.has_features)
            if teaches_embedding(config, start_encoder):
                warmup_teacher = Teacher([_encoder_on_meta(config, name, config.start_from_encoder)])
        if config.warmup_steps > 0:
            warmup = build_warmup_model(config, num_classes, encoders, start_encoder)
            warmup_flops = count_step_flops(warmup, warmup_teacher.encoders_for(aligned=True))
    vae = None if data.has_latents else _vae_on_meta(config)
    vae_flops = count_vae_flops(vae, data.image_size)
    encoding_flops = vae_flops + sum(count_encoder_flops(encoder) for encoder in teacher.encoders_for(aligned=True))
    full_flops, unaligned_flops = full_flops + vae_flops, unaligned_flops + vae_flops
    warmup_flops += vae_flops if config.warmup_steps > 0 else 0

    batch = config.step_batch_size(processes=1)
    full_steps = config.max_train_steps - config.warmup_steps
    total = batch * (config.warmup_steps * warmup_flops + full_steps * full_flops)
    if config.alignment_schedule == "stop" and config.alignment_stop_step is not None:
        total -= batch * max(0, full_steps - config.alignment_stop_step) * (full_flops - unaligned_flops)
    whole = sum(p.numel() for p in full.parameters())
    trained = sum(p.numel() for p in full.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in full.transformer.parameters() if p.requires_grad)
    stepped_by_muon = sum(p.numel() for p in muon_matrices(full).values()) if config.optimizer == "muon" else 0
    frozen = sum(p.numel() for encoder in encoders for p in encoder.parameters())
    return RunCost(
        parameters=sum(p.numel() for p in full.transformer.parameters()),
        whole=whole,
        trained=trained,
        averaged=averaged,
        moments=2 * trained - stepped_by_muon,
        frozen=frozen,
        warmup_flops=warmup_flops,
        full_flops=full_flops,
        vae_flops=vae_flops,
        encoding_flops=encoding_flops,
        total_flops=total,
        vae=vae,
    )


def run_memory(config: TrainingConfig, cost: RunCost, data: DataSummary) -> dict[str, float]:
    """
    Args:
        config ([`TrainingConfig`]): The run, or one that differs in its batch and in what it recomputes.
        cost ([`RunCost`]): What it costs.
        data ([`DataSummary`]): Its data.

    Returns:
        `dict[str, float]`: [`~trainer.memory.step_memory`].
    """
    under = cost.whole - cost.trained
    return step_memory(
        config, cost.averaged, cost.trained, cost.moments, cost.frozen, cost.vae, data.image_size, under
    )


def cost_report(config: TrainingConfig) -> str:
    """
    Checks a configuration and computes its cost, as a table: parameters, FLOPs, memory, hours, disk.

    Raises:
        ValueError: for columns, depths, grids or classes that do not fit, with what to change.
        OSError: for a dataset, encoder or autoencoder that does not exist or that this account may not read.
    """
    fit_to_encoder(config)
    precision = choose_precision(config.mixed_precision)
    data = summarize_data(config)
    start = start_report(config, data, precision, found_device(), int(os.environ.get("WORLD_SIZE", 1)))
    cost, batch = run_cost(config, data), config.step_batch_size(processes=1)
    full_steps = config.max_train_steps - config.warmup_steps
    # float32 weights and moments; each average has the transformer's trained weights alone.
    saved = 4 * (cost.whole + cost.moments + len(ema_profiles(config)) * cost.averaged)
    rows = [
        ("transformer", f"{cost.parameters / 1e6:.1f} M parameters, {config.token_grid}x{config.token_grid} tokens"),
        (
            "projector, encoder",
            f"{(cost.whole - cost.parameters) / 1e6:.1f} M trained, {cost.frozen / 1e6:.1f} M frozen",
        ),
        *([("adapter", f"{cost.trained / 1e6:.2f} M trained, class embeddings included")] if config.lora_rank else []),
        (
            "FLOPs of a warmup step",
            f"{cost.warmup_flops * batch:.3e} ({cost.warmup_flops / cost.full_flops:.3f} of a full one)",
        ),
        (
            "FLOPs of a full step",
            f"{cost.full_flops * batch:.3e}, {cost.encoding_flops / cost.full_flops:.0%} of it autoencoder and encoder"
            + ", which a latent cache spares" * (cost.vae_flops > 0),
        ),
        ("steps", f"{config.warmup_steps} warmup + {full_steps} full"),
        ("full-step equivalents", f"{cost.total_flops / cost.full_flops / batch:.0f}"),
        ("FLOPs in all", f"{cost.total_flops:.3e}, for each process"),
        (
            "GPU-hours",
            f"{cost.total_flops / CARDS['H100'].flops / MFU / 3600:.1f} at {MFU:.0%} MFU of 989 TFLOP/s, per rank",
        ),
        ("memory", memory_line(run_memory(config, cost, data))),
        ("EMA", _average(config, full_steps)),
        ("checkpoint", f"{saved / GIB:.1f} GiB each, {config.checkpoints_total_limit or 'all'} kept"),
    ]
    if config.vae is not None and data.num_images:
        # Mean and deviation in float16
        latents = data.num_images * 2 * config.in_channels * config.sample_size**2 * 2
        rows.append(("latents, if cached", f"{latents / GIB:.1f} GiB, and the images as JPEG beside them"))
    return f"{start}\n\n{_table(rows)}\nThe FLOPs do not include the optimizer. No problem was found."


def memory_line(memory: dict[str, float]) -> str:
    """The sum of [`~trainer.memory.step_memory`] and its parts, in words."""
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.items())
    return f"{sum(memory.values()) / GIB:.1f} GiB on a GPU (estimate): {parts}"


def summarize_data(config: TrainingConfig) -> DataSummary:
    """Looks at a run's data: at a local dataset as a whole, at one on the Hub by its metadata alone."""
    if is_local(config.dataset_name):
        source = open_source(config)
        if not config.streaming:
            read_row(source, 0)  # skips broken ones; none at all is said now
        return summary_of(source, *_check_pixels(config))
    with hub_or_cache(config.dataset_name, "dataset_name"):
        info = load_dataset_builder(config.dataset_name, config.dataset_config_name).info
    if info.splits:
        sizes = {name: split.num_examples for name, split in info.splits.items()}
        check_split(sizes, config.dataset_split, config.dataset_name)
    columns, names, label_column = list(info.features or {}), None, None
    if columns:
        if find_column(columns, config.image_column, IMAGE_COLUMNS, "image_column") is None:
            raise ValueError(f"no image column among {columns}; name it with --image_column")
        if config.num_classes != 0:
            label_column = find_label_column(columns, config.label_column, class_columns(info.features))
        names = getattr(info.features.get(label_column), "names", None)
    num_classes = config.num_classes
    if names is not None:
        names = first_classes(names, num_classes)
        num_classes = len(names)
    elif columns and label_column is None:
        num_classes = 0
    elif num_classes is None:
        raise ValueError("the dataset does not say how many classes it has: set num_classes")
    return DataSummary(
        _rows(info, config),
        num_classes,
        names or [],
        FEATURES_COLUMN in columns,
        *_check_pixels(config),
        MOMENTS_COLUMN in columns,
    )


def _check_pixels(config: TrainingConfig) -> tuple[int, int]:
    """Side and channels of the images, without the autoencoder's weights."""
    vae = _vae_on_meta(config)
    if vae is None:
        return config.sample_size, config.in_channels
    return config.sample_size * ERWPipeline.vae_scale_factor_of(vae), image_channels(vae)


def _vae_on_meta(config: TrainingConfig) -> ModelMixin | None:
    if config.vae is None:
        return None
    with hub_or_cache(config.vae, "vae"):
        vae_config = Autoencoder.load_config(config.vae)
    check_autoencoder(vae_config, config.vae, config.in_channels)
    with torch.device("meta"):
        return Autoencoder.from_config(vae_config)


def _average(config: TrainingConfig, steps: int) -> str:
    """Where the averaged weights, which make pictures and pipeline, are at the end."""
    share, behind = ema_profiles(config)[0].after(steps)
    text = f"at the end {behind:.0f} steps behind the weights, {share:.1%} initial weights"
    if share > 0.05:
        text += ": too slow for this run, set ema_ramp or a lower ema_decay"
    return text


def _rows(info: DatasetInfo, config: TrainingConfig) -> int | None:
    split = (info.splits or {}).get(config.dataset_split)
    return None if split is None else split.num_examples


def _encoder_on_meta(config: TrainingConfig, name: str, depth: int | None = None) -> RepresentationEncoder:
    with hub_or_cache(name, "encoder"):
        encoder_config = AutoConfig.from_pretrained(name)
    return RepresentationEncoder.from_config(
        encoder_config, config.token_grid, config.encoder_image_size, config.encoder_antialias, depth
    )
