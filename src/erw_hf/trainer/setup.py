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
"""Building the inputs of a run from its configuration: data, autoencoder, encoders, the models of the two phases."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoModel, ModelMixin
from transformers import AutoConfig

from erw_hf.alignment import ConvProjector, MLPProjector, TransformerProjector, choose_alignment_loss
from erw_hf.data.cache import check_cache, check_cache_weights
from erw_hf.data.latents import check_autoencoder, check_finite, image_channels, moments_to_latents, pixels_to_latents
from erw_hf.data.retrying import hub_or_cache
from erw_hf.data.source import Source, load_source
from erw_hf.encoders import RepresentationEncoder, vit_blocks
from erw_hf.objective import AlignedTransformer, Objective, Teacher
from erw_hf.pipeline_erw import ERWPipeline
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.device import to_device
from erw_hf.trainer.run_record import split_names
from erw_hf.transformer_erw import ERWTransformer2DModel
from erw_hf.warmup import build_warmup_transformer, encoder_options, start_from_encoder, takes_patch_embedding


Encoders = Sequence[RepresentationEncoder]


@dataclass(frozen=True)
class Inputs:
    """
    What is known before the first step.

    Args:
        config ([`TrainingConfig`]): The run.
        accelerator (`Accelerator`): The processes.
        source ([`~data.source.Source`]): The data.
        vae (a diffusers autoencoder, *optional*): `None` for a run on pixels.
        teacher ([`~objective.Teacher`]): What is aligned with.
        warmup_teacher ([`~objective.Teacher`]): What the warmup aligns with: the same, or with a new patch embedding before an
            encoder's blocks the tokens after these.
        start_encoder ([`RepresentationEncoder`], *optional*): Whose blocks the model starts from, in float32 on the CPU.
        objective ([`~objective.Objective`]): What is minimised.
        model_config (`dict`): Arguments of the full [`ERWTransformer2DModel`].
        image_size (`int`): Side of the images, in pixels.
        image_channels (`int`): 3 for RGB, 1 for grey.
    """

    config: TrainingConfig
    accelerator: Accelerator
    source: Source
    vae: ModelMixin | None
    teacher: Teacher
    warmup_teacher: Teacher
    start_encoder: RepresentationEncoder | None
    objective: Objective
    model_config: dict[str, Any]
    image_size: int
    image_channels: int

    @property
    def step_batch_size(self) -> int:
        """Images of a step, over all processes."""
        return self.config.step_batch_size(self.accelerator.num_processes)

    @property
    def vae_precision(self) -> str:
        """`"bf16"` for images that a step encodes on a GPU in bf16, else `"no"`."""
        return vae_precision(self.accelerator.device.type, self.accelerator.mixed_precision)

    def autocast_vae(self) -> torch.autocast:
        """Around what encodes a step's images; a latent cache is made in float32."""
        return torch.autocast(
            self.accelerator.device.type, torch.bfloat16, enabled=self.vae_precision == "bf16", cache_enabled=False
        )


def open_inputs(config: TrainingConfig, accelerator: Accelerator) -> Inputs:
    """Loads everything and checks that it fits together."""
    source = open_source(config)
    vae, image_size, channels = load_vae(config, accelerator.device)
    if source.is_latent_cache and vae is not None:
        check_cache_weights(config.dataset_name, str(config.vae), vae)
    encoders = load_encoders(config, accelerator.device, accelerator.mixed_precision)
    model_config = config.model_config(source.num_classes, class_token_dim(config, encoders))
    teacher = warmup_teacher = build_teacher(config, encoders, source.has_features)
    start_encoder = None
    if config.start_from_encoder > 0 and config.warmup_from is None:
        start_encoder = _load_encoder(config, split_names(config.encoder or "")[0], torch.float32)
        check_start(config, start_encoder, source.has_features)
        if teaches_embedding(config, start_encoder):
            dtype = _encoder_dtype(accelerator.mixed_precision)
            early = _load_encoder(config, config.encoders[0], dtype, accelerator.device, config.start_from_encoder)
            warmup_teacher = Teacher([early])
    return Inputs(
        config=config,
        accelerator=accelerator,
        source=source,
        vae=vae,
        teacher=teacher,
        warmup_teacher=warmup_teacher,
        start_encoder=start_encoder,
        objective=build_objective(config),
        model_config=model_config,
        image_size=image_size,
        image_channels=channels,
    )


def open_source(config: TrainingConfig) -> Source:
    """The data; of a latent cache one that fits the run."""
    source = load_source(**config.source_arguments())
    if source.is_latent_cache:
        check_cache(source.has_features, config.encoders, vars(config))
    return source


def fit_to_encoder(config: TrainingConfig) -> None:
    """Sets the keys of the model that the blocks of `start_from_encoder` need: the configuration is then what is trained."""
    if config.start_from_encoder == 0:
        return
    name = split_names(config.encoder or "")[0]
    with hub_or_cache(name, "encoder"):
        encoder_config = AutoConfig.from_pretrained(name)
    for key, value in encoder_options(encoder_config, config.model_config(num_classes=0), name).items():
        setattr(config, key, value)


def teaches_embedding(config: TrainingConfig, encoder: RepresentationEncoder) -> bool:
    """Whether the patch embedding before the blocks of `start_from_encoder` is a new one, which the warmup teaches."""
    return config.vae is not None or not takes_patch_embedding(encoder, config.model_config(0))


def check_start(config: TrainingConfig, encoder: RepresentationEncoder, cached: bool) -> None:
    """Raises where the encoder has fewer blocks than `start_from_encoder`, or a new patch embedding would not be taught."""
    depth, blocks = config.start_from_encoder, len(vit_blocks(encoder.model))
    if depth > blocks:
        raise ValueError(f"start_from_encoder={depth}: the encoder {config.encoder} has {blocks} blocks")
    if not teaches_embedding(config, encoder):
        return
    new = f"start_from_encoder={depth}: the patch embedding before the encoder's blocks is a new one"
    if config.warmup_steps == 0:
        raise ValueError(
            f"{new}, which only a warmup can teach: set warmup_steps, to some hundreds, and warmup_depth={depth}"
        )
    if config.warmup_depth != depth:
        raise ValueError(f"{new}, taught by the encoder's tokens after block {depth}: set warmup_depth={depth}")
    if cached:
        raise ValueError(
            f"{new}, taught by the encoder's tokens after block {depth}, and the latent cache holds the last ones: make it by "
            "cache_latents.py without --encoder (the run then encodes its images)"
        )
    if config.class_token_weight > 0:
        raise ValueError(f"{new}, whose warmup has no class token: set class_token_weight to 0")


@torch.no_grad()
def nonfinite_inputs(inputs: Inputs, samples: Mapping[str, torch.Tensor]) -> list[str]:
    """Which of a batch's latents and tokens hold NaN or infinity, by the name of the model that made them."""
    config, vae = inputs.config, inputs.vae
    samples = to_device(dict(samples), inputs.accelerator.device)
    found = {}
    if "moments" in samples:
        assert vae is not None
        found[f"the cached latents of {config.dataset_name}"] = moments_to_latents(samples["moments"], vae)
    elif vae is not None:
        with inputs.autocast_vae():
            latents = pixels_to_latents(samples["pixels"], vae)
        found[f"the latents of the vae {config.vae} (in {vae.dtype})"] = latents
    if config.encoders:
        targets, _ = inputs.teacher(samples, aligned=True)
        found |= {
            f"the tokens of the encoder {name}": t for name, t in zip(config.encoders, targets or (), strict=True)
        }
    return [name for name, values in found.items() if not values.isfinite().all()]


def load_vae(config: TrainingConfig, device: torch.device) -> tuple[ModelMixin | None, int, int]:
    """
    The autoencoder, or `None`, and the side and channels of the images that make latents of the configured size; without an
    autoencoder those of the images that are trained on.

    Raises:
        ValueError: if its latents are of another shape than the model's, or NaN or infinite.
    """
    if config.vae is None:
        return None, config.sample_size, config.in_channels
    check_autoencoder(AutoModel.load_config(config.vae), config.vae, config.in_channels)
    vae = AutoModel.from_pretrained(config.vae).to(device).eval().requires_grad_(False)
    factor = ERWPipeline.vae_scale_factor_of(vae)
    channels = image_channels(vae)
    side = config.sample_size * factor
    with torch.no_grad():
        latents = pixels_to_latents(torch.zeros(1, channels, side, side, device=device), vae)
    check_finite(latents, config.vae, vae, ["black"])
    shape = tuple(latents.shape[1:])
    if shape != (config.in_channels, config.sample_size, config.sample_size):
        raise ValueError(
            f"the vae makes latents (C, H, W) = {shape} of {side} px images, the config has in_channels="
            f"{config.in_channels} and sample_size={config.sample_size}"
        )
    if device.type == "cuda" and config.compiles(device.type):
        vae.encoder.compile()  # after the check, whose batch of one would be a graph of its own
    return vae, side, channels


def vae_precision(device_type: str, mixed_precision: str) -> str:
    """`"bf16"` or `"no"`: what an autoencoder computes in, in a step; its weights stay float32. bf16 keeps 8 bits of a
    latent, as the model does that reads it, and has the range of float32; fp16, which may overflow, is not used. A
    latent cache is made in float32."""
    return "bf16" if device_type == "cuda" and mixed_precision == "bf16" else "no"


def load_encoders(config: TrainingConfig, device: torch.device, mixed_precision: str) -> list[RepresentationEncoder]:
    """The teachers, in the precision of the run and compiled if it compiles; empty for a run without alignment."""
    return [_load_encoder(config, name, _encoder_dtype(mixed_precision), device) for name in config.encoders]


def _encoder_dtype(mixed_precision: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)


def _load_encoder(
    config: TrainingConfig, name: str, dtype: torch.dtype, device: torch.device | None = None, depth: int | None = None
) -> RepresentationEncoder:
    """To run on a device, or for its weights alone."""
    encoder = RepresentationEncoder.from_pretrained(
        name, config.token_grid, config.encoder_image_size, dtype, config.encoder_antialias, depth=depth
    )
    if device is not None:
        encoder = encoder.to(device)
        if config.compiles(device.type):
            encoder.model.compile()
    return encoder


def build_warmup_model(
    config: TrainingConfig, num_classes: int, encoders: Encoders, start_encoder: RepresentationEncoder | None = None
) -> AlignedTransformer:
    """
    The model of the warmup. With `start_encoder` its blocks are those to begin with; before a new patch embedding they are aligned
    with that encoder's own tokens, without a projector.
    """
    model_config = config.model_config(num_classes, class_token_dim(config, encoders))
    transformer = build_warmup_transformer(model_config, config.warmup_depth)
    projectors = _projectors(config, encoders)
    if start_encoder is not None:
        _start(transformer, config, start_encoder)
        if teaches_embedding(config, start_encoder):
            projectors = [torch.nn.Identity()]
        if not config.warmup_trains_blocks:
            transformer.transformer_blocks[: config.start_from_encoder].requires_grad_(False)
    return AlignedTransformer(
        transformer,
        projectors,
        config.warmup_depth,
        warmup=True,
        aligns_class_token=_aligns_class_token(config),
    )


def build_full_model(
    config: TrainingConfig, num_classes: int, encoders: Encoders, start_encoder: RepresentationEncoder | None = None
) -> AlignedTransformer:
    """The model of full training, without projectors if nothing is aligned; with `start_encoder` its first blocks are
    that one's."""
    transformer = ERWTransformer2DModel(**config.model_config(num_classes, class_token_dim(config, encoders)))
    if start_encoder is not None:
        _start(transformer, config, start_encoder)
    projectors = _projectors(config, encoders) if config.alignment_weight > 0 else []
    return AlignedTransformer(
        transformer, projectors, config.projector_depth, aligns_class_token=_aligns_class_token(config)
    )


def add_lora(model: AlignedTransformer, config: TrainingConfig, new_classes: Sequence[int] = ()) -> None:
    """
    Freezes a model and adds the adapter of `lora_rank`, which is trained with the embeddings of some classes. The mask of those
    is a buffer of the model, so that a checkpoint holds it.
    """
    try:
        from peft import LoraConfig
    except ImportError as missing:
        raise ImportError("lora_rank needs peft: pip install peft") from missing

    transformer = model.transformer
    model.requires_grad_(False)
    rank, targets = config.lora_rank, split_names(config.lora_targets)
    alpha = rank if config.lora_alpha is None else config.lora_alpha
    layers = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if unknown or not targets:
        kinds = sorted({re.sub(r"transformer_blocks\.\d+\.", "", name) for name in layers})
        raise ValueError(
            f"lora_targets: no linear layer is called {unknown or 'nothing'}; there are {', '.join(kinds)}"
        )
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    table = transformer.time_class_embed.class_embedder.weight.requires_grad_()
    mask = torch.zeros(len(table), 1, device=table.device)
    mask[list(new_classes)] = 1
    model.register_buffer("new_classes", mask)
    table.register_hook(lambda gradient: gradient * model.new_classes)


def _start(transformer: ERWTransformer2DModel, config: TrainingConfig, encoder: RepresentationEncoder) -> None:
    with_patch_embedding = not teaches_embedding(config, encoder)
    start_from_encoder(transformer, encoder, config.start_from_encoder, with_patch_embedding)


def class_token_dim(config: TrainingConfig, encoders: Encoders) -> int | None:
    """
    Width of the first encoder's class token, `None` for a run without one.

    Raises:
        ValueError: if that encoder has none.
    """
    return encoders[0].class_token_dim if config.class_token_weight > 0 else None


def build_teacher(config: TrainingConfig, encoders: Encoders, cached: bool) -> Teacher:
    """The teacher of a run; `cached`: the encoders' tokens come from a latent cache."""
    return Teacher(
        encoders,
        spatial_norm=config.spatial_norm,
        draws_class_token=config.class_token_weight > 0,
        aligns_class_token=_aligns_class_token(config),
        cached=cached,
    )


def build_objective(config: TrainingConfig) -> Objective:
    """The objective of a run, whose keys are its fields."""
    keys = {field.name: getattr(config, field.name) for field in fields(Objective) if field.name != "align"}
    if config.encoder is None:
        keys["alignment_weight"] = 0.0
    return Objective(align=choose_alignment_loss(config.alignment_loss, config.alignment_temperature), **keys)


def _aligns_class_token(config: TrainingConfig) -> bool:
    """REG aligns it; iREPA's convolution over the grid cannot take it."""
    return config.class_token_weight > 0 and config.projector != "conv"


def _projectors(config: TrainingConfig, encoders: Encoders) -> list[torch.nn.Module]:
    width = config.num_attention_heads * config.attention_head_dim
    if config.projector == "conv":
        return [ConvProjector(width, encoder.embed_dim) for encoder in encoders]
    if config.projector == "transformer":
        heads, tokens = config.num_attention_heads, config.token_grid**2
        return [TransformerProjector(width, encoder.embed_dim, heads, tokens) for encoder in encoders]
    return [MLPProjector(width, encoder.embed_dim, config.projector_dim) for encoder in encoders]
