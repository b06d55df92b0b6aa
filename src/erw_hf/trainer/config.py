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
"""The configuration of a training run: keys in groups, flat outside, each a YAML key and a flag.

A key is listed once, with all that others ask of it: type, default, help text, range, whether a resumed run may change it,
whether it holds paths. Docs, cards, checks and the parser read that.
"""

import argparse
import dataclasses
import difflib
import logging
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from erw_hf.files import written_whole
from erw_hf.hub.licences import check_licence
from erw_hf.names import expand_path, resolve_name
from erw_hf.sizes import size_config, size_name
from erw_hf.trainer.run_record import split_names


logger = logging.getLogger(__name__)

AT_LEAST_0, AT_LEAST_1, ABOVE_0, FINITE = "[0, inf)", "[1, inf)", "(0, inf)", "(-inf, inf)"
MODEL_KEYS = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")  # that `model` stands for
DEPTH_KEYS = ("warmup_depth", "projector_depth", "alignment_weight")  # whose values depend on the size
# Keys of earlier versions: a config.yaml of then still loads.
REMOVED = ("dry_run_mfu", "tracker_project_name", "evaluation_guidance_scale", "probe_time")
YES, NO = ("yes", "true", "on", "1"), ("no", "false", "off", "0")


def _key(
    default: Any,
    help: str,
    *,
    range: str | None = None,
    fixed: bool = False,
    path: Literal["local", "or_id", None] = None,
    source: str | None = None,
    card: bool = False,
    pushed: bool = True,
) -> Any:
    """
    A key. `range`: interval of a number. `fixed`: must not change when a run resumes, since its losses depend on it.
    `path`: a local folder, or either a folder or a Hub id; `~` and `$HOME` are expanded. `source`: the argument of
    `load_source` that it becomes. `card`: the model card shows it always, not only when it is fixed and not the default.
    `pushed`: false for what is useless to someone who repeats the run, or would make them overwrite or push.
    """
    metadata = {
        "help": help, "range": range, "fixed": fixed, "path": path, "source": source, "card": card, "pushed": pushed
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """Run"""

    output_dir: str = _key(
        "outputs/erw", "Folder of the run: checkpoints, metrics.jsonl, samples, pipeline.", path="local", pushed=False
    )
    dry_run: bool = _key(False, "Check the configuration, print what the run would cost, and stop.")
    plan: bool = _key(
        False,
        "Print a configuration that fits the card named by gpu and the time given by hours, with its cost, and stop.",
        pushed=False,
    )
    gpu: str | None = _key(
        None,
        "For plan: a card, such as rtx4090 (an unknown name lists all), or cpu, which times some steps on this machine.",
        pushed=False,
    )
    hours: float | None = _key(None, "For plan: how long the run may take.", range=ABOVE_0, pushed=False)
    overwrite_output_dir: bool = _key(False, "Delete an earlier run in output_dir.", pushed=False)
    seed: int = _key(
        0, "Seed of the initial weights and of every random draw.", range="[0, 4294967295]", fixed=True, card=True
    )


@dataclass
class DataConfig:
    """Data"""

    dataset_name: str = _key(
        "digits",
        'Hub id or local folder of a dataset; "digits" is embedded.',
        fixed=True,
        path="or_id",
        source="dataset_name",
        card=True,
    )
    dataset_config_name: str | None = _key(
        None, "Configuration of a Hub dataset.", fixed=True, source="dataset_config_name"
    )
    dataset_split: str = _key("train", "Split to train on.", fixed=True, source="split", card=True)
    streaming: bool = _key(
        False,
        "Read row by row, from the Hub or from disk, without downloading first.",
        fixed=True,
        source="streaming",
    )
    image_column: str | None = _key(None, "Column of images; detected by default.", fixed=True, source="image_column")
    label_column: str | None = _key(
        None,
        "Column of labels; detected by default. Data without labels trains unconditionally.",
        fixed=True,
        source="label_column",
    )
    random_flip: bool = _key(False, "Mirror each image with probability 1/2; ERW and REPA do not.", fixed=True)
    random_crop: bool = _key(
        False,
        "Crop a square of 0.8 to 1 times the shorter side at a random place, instead of the largest square in the centre.",
        fixed=True,
    )
    stream_retry_seconds: int = _key(
        300,
        "Seconds for which a failed read is retried before the run stops; the other ranks wait up to two hours.",
        range=AT_LEAST_0,
        source="retry_seconds",
    )
    dataloader_num_workers: int = _key(4, "Loader processes per rank.", range=AT_LEAST_0)
    vae: str | None = _key(
        None,
        "Hub id or folder of a diffusers autoencoder; without one the model trains on pixels.",
        fixed=True,
        path="or_id",
        card=True,
    )


@dataclass
class ModelConfig:
    """Model"""

    model: str | None = _key(
        "SiT-XL/2",
        "Published size: SiT-S, B, L or XL with the side of its patches, as in SiT-B/2. Stands for the four keys below, which override it.",
        card=True,
    )
    num_layers: int = _key(None, "Transformer blocks; set by model.", range=AT_LEAST_1, fixed=True, card=True)
    num_attention_heads: int = _key(None, "Attention heads; set by model.", range=AT_LEAST_1, fixed=True, card=True)
    attention_head_dim: int = _key(
        None, "Channels of each head; set by model.", range=AT_LEAST_1, fixed=True, card=True
    )
    patch_size: int = _key(
        None, "Side of the patch that becomes one token; set by model.", range=AT_LEAST_1, fixed=True, card=True
    )
    sample_size: int = _key(
        32, "Side of the latent (without a vae: of the image, in pixels).", range=AT_LEAST_1, fixed=True, card=True
    )
    in_channels: int = _key(
        4, "Channels of the latent (without a vae: 3 for RGB, 1 for grey).", range=AT_LEAST_1, fixed=True, card=True
    )
    mlp_ratio: float = _key(
        4.0, "Width of the feed-forward layers, as a multiple of the width of the model.", range=ABOVE_0, fixed=True
    )
    num_classes: int | None = _key(
        None,
        "Number of classes; taken from the dataset by default. 0 trains without labels, 1 makes the only folder of images a class.",
        range=AT_LEAST_0,
        fixed=True,
        source="num_classes",
        card=True,
    )
    class_dropout_prob: float = _key(
        0.1, "Probability of dropping a label, for classifier-free guidance.", range="[0, 1)", fixed=True, card=True
    )
    use_rope: bool = _key(
        False,
        "Rotary position embeddings in addition to the table of positions, in both phases.",
        fixed=True,
        card=True,
    )
    qk_norm: Literal["none", "layer_norm", "rms_norm"] = _key(
        "none", "Norm of queries and keys.", fixed=True, card=True
    )
    norm_type: Literal["layer_norm", "rms_norm"] = _key("layer_norm", "Norm of the blocks.", fixed=True, card=True)
    norm_eps: float = _key(1e-6, "Epsilon of the blocks' norms.", range=ABOVE_0, fixed=True)
    activation_fn: Literal["gelu-approximate", "gelu", "geglu-approximate", "swiglu"] = _key(
        "gelu-approximate",
        "Feed-forward activation, by diffusers' names: GELU by tanh, exact GELU, GELU by sigmoid (CLIP), or the gated SwiGLU.",
        fixed=True,
        card=True,
    )
    pos_embed_type: Literal["sincos", "learned"] = _key(
        "sincos", "Table of positions: the fixed sin-cos one, or one that starts from it and is trained.", fixed=True
    )
    rope_theta: float = _key(10000.0, "Base of the rotary embeddings' periods.", range=ABOVE_0, fixed=True)
    rope_scale: float = _key(
        1.0, "Factor by which positions are multiplied for the rotary embeddings.", range=ABOVE_0, fixed=True
    )
    prediction_type: Literal["velocity", "sample"] = _key(
        "velocity",
        "What the network predicts: the velocity, or the clean sample, as JiT does on pixels. The loss compares velocities either way.",
        fixed=True,
        card=True,
    )
    patch_bottleneck_dim: int | None = _key(
        None,
        "Rank of the patch embedding, for patches of many pixels (JiT: 128); none for a full matrix.",
        range=AT_LEAST_1,
        fixed=True,
    )
    noise_scale: float = _key(1.0, "Standard deviation of the noise (JiT: 2 at 512 px).", range=ABOVE_0, fixed=True)


@dataclass
class AlignmentConfig:
    """Representation alignment"""

    encoder: str | None = _key(
        None,
        "Hub id or folder of the vision encoder to align with; separate several with commas. Without an encoder, a plain SiT is trained.",
        fixed=True,
        path="or_id",
        card=True,
    )
    encoder_image_size: int | None = _key(
        None,
        "Side of the encoder's input in pixels; by default its patch size times the side of the token grid.",
        range=AT_LEAST_1,
        fixed=True,
    )
    encoder_antialias: bool = _key(
        False, "Resample the encoder's position table with antialiasing, as REPA's code does.", fixed=True
    )
    alignment_loss: Literal["cosine", "nt_xent", "structural"] = _key(
        "cosine",
        "cosine: patch-wise, as published; nt_xent: in-batch negatives, as in ERW's text; structural: as in SARA.",
        fixed=True,
        card=True,
    )
    alignment_temperature: float = _key(0.1, "Temperature of nt_xent.", range=ABOVE_0, fixed=True)
    spatial_norm: bool = _key(
        False, "Normalise the encoder's tokens over the grid, as in iREPA.", fixed=True, card=True
    )
    projector: Literal["mlp", "conv", "transformer"] = _key(
        "mlp",
        "mlp: three layers per token, as in REPA; conv: 3x3, as in iREPA; transformer: two blocks, as in PixelREPA.",
        fixed=True,
        card=True,
    )
    alignment_mask_ratio: float = _key(
        0.0,
        "Share of the tokens that are hidden from the projector, drawn anew for each sample; 0.2 in PixelREPA. A transformer "
        "projector predicts the hidden tokens too; with other projectors they are omitted from the loss.",
        range="[0, 1)",
        fixed=True,
        card=True,
    )
    projector_dim: int = _key(2048, "Width of the mlp projector's hidden layers.", range=AT_LEAST_1, fixed=True)
    projector_depth: int = _key(
        8, "Block (from 1) whose output is aligned in full training.", range=AT_LEAST_1, fixed=True
    )
    alignment_schedule: Literal["constant", "half_life", "stop"] = _key(
        "constant", "Schedule of lambda in full training."
    )
    alignment_weight: float = _key(0.5, "lambda at the first step of full training.", range=AT_LEAST_0)
    alignment_half_life: int | None = _key(
        None, 'Full steps in which lambda halves; for the schedule "half_life".', range=AT_LEAST_1
    )
    alignment_stop_step: int | None = _key(
        None, 'First step of full training without alignment; for the schedule "stop".', range=AT_LEAST_0
    )


@dataclass
class StartConfig:
    """Warmup, and other weights to start from"""

    start_from_encoder: int = _key(
        0,
        "Number of blocks that start as the first encoder's (a ViT of the model's width); 0 for none. Sets activation_fn, "
        "norm_eps and the keys of positions. On pixels, with patches of the encoder's size, the patch embedding starts as the "
        "encoder's too; otherwise the warmup trains a new one to give the encoder's tokens after these blocks.",
        range=AT_LEAST_0,
        fixed=True,
        card=True,
    )
    warmup_steps: int = _key(
        0, "Steps of the representation warmup; 0 for none.", range=AT_LEAST_0, fixed=True, card=True
    )
    warmup_depth: int = _key(
        5, "Number of blocks, from the first, that the warmup trains.", range=AT_LEAST_1, fixed=True
    )
    warmup_noised: bool = _key(False, "Warm up on noised latents instead of clean ones at t = 0.", fixed=True)
    warmup_trains_blocks: bool = _key(
        True, "Train the blocks of start_from_encoder in the warmup too; false keeps them frozen there.", fixed=True
    )
    warmup_from: str | None = _key(
        None, "Start full training from the `warmup` folder (or Hub repo) of an earlier run.", path="or_id"
    )
    init_from: str | None = _key(
        None,
        "Fine-tune a whole model: a run's pipeline (folder or Hub repo), a published .pt or .safetensors file, or SiT in "
        "diffusers' layout; data, classes and sample_size may differ.",
        path="or_id",
    )
    lora_rank: int = _key(
        0,
        "Instead of all weights train a LoRA adapter of this rank on init_from's model, and the embeddings of new classes; 0 for "
        "none. The run's `lora` folder is the adapter, `pipeline` the model with the adapter merged.",
        range=AT_LEAST_0,
        fixed=True,
    )
    lora_alpha: int | None = _key(
        None,
        "The adapter is scaled by lora_alpha / lora_rank; lora_rank by default, a scale of 1.",
        range=AT_LEAST_1,
        fixed=True,
    )
    lora_targets: str = _key(
        "to_q,to_k,to_v,to_out.0", "Linear layers that the adapter changes, named by how their names end.", fixed=True
    )
    hand_over_projector: bool = _key(
        True, "Hand the warmup's projector over to full training; false starts it afresh.", fixed=True
    )


@dataclass
class ObjectiveConfig:
    """Objective"""

    path_type: Literal["linear", "cosine"] = _key(
        "linear", "Path from data to noise: linear, x_t = (1 - t) x + t e, or cosine.", fixed=True, card=True
    )
    timestep_distribution: Literal["uniform", "logit_normal"] = _key(
        "uniform", "Distribution of t.", fixed=True, card=True
    )
    timestep_logit_mean: float = _key(0.0, "Mean of logit(t); for logit_normal.", range=FINITE, fixed=True)
    timestep_logit_std: float = _key(
        1.0, "Standard deviation of logit(t); for logit_normal.", range=ABOVE_0, fixed=True
    )
    timestep_shift: float | Literal["auto"] = _key(
        1.0,
        "Shift of t towards the noise; 1 for none; auto: sqrt(numbers in a latent / 4096), as in RAE.",
        range=ABOVE_0,
        fixed=True,
    )
    contrastive_weight: float = _key(
        0.0,
        "Weight of contrastive flow matching, which pushes the velocities of different samples apart; 0.05 as published, "
        "0 for none.",
        range="[0, 1)",
        fixed=True,
        card=True,
    )
    class_token_weight: float = _key(
        0.0,
        "Weight of drawing the first encoder's class token together with the image, as in REG; 0.03 as published, 0 for none.",
        range=AT_LEAST_0,
        fixed=True,
        card=True,
    )


@dataclass
class OptimisationConfig:
    """Optimisation"""

    train_batch_size: int = _key(32, "Samples per rank and forward pass.", range=AT_LEAST_1, card=True)
    gradient_accumulation_steps: int = _key(1, "Forward passes per step.", range=AT_LEAST_1, card=True)
    max_train_steps: int = _key(400_000, "Steps of both phases together.", range=AT_LEAST_1, card=True)
    learning_rate: float = _key(
        1e-4, "Peak learning rate of full training; 0 trains nothing.", range=AT_LEAST_0, card=True
    )
    warmup_learning_rate: float | None = _key(
        None, "Peak learning rate of the warmup; learning_rate by default.", range=AT_LEAST_0
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = _key(
        "constant", "Course of the learning rate after lr_warmup_steps, in each phase.", card=True
    )
    lr_warmup_steps: int = _key(
        0, "Steps over which the learning rate rises, at the start of each phase.", range=AT_LEAST_0, card=True
    )
    optimizer: Literal["adamw", "muon"] = _key(
        "adamw",
        "adamw for all weights; muon for the matrices of the blocks and AdamW for the others.",
        fixed=True,
        card=True,
    )
    adam_beta1: float = _key(0.9, "AdamW beta 1.", range="[0, 1)", fixed=True, card=True)
    adam_beta2: float = _key(0.999, "AdamW beta 2.", range="[0, 1)", fixed=True, card=True)
    adam_epsilon: float = _key(1e-8, "AdamW epsilon.", range=ABOVE_0, fixed=True)
    adam_weight_decay: float = _key(0.0, "AdamW weight decay.", range=AT_LEAST_0, fixed=True, card=True)
    max_grad_norm: float = _key(
        1.0, "Norm to which gradients are clipped; a large one such as 1e9 clips none.", range=ABOVE_0, card=True
    )
    ema_decay: float = _key(
        0.9999, "Decay of the exponential moving average of the weights, in full training.", range="[0, 1)", card=True
    )
    ema_ramp: bool = _key(
        True,
        "Let the decay rise to ema_decay as (1 + n) / (10 + n), so that a short run forgets its initial weights; false "
        "keeps it constant from the first step, as published.",
    )
    ema_sigma_rel: float | None = _key(
        None,
        "Instead of ema_decay: relative width of a power-function average (EDM2), 0.05 to 0.15.",
        range="(0, 0.2886)",
        fixed=True,
        card=True,
    )
    ema_snapshot_steps: int = _key(
        0,
        "Steps between stored power-function averages, from which any width can be computed later; 0 for none.",
        range=AT_LEAST_0,
        fixed=True,
    )
    gradient_checkpointing: bool = _key(
        False, "Recompute blocks in the backward pass: less memory, a third more FLOPs."
    )
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = _key(
        "auto",
        "auto: what accelerate launch says, otherwise bf16 where it is fast (CUDA since Ampere, CPUs with AMX or "
        "AVX-512 BF16), fp16 on older GPUs, and float32 elsewhere.",
    )
    torch_compile: Literal["auto", "yes", "no"] = _key(
        "auto",
        "Compile blocks and encoders; auto: on CUDA. The first step of each phase then takes up to a minute.",
    )
    activation_memory_budget: float = _key(
        1.0,
        "Share of their activations that compiled blocks keep for the backward pass; the rest is recomputed. 0.7 takes "
        "a third less memory for a few percent of time; 1 keeps all.",
        range="(0, 1]",
    )
    gradient_reduction: Literal["float32", "bf16"] = _key(
        "float32",
        "Precision in which DDP sums gradients over ranks; bf16 halves the traffic, which helps GPUs without NVLink, but rounds each gradient.",
    )
    max_nonfinite_steps: int = _key(
        10, "Stop after this many steps in a row with a non-finite gradient.", range=AT_LEAST_1
    )


@dataclass
class CheckpointsConfig:
    """Checkpoints"""

    checkpointing_steps: int = _key(5_000, "Steps between checkpoints.", range=AT_LEAST_1)
    checkpoints_total_limit: int | None = _key(
        3, "Number of newest checkpoints to keep; none keeps all.", range=AT_LEAST_1
    )
    resume_from_checkpoint: str | None = _key(
        None, 'A checkpoint folder, its name in output_dir, or "latest".', path="local", pushed=False
    )


@dataclass
class MonitoringConfig:
    """Logging, pictures and quality during training"""

    report_to: str = _key("tensorboard", "Trackers of accelerate: tensorboard, trackio, wandb, all, or none.")
    validation_steps: int = _key(5_000, "Steps between sample grids in full training; 0 for none.", range=AT_LEAST_0)
    num_validation_images: int = _key(16, "Images per sample grid.", range=AT_LEAST_1)
    num_inference_steps: int = _key(50, "Sampling steps for a sample grid.", range=AT_LEAST_1)
    guidance_scale: float = _key(1.8, "Guidance scale for a sample grid.", range=AT_LEAST_0)
    evaluation_steps: int = _key(
        0, "Steps between measurements of FID in full training; 0 for none.", range=AT_LEAST_0
    )
    evaluation_samples: int = _key(1000, "Images drawn per measurement, without guidance.", range="[2, inf)")
    evaluation_reference: str | None = _key(
        None, "What FID compares with: an npz of statistics, or a dataset.", path="or_id"
    )
    patience: int | None = _key(
        None,
        "Stop after this many measurements in a row without a lower FID; `best` holds the pipeline (with LoRA: the adapter) of the lowest.",
        range=AT_LEAST_1,
    )
    evaluation_extractor: str = _key(
        "inception", "Network behind FID: inception, or the folder of a classifier.", path="or_id"
    )
    probe_steps: int = _key(
        0, "Steps between probes of every block (CKNNA and linear probe); 0 for none.", range=AT_LEAST_0
    )
    probe_dataset: str | None = _key(None, "Dataset to probe with; the training dataset by default.", path="or_id")
    probe_split: str = _key("validation", "Held-out split of the dataset to probe with.")
    probe_samples: int = _key(
        1000, "Held-out images per probe, and as many training images to fit it on.", range=AT_LEAST_1
    )


@dataclass
class HubConfig:
    """Hub"""

    push_to_hub: bool = _key(False, "Push to the Hub while training. A failed push never ends a run.", pushed=False)
    hub_model_id: str | None = _key(None, "Hub repo; the name of output_dir by default.", pushed=False)
    hub_private: bool = _key(False, "Make the repo private.", pushed=False)
    hub_strategy: Literal["end", "every_save", "checkpoint"] = _key(
        "end",
        "end: the finished run; every_save: also the EMA's pipeline with each checkpoint; checkpoint: also the checkpoint, "
        "as last-checkpoint, to resume from.",
        pushed=False,
    )
    hub_license: str = _key("apache-2.0", "Licence of the weights, as the Hub's identifier.")


# In reverse order, because dataclasses collect the fields of their bases from the last to the first.
@dataclass
class TrainingConfig(
    HubConfig,
    MonitoringConfig,
    CheckpointsConfig,
    OptimisationConfig,
    ObjectiveConfig,
    StartConfig,
    AlignmentConfig,
    ModelConfig,
    DataConfig,
    RunConfig,
):
    """Every key of a run. A YAML file sets them, flags override it, and the resolved set is saved with the run.

    A function that needs one group declares its type, for example [`ModelConfig`], and takes the whole configuration.
    """

    def __post_init__(self) -> None:
        if self.model is not None:
            for name, value in size_config(self.model).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        if missing := [name for name in MODEL_KEYS if getattr(self, name) is None]:
            raise ValueError(f"set model, such as SiT-B/2, or {', '.join(missing)}")
        for key in fields(self):
            _check_value(key.name, getattr(self, key.name))
        self.model = size_name(*(getattr(self, name) for name in MODEL_KEYS))
        if self.timestep_shift == "auto":
            if self.vae is None:
                raise ValueError(
                    "timestep_shift auto is for latents. Neighbouring pixels are alike, so their number says too little: set a "
                    "number, or timestep_distribution logit_normal with timestep_logit_mean 0.8 and timestep_logit_std 0.8, as in JiT"
                )
            self.timestep_shift = math.sqrt(
                self.in_channels * self.sample_size**2 / 4096
            )  # RAE (arXiv 2510.11690), §4.2
        if not 0 <= self.warmup_steps <= self.max_train_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must lie in [0, max_train_steps={self.max_train_steps}]: "
                "max_train_steps counts both phases"
            )
        full_steps = self.max_train_steps - self.warmup_steps
        for phase, steps in (("the warmup", self.warmup_steps), ("full training", full_steps)):
            if 0 < steps < self.lr_warmup_steps:
                raise ValueError(
                    f"lr_warmup_steps={self.lr_warmup_steps} must be at most the {steps} steps of {phase}: the learning "
                    "rate would not reach its peak"
                )
        if self.contrastive_weight > 0 and self.train_batch_size < 2:
            raise ValueError(
                "contrastive_weight needs a train_batch_size of at least 2: it compares samples of a batch"
            )
        if self.alignment_loss == "nt_xent" and self.train_batch_size < 2 and self.encoder is not None:
            raise ValueError(
                'alignment_loss "nt_xent" needs a train_batch_size of at least 2: it compares samples of a batch'
            )
        if self.alignment_mask_ratio > 0 and self.alignment_loss == "nt_xent" and self.projector != "transformer":
            raise ValueError(
                'alignment_mask_ratio keeps different tokens in each sample, and alignment_loss "nt_xent" compares tokens at the same '
                'place of the grid: set the ratio to 0, another loss, or projector "transformer", which predicts all tokens'
            )
        if self.class_token_weight > 0 and self.encoder is None:
            raise ValueError("class_token_weight needs an encoder, whose class token the model learns to draw")
        if self.sample_size % self.patch_size != 0:
            raise ValueError(f"sample_size={self.sample_size} is not a multiple of patch_size={self.patch_size}")
        if self.prediction_type == "sample" and self.path_type != "linear":
            raise ValueError(
                'prediction_type "sample" needs path_type "linear": on the cosine path dividing by t does not turn a '
                "clean sample into a velocity"
            )
        numbers, width = self.in_channels * self.patch_size**2, self.num_attention_heads * self.attention_head_dim
        if self.prediction_type == "velocity" and numbers > width:
            # A velocity holds noise, of full rank, which does not pass a narrower layer (RAE, arXiv 2510.11690, §4.1).
            text = (
                f"a patch holds {numbers} numbers and the model is {width} wide, too narrow for their noise: choose a wider model, "
                'a smaller patch_size, or prediction_type "sample"'
            )
            if self.vae is not None:
                raise ValueError(text)
            logger.warning(text)
        if self.vae is None and self.in_channels not in (1, 3):
            raise ValueError(f"without a vae, in_channels is 1 (grey) or 3 (RGB), got {self.in_channels}; or set vae")
        if self.activation_memory_budget < 1 and self.torch_compile == "no":
            raise ValueError(
                "activation_memory_budget needs compiled blocks: leave torch_compile at auto, or set the budget to 1"
            )
        if self.encoder is not None and not split_names(self.encoder):
            raise ValueError(f"encoder={self.encoder!r} names no model: omit it, or set it to none")
        if self.encoder is None and self.warmup_steps > 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} needs an encoder to align with")
        if self.start_from_encoder > 0:
            if not split_names(self.encoder or ""):
                raise ValueError("start_from_encoder needs an encoder, whose blocks the model starts from")
            if self.start_from_encoder > self.num_layers:
                raise ValueError(
                    f"start_from_encoder={self.start_from_encoder} must lie in [0, num_layers={self.num_layers}]"
                )
            if 0 < self.warmup_steps and self.warmup_depth < self.start_from_encoder:
                raise ValueError(
                    f"start_from_encoder={self.start_from_encoder} blocks do not fit in warmup_depth={self.warmup_depth}: "
                    f"set warmup_depth to at least {self.start_from_encoder}"
                )
            if self.init_from is not None:
                raise ValueError("init_from starts from a whole model: omit start_from_encoder")
        if not self.warmup_trains_blocks and (self.start_from_encoder == 0 or self.warmup_steps == 0):
            raise ValueError("warmup_trains_blocks: false needs a warmup of start_from_encoder's blocks")
        if self.warmup_from is not None and self.warmup_steps > 0:
            raise ValueError("warmup_from starts full training from an earlier warmup: set warmup_steps to 0")
        if self.init_from is not None and (self.warmup_steps > 0 or self.warmup_from is not None):
            raise ValueError("init_from starts from a whole model: set warmup_steps to 0 and omit warmup_from")
        if self.lora_rank > 0:
            if self.init_from is None:
                raise ValueError("lora_rank needs init_from, the model that the adapter is for")
            if self.encoders:
                raise ValueError("lora_rank trains no projector: omit encoder, or set alignment_weight to 0")
            if self.adam_weight_decay > 0:
                raise ValueError("lora_rank keeps the embeddings of known classes: set adam_weight_decay to 0")
            if self.ema_snapshot_steps:
                raise ValueError("ema_snapshot_steps stores averages of whole models: set it to 0 with lora_rank")
        elif self.lora_alpha is not None or self.lora_targets != KEYS["lora_targets"].default:
            raise ValueError("lora_alpha and lora_targets are for an adapter: set lora_rank, too")
        if self.alignment_mask_ratio > 0 and self.encoder is None:
            raise ValueError("alignment_mask_ratio hides tokens from a projector: set encoder, too")
        if self.alignment_mask_ratio > 0 and self.alignment_mask_ratio * self.token_grid**2 <= 0.5:
            raise ValueError(
                f"alignment_mask_ratio={self.alignment_mask_ratio} hides none of {self.token_grid**2} tokens: raise it, or set it to 0"
            )
        if self.spatial_norm and self.token_grid == 1:
            raise ValueError("spatial_norm normalises over the grid of tokens, and here is one token: set it to false")
        if self.encoder is not None and self.projector_depth > self.num_layers:
            raise ValueError(f"projector_depth={self.projector_depth} must lie in [1, num_layers={self.num_layers}]")
        if self.warmup_steps > 0 and self.warmup_depth > self.num_layers:
            raise ValueError(f"warmup_depth={self.warmup_depth} must lie in [1, num_layers={self.num_layers}]")
        if self.evaluation_steps > 0 and self.evaluation_reference is None:
            raise ValueError("evaluation_steps needs evaluation_reference, an npz of statistics or a dataset")
        if not self.plan and (self.gpu is not None or self.hours is not None):
            raise ValueError("gpu and hours are for a plan: add --plan, which prints a configuration")
        if self.patience is not None and self.evaluation_steps == 0:
            raise ValueError(
                "patience counts measurements of FID: set evaluation_steps, and evaluation_reference to held-out images"
            )
        if self.alignment_schedule == "half_life" and self.alignment_half_life is None:
            raise ValueError('alignment_schedule "half_life" needs alignment_half_life')
        if self.alignment_schedule == "stop" and self.alignment_stop_step is None:
            raise ValueError('alignment_schedule "stop" needs alignment_stop_step')

    def unused(self) -> list[str]:
        """Sentences on keys that are set and do nothing, since another would have to be set too."""
        needed = {
            "alignment_stop_step": ("alignment_schedule", self.alignment_schedule == "stop", "stop"),
            "alignment_half_life": ("alignment_schedule", self.alignment_schedule == "half_life", "half_life"),
            "alignment_temperature": ("alignment_loss", self.alignment_loss == "nt_xent", "nt_xent"),
            "timestep_logit_mean": (
                "timestep_distribution",
                self.timestep_distribution == "logit_normal",
                "logit_normal",
            ),
            "timestep_logit_std": (
                "timestep_distribution",
                self.timestep_distribution == "logit_normal",
                "logit_normal",
            ),
        }
        return [
            f"{key} does nothing: {other} is {getattr(self, other)}, it would need {value}"
            for key, (other, used, value) in needed.items()
            if not used and getattr(self, key) != KEYS[key].default
        ]

    @property
    def encoders(self) -> list[str]:
        """The encoders that any step of the run looks at."""
        if self.warmup_steps == 0 and self.alignment_weight == 0 and self.class_token_weight == 0:
            return []
        if self.encoder is None:
            return []
        return split_names(self.encoder)

    def step_batch_size(self, processes: int) -> int:
        """Images of a step of so many ranks."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def compiles(self, device_type: str) -> bool:
        """Whether the blocks are compiled on a device such as `"cuda"`."""
        return self.torch_compile == "yes" or (self.torch_compile == "auto" and device_type == "cuda")

    @property
    def token_grid(self) -> int:
        """Side of the transformer's token grid."""
        return self.sample_size // self.patch_size

    def model_config(self, num_classes: int, class_token_dim: int | None = None) -> dict[str, Any]:
        """Arguments of the [`ERWTransformer2DModel`]; `class_token_dim` for a run that draws the encoder's class
        token."""
        config = {key.name: getattr(self, key.name) for key in fields(ModelConfig) if key.name != "model"}
        config |= {"num_classes": num_classes, "class_token_dim": class_token_dim}
        config["qk_norm"] = None if self.qk_norm == "none" else self.qk_norm
        return config

    def source_arguments(self) -> dict[str, Any]:
        """Arguments of [`~data.source.load_source`]."""
        arguments = {key.metadata["source"]: getattr(self, key.name) for key in fields(self) if key.metadata["source"]}
        return arguments | {"needs_images": bool(self.encoders)}

    def check_names(self) -> None:
        """Raises FileNotFoundError for a model or data that can only be a local path, and does not exist."""
        for name in PATH_OR_ID:
            if name in ("warmup_from", "init_from") and self.resume_from_checkpoint is not None:
                continue  # a checkpoint holds what came from there
            for part in _names(name, getattr(self, name)):
                resolve_name(part, name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the resolved configuration as YAML that `--config` accepts, without what only this start was to do."""
        values = dataclasses.asdict(self) | {"overwrite_output_dir": False, "resume_from_checkpoint": None}
        for name, value in values.items():
            values[name] = absolute(name, value)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def check_resumable(self, path: str | os.PathLike[str]) -> None:
        """Raises ValueError if this differs from the `config.yaml` of the run so far in what must not change when a
        run resumes. `ema_ramp` keeps its old value: false for a run older than the key."""
        before = read_config_file(Path(path))
        for key in fields(self):
            base_of_adapter = key.name == "init_from" and self.lora_rank > 0
            fixed = key.metadata["fixed"] or base_of_adapter
            if not fixed or (key.name not in before and key.name in MODEL_KEYS):
                continue
            # A key that the run is older than: its default does what was done before there was one.
            was, now = before.get(key.name, key.default), getattr(self, key.name)
            same = was == now
            if not same and key.metadata["path"]:
                # The configuration of a run from the Hub holds the bare folder names of local models and data.
                names = [[Path(part).name for part in _names(key.name, value)] for value in (was, now)]
                same = names[0] == names[1]
            if key.name == "dataset_name" and os.path.isdir(str(now)):
                same = True  # perhaps a copy: check_same_data compares what it holds
            if not same:
                raise ValueError(
                    f"{key.name} is {now!r}, the run so far had {was!r}: this cannot change when a run resumes; "
                    "start a new run in another --output_dir"
                )
        was, now = before.get("train_batch_size", KEYS["train_batch_size"].default), self.train_batch_size
        of_batch = [*["alignment_loss nt_xent"] * (self.alignment_loss == "nt_xent" and bool(self.encoders))]
        of_batch += ["contrastive_weight"] * (self.contrastive_weight > 0)
        if was != now and of_batch:
            raise ValueError(
                f"train_batch_size is {now}, the run so far had {was}: {' and '.join(of_batch)} compare the images of a batch, so "
                "this cannot change when the run resumes"
            )
        was, now = before.get("alignment_weight", KEYS["alignment_weight"].default), self.alignment_weight
        if (was == 0) != (now == 0) and self.encoder is not None:
            raise ValueError(
                f"alignment_weight is {now}, the run so far had {was}: a model without alignment has no projector, so this cannot "
                "change when a run resumes; to end the alignment set alignment_schedule stop and alignment_stop_step"
            )
        ramp = before.get("ema_ramp", False)
        if ramp != self.ema_ramp:
            logger.warning(f"ema_ramp stays {str(ramp).lower()}, as in the run so far")
            self.ema_ramp = ramp


KEYS = TrainingConfig.__dataclass_fields__
TYPES = {name: hint for name, hint in get_type_hints(TrainingConfig).items() if name in KEYS}
NAMED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
OWN_KEYS = tuple(name for name, key in KEYS.items() if not key.metadata["pushed"])
PATH_OR_ID = tuple(name for name, key in KEYS.items() if key.metadata["path"] == "or_id")


def absolute(name: str, value: Any) -> Any:
    """A key's value for a file in any folder, beside which a relative path would mean another place."""
    if value is None or not KEYS[name].metadata["path"]:
        return value
    parts = value.split(",") if name == "encoder" else [value]
    return ",".join(os.path.abspath(part) if part.startswith(("./", "../")) else part for part in parts)


def _names(key: str, value: str | None) -> list[str]:
    """The folders or Hub ids that a key names; only `encoder` holds several."""
    return split_names(value or "") if key == "encoder" else [value] if value else []


def local_names(config: Mapping[str, Any]) -> list[str]:
    """The models and data in a run's configuration that lie on this machine, not on the Hub."""
    return [part for name in PATH_OR_ID for part in _names(name, config.get(name)) if Path(part).exists()]


def parse_config(arguments: list[str] | None = None) -> TrainingConfig:
    """
    Reads `--config FILE.yaml` and flags. Flags override the file; `--model` overrides any size keys in it.

    Raises:
        SystemExit: for an unknown key or an impossible value, with a message that names it.
    """
    parser = _parser()
    try:
        values, kept = _given(parser, arguments)
        config = TrainingConfig(**values)
        if kept and config.encoders and os.environ.get("RANK", "0") == "0":
            text = f"--model {config.model} keeps {', '.join(kept)}, which its file has for another size"
            logger.warning(f"{text}: the first lines of the file say what each size needs")
        if os.environ.get("RANK", "0") == "0":
            for line in config.unused():
                logger.warning(line)
        return config
    except (ValueError, OSError) as error:
        parser.error(str(error))


def given_values(arguments: list[str] | None = None) -> dict[str, Any]:
    """
    The keys that a command line and its file set, without the defaults of the others.

    Args:
        arguments (`list[str]`, *optional*): Command line without the program's name. Defaults to `sys.argv[1:]`.

    Returns:
        `dict[str, Any]`: Their values.

    Raises:
        SystemExit: for an unknown key or an impossible value, with a message that names it.
    """
    parser = _parser()
    try:
        return _given(parser, arguments)[0]
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _given(parser: argparse.ArgumentParser, arguments: list[str] | None) -> tuple[dict[str, Any], list[str]]:
    """The values, and those that a file has for another size than `--model`."""
    namespace, unknown = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    flags = vars(namespace)
    file = flags.pop("config", None)
    if unknown:
        hint = ""
        if unknown[0].endswith((".yaml", ".yml")):
            hint = f"; a configuration is given as --config {unknown[0]}"
        elif not unknown[0].startswith("-"):
            hint = "; a flag takes one value: separate several names with commas"
        raise ValueError(_unknown("argument", unknown[0], [f"--{name}" for name in TYPES]) + hint)
    kept: list[str] = []
    values = {} if file is None else read_config_file(Path(expand_path(file)))
    if "model" in flags:
        if flags["model"] != values.get("model", KEYS["model"].default) and not flags.keys() & set(DEPTH_KEYS):
            kept = [f"{name}={values[name]}" for name in DEPTH_KEYS if name in values]
        values = {name: value for name, value in values.items() if name not in MODEL_KEYS}
    return values | {name: _read_value(name, text) for name, text in flags.items()}, kept


def check_flags(parser: argparse.ArgumentParser, flags: argparse.Namespace, **ranges: str) -> None:
    """Ends another script for a flag out of its range: the key's of that name, or one in `ranges`, such as `rows="[1,
    inf)"`."""
    try:
        for name, value in vars(flags).items():
            if name in ranges:
                for number in value if isinstance(value, list) else [value]:
                    if not _lies_in(number, ranges[name]):
                        raise ValueError(f"{name} must {_in_words(ranges[name], number)}, got {number!r}")
            elif name in KEYS and KEYS[name].metadata["range"] is not None:  # a model's name here may be a size there
                _check_value(name, value)
    except ValueError as error:
        parser.error(f"--{error}")


def read_config_file(path: Path) -> dict[str, Any]:
    """
    The keys that a flat YAML file sets. A value is read by the type of its key, like a flag, whatever YAML makes of
    it: `1e-4` is a number, `no` a choice of `mixed_precision`, `123` a name. A path with a leading dot is relative to
    the file.

    Raises:
        ValueError: for another kind of file, an unknown or repeated key, or an impossible value, with its line.
        OSError: if it cannot be read.
    """
    try:
        node = yaml.compose(path.read_bytes().decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise OSError(f"cannot read the config: {error}") from error
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "malformed"
        if "\\t" in problem:
            problem = "a tab where YAML allows only spaces"
        raise ValueError(f"{where}: not YAML: {problem}; a line is `key: value`") from error
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path} holds a list or a single value; a line is `key: value`")
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = str(key.value)
        try:
            if name in REMOVED:
                logger.warning(f"{path}, line {line}: the key {name} was removed, and is ignored")
                continue
            if name not in TYPES:
                nested = ": keys are flat, without sections" if isinstance(value, yaml.MappingNode) else ""
                raise ValueError(_unknown("key", name, list(TYPES)) + nested)
            if name in lines:
                raise ValueError(f"{name} is set twice, first on line {lines[name]}")
            lines[name] = line
            if not isinstance(value, yaml.ScalarNode):
                raise ValueError(
                    f"{name} takes one value, not a list or a section; separate several names with commas"
                )
            empty = value.tag == "tag:yaml.org,2002:null"
            values[name] = _read_value(name, "" if empty else value.value, path.parent, quoted=value.style is not None)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        usage="accelerate launch training/train_erw.py [--config FILE.yaml] [--any_key value ...]",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", help="YAML file with any of the keys below; flags override it.")
    for group in reversed(TrainingConfig.__bases__):
        section = parser.add_argument_group(group.__doc__)
        for key in fields(group):
            choices = [str(value) for value in get_args(TYPES[key.name])] if _is_choice(key.name) else []
            text = f"{key.metadata['help']} (default: {'none' if key.default is None else key.default})"
            kinds = "|".join((_kind(key.name).__name__, *_words(key.name)))
            metavar = f"{{{','.join(choices)}}}" if choices else kinds
            options: dict[str, Any] = {"nargs": "?", "const": "true"} if _kind(key.name) is bool else {}
            section.add_argument(f"--{key.name}", help=text, metavar=metavar, **options)
            if key.default is True:
                section.add_argument(
                    f"--no_{key.name}", dest=key.name, action="store_const", const="false", help=argparse.SUPPRESS
                )
    return parser


def _words(name: str) -> tuple[str, ...]:
    """The words that a number may be in place of one."""
    return tuple(word for kind in get_args(TYPES[name]) if get_origin(kind) is Literal for word in get_args(kind))


def _is_choice(name: str) -> bool:
    return get_origin(TYPES[name]) is Literal


def _kind(name: str) -> type:
    return str if _is_choice(name) else next((t for t in get_args(TYPES[name]) if t is not type(None)), TYPES[name])


def _read_value(name: str, text: str, folder: Path | None = None, quoted: bool = False) -> Any:
    """Parses and checks the text of a key; `folder` is where a path with a leading dot starts."""
    kind, word = _kind(name), text.strip().lower()
    value: Any = text
    if type(None) in get_args(TYPES[name]) and word in ("none", "null", "~", ""):
        return None
    if word in _words(name):
        return word
    if word == "":
        raise ValueError(f"{name} has no value: omit it to get its default")
    if _is_choice(name):
        if text not in get_args(TYPES[name]):  # YAML's words for a boolean
            value = "yes" if word in YES else "no" if word in NO else text
    elif kind is bool:
        value = True if word in YES else False if word in NO else text
    elif kind is str:
        if not quoted and word in (*YES[:3], *NO[:3]):
            none = " (write none to unset it)" if type(None) in get_args(TYPES[name]) else ""
            raise ValueError(f"{name} takes a name, got {text}{none}. {KEYS[name].metadata['help']}")
        if KEYS[name].metadata["path"] is not None:
            value = ",".join(expand_path(part, folder) for part in text.split(",")) if text else text
    else:
        try:
            value = kind(text)
        except ValueError:
            hint = "; write decimals with a point" if kind is float and "," in text else ""
            raise ValueError(f"{name} must be {NAMED[kind]}, got {text!r}{hint}") from None
    _check_value(name, value)
    return value


def _check_value(name: str, value: Any) -> None:
    """Type and range of one key, from a YAML file, a flag or Python code."""
    kind: Any = _kind(name)
    metadata = KEYS[name].metadata
    if (value is None and type(None) in get_args(TYPES[name])) or value in _words(name):
        return
    if _is_choice(name):
        allowed = get_args(TYPES[name])
        if value not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
        return
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{name} must be {NAMED[kind]}, got {value!r}")
    if name == "model":
        size_config(value)
    if name == "hub_license":
        check_licence(value)
    if metadata["range"] is not None and not _lies_in(value, metadata["range"]):
        raise ValueError(
            f"{name} must {_in_words(metadata['range'], value)}, got {value!r} ({metadata['help'].rstrip('.')})"
        )


def _lies_in(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)  # always false for NaN


def _in_words(interval: str, value: float) -> str:
    low, high = interval[1:-1].split(", ")
    if high != "inf" or not math.isfinite(value):
        return f"lie in {interval}"
    return f"be {'at least' if interval[0] == '[' else 'greater than'} {low}"


def _unknown(kind: str, key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"unknown {kind} {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")
