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
"""What a run will cost, and what is wrong with it, without running it and without downloading weights or images."""

import torch
from datasets import DatasetInfo, load_dataset_builder
from diffusers import AutoModel as Autoencoder
from transformers import AutoConfig, AutoModel

from erw_hf.data.folder import find_label_column
from erw_hf.data.latents import check_autoencoder
from erw_hf.data.retrying import hub_or_cache
from erw_hf.data.source import (
    FEATURES_COLUMN,
    IMAGE_COLUMNS,
    check_split,
    class_columns,
    find_column,
    is_local,
    load_source,
)
from erw_hf.encoders import VISION_TOWERS, RepresentationEncoder
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.flops import PEAK_FLOPS, count_step_flops
from erw_hf.trainer.setup import build_full_model, build_teacher, build_warmup_model, check_cache


GIB = 2**30


def cost_report(config: TrainingConfig) -> str:
    """
    Checks a configuration and works out its cost: parameters, FLOPs, memory, hours, disk.

    Args:
        config ([`TrainingConfig`]): The run.

    Returns:
        `str`: A table in plain text.

    Raises:
        ValueError: for columns, depths, grids or classes that do not fit, with what to change.
        OSError: for a data set, encoder or autoencoder that does not exist or that this account may not read.
    """
    num_classes, num_images, has_features = _check_data(config)
    if config.vae is not None:
        with hub_or_cache(config.vae, "vae"):
            vae_config = Autoencoder.load_config(config.vae)
        check_autoencoder(vae_config, config.vae, config.in_channels)
    with torch.device("meta"):
        encoders = _encoders_on_meta(config)
        full = build_full_model(config, num_classes, encoders)
        teacher = build_teacher(config, encoders, has_features)
        full_flops = count_step_flops(full, teacher.running(aligned=bool(full.projectors)))
        unaligned_flops = count_step_flops(full, teacher.running(aligned=False))
        warmup_flops = 0
        if config.warmup_steps > 0:
            warmup_flops = count_step_flops(
                build_warmup_model(config, num_classes, encoders), teacher.running(aligned=True)
            )

    batch = config.step_batch_size(processes=1)
    full_steps = config.max_train_steps - config.warmup_steps
    total = batch * (config.warmup_steps * warmup_flops + full_steps * full_flops)
    if config.alignment_schedule == "stop" and config.alignment_stop_step is not None:
        total -= batch * max(0, full_steps - config.alignment_stop_step) * (full_flops - unaligned_flops)
    parameters = sum(p.numel() for p in full.transformer.parameters())
    trained = sum(p.numel() for p in full.parameters())
    frozen = sum(p.numel() for encoder in encoders for p in encoder.parameters())
    # float32 weights, gradients, two AdamW moments; each average has the transformer's weights alone.
    averages = len(config.ema_profiles()) * parameters
    state = 4 * (4 * trained + averages)
    saved = 4 * (3 * trained + averages)  # no gradients
    rows = [
        ("transformer", f"{parameters / 1e6:.1f} M parameters, {config.token_grid}x{config.token_grid} tokens"),
        ("projector, encoder", f"{(trained - parameters) / 1e6:.1f} M trained, {frozen / 1e6:.1f} M frozen"),
        ("data", f"{num_classes or 'no'} classes, {num_images or 'unknown number of'} images"),
        ("FLOPs of a warmup step", f"{warmup_flops * batch:.3e} ({warmup_flops / full_flops:.3f} of a full one)"),
        ("FLOPs of a full step", f"{full_flops * batch:.3e}"),
        ("steps", f"{config.warmup_steps} warmup + {full_steps} full"),
        ("full-step equivalents", f"{total / full_flops / batch:.0f}"),
        ("FLOPs in all", f"{total:.3e}, for each process"),
        (
            "GPU-hours",
            f"{total / PEAK_FLOPS['H100'] / config.dry_run_mfu / 3600:.1f} at {config.dry_run_mfu:.0%} MFU of 989 TFLOP/s, for each process",
        ),
        (
            "memory",
            f"{state / GIB:.1f} GiB of state + {_activations(config, batch) / GIB:.1f} GiB of activations (estimate)",
        ),
        ("checkpoint", f"{saved / GIB:.1f} GiB each, {config.checkpoints_total_limit or 'all'} kept"),
    ]
    if config.vae is not None and num_images:
        # Mean and deviation in float16
        latents = num_images * 2 * config.in_channels * config.sample_size**2 * 2
        rows.append(("latents, if cached", f"{latents / GIB:.1f} GiB, and the images as JPEG beside them"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, "Autoencoder and optimizer are not in the FLOPs. Nothing wrong was found."])


def _check_data(config: TrainingConfig) -> tuple[int, int | None, bool]:
    """Classes, images, and whether the encoder's tokens are cached; of a Hub data set only the metadata is read."""
    if is_local(config.dataset_name):
        source = load_source(**config.source_arguments())
        check_cache(config, source)
        return source.num_classes, None if config.streaming else len(source.dataset), source.has_features
    with hub_or_cache(config.dataset_name, "dataset_name"):
        info = load_dataset_builder(config.dataset_name, config.dataset_config_name).info
    if info.splits:
        sizes = {name: split.num_examples for name, split in info.splits.items()}
        check_split(sizes, config.dataset_split, config.dataset_name)
    columns = list(info.features or {})
    rows_and_features = _rows(info, config), FEATURES_COLUMN in columns
    if columns:
        if find_column(columns, config.image_column, IMAGE_COLUMNS, "image_column") is None:
            raise ValueError(f"no image column among {columns}; name it with --image_column")
        if config.num_classes == 0:
            return 0, *rows_and_features
        label_column = find_label_column(columns, config.label_column, class_columns(info.features))
        names = getattr(info.features.get(label_column), "names", None)
        if names is not None and config.num_classes is not None and len(names) != config.num_classes:
            raise ValueError(f"num_classes={config.num_classes}, the data set has {len(names)} classes")
        if names is not None:
            return len(names), *rows_and_features
        if label_column is None:
            return 0, *rows_and_features
    if config.num_classes is None:
        raise ValueError("the data set does not say how many classes it has: set num_classes")
    return config.num_classes, *rows_and_features


def _rows(info: DatasetInfo, config: TrainingConfig) -> int | None:
    split = (info.splits or {}).get(config.dataset_split)
    return None if split is None else split.num_examples


def _encoders_on_meta(config: TrainingConfig) -> list[RepresentationEncoder]:
    encoders = []
    for name in config.encoders:
        with hub_or_cache(name, "encoder"):
            encoder_config = AutoConfig.from_pretrained(name)
        tower = VISION_TOWERS.get(encoder_config.model_type)
        if tower is not None:
            model = tower(encoder_config.vision_config)
        else:
            model = AutoModel.from_config(encoder_config)
        encoders.append(
            RepresentationEncoder(model, [0.5] * 3, [0.5] * 3, config.token_grid, config.encoder_image_size)
        )
    return encoders


def _activations(config: TrainingConfig, batch: int) -> float:
    """Bytes that the backward pass keeps in bf16: 34 for each token, channel and block (arXiv 2205.05198, Eq. 2, without
    the attention matrix, which fused kernels do not keep), or with checkpointing one block's and all blocks' inputs."""
    width = config.num_attention_heads * config.attention_head_dim
    tokens = batch / config.gradient_accumulation_steps * config.token_grid**2
    kept = 2 * config.num_layers + 34 if config.gradient_checkpointing else 34 * config.num_layers
    return tokens * width * kept
