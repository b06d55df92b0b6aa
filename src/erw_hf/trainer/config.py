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
"""The configuration of a training run: one flat set of keys, each a YAML key and a flag."""

import argparse
import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers import HfArgumentParser

from erw_hf.files import written_whole
from erw_hf.trainer.ema import SNAPSHOT_SIGMA_RELS, EMAProfile, power_of
from erw_hf.trainer.run_record import PATH_OR_ID, split_names


def _key(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


T = TypeVar("T")
Fixed = Annotated[T, "must stay as it was when a run goes on: the loss of every step hangs on it"]


@dataclass
class TrainingConfig:
    """Every key of a run. A YAML file sets them, flags override it, and the resolved set is saved with the run."""

    output_dir: str = _key("outputs/erw", "Folder of the run: checkpoints, metrics.jsonl, samples, pipeline.")
    dry_run: bool = _key(False, "Check the configuration, print what the run costs, and stop.")
    dry_run_mfu: float = _key(0.4, "Share of the GPU's peak that the dry run's hours assume.")
    overwrite_output_dir: bool = _key(False, "Delete an earlier run in output_dir.")
    seed: Fixed[int] = _key(0, "Seed of the initial weights and of every random draw.")

    # Data
    dataset_name: Fixed[str] = _key("digits", 'Hub id or local folder of a data set; "digits" is embedded.')
    dataset_config_name: Fixed[str | None] = _key(None, "Configuration of a Hub data set.")
    dataset_split: Fixed[str] = _key("train", "Split to train on.")
    streaming: Fixed[bool] = _key(
        False, "Read the data as it comes, from the Hub or from disk, without downloading it first."
    )
    image_column: Fixed[str | None] = _key(None, "Column of images; detected by default.")
    label_column: Fixed[str | None] = _key(
        None, "Column of labels; detected by default. Data without labels trains unconditionally."
    )
    random_flip: Fixed[bool] = _key(False, "Mirror half of the images. ERW and REPA do not.")
    stream_retry_seconds: int = _key(
        300, "How long a stream that gives no data is tried again; below the 10 minutes after which NCCL gives up."
    )
    dataloader_num_workers: int = _key(4, "Loader processes for each training process.")

    # Latents
    vae: Fixed[str | None] = _key(None, "Hub id or folder of a diffusers autoencoder; none trains on pixels.")
    sample_size: Fixed[int] = _key(32, "Side of the latent (without a vae: of the image, in pixels).")
    in_channels: Fixed[int] = _key(4, "Channels of the latent (without a vae: 3 for RGB, 1 for grey).")

    # Transformer
    patch_size: Fixed[int] = _key(2, "Side of the patch that becomes one token.")
    num_layers: Fixed[int] = _key(28, "Transformer blocks.")
    num_attention_heads: Fixed[int] = _key(16, "Attention heads.")
    attention_head_dim: Fixed[int] = _key(72, "Channels of each head.")
    mlp_ratio: Fixed[float] = _key(4.0, "Width of the feed-forward over the width of the model.")
    num_classes: Fixed[int | None] = _key(None, "Number of classes; taken from the data set by default.")
    class_dropout_prob: Fixed[float] = _key(0.1, "Probability of dropping a label, for classifier-free guidance.")
    use_rope: Fixed[bool] = _key(False, "Rotary position embeddings beside the sin-cos ones, in both phases.")
    qk_norm: Fixed[Literal["none", "layer_norm", "rms_norm"]] = _key("none", "Norm of queries and keys.")
    norm_type: Fixed[Literal["layer_norm", "rms_norm"]] = _key("layer_norm", "Norm of the blocks.")
    activation_fn: Fixed[Literal["gelu-approximate", "swiglu"]] = _key("gelu-approximate", "Feed-forward activation.")

    # Representation alignment
    encoder: Fixed[str | None] = _key(
        None, "Hub id or folder of the vision encoder to align with, or several with commas; none trains a plain SiT."
    )
    encoder_image_size: Fixed[int | None] = _key(
        None, "Side of the encoder's input; token grid x its patch size by default."
    )
    encoder_antialias: Fixed[bool] = _key(
        False, "Resample the encoder's position table with antialias, as REPA's code."
    )
    alignment_loss: Fixed[Literal["cosine", "nt_xent", "structural"]] = _key(
        "cosine", "cosine: patch-wise, as published; nt_xent: in-batch negatives, as ERW's text; structural: as SARA."
    )
    alignment_temperature: Fixed[float] = _key(0.1, "Temperature of nt_xent.")
    spatial_norm: Fixed[bool] = _key(False, "Normalise the encoder's tokens over the grid, as iREPA.")
    projector: Fixed[Literal["mlp", "conv"]] = _key(
        "mlp", "mlp: three layers on each token, as REPA; conv: 3x3, as iREPA."
    )
    projector_dim: Fixed[int] = _key(2048, "Width of the mlp projector's hidden layers.")
    warmup_steps: Fixed[int] = _key(0, "Steps of phase 1, the representation warmup; 0 goes without.")
    warmup_depth: Fixed[int] = _key(5, "Blocks that are warmed up.")
    warmup_noised: Fixed[bool] = _key(False, "Warm up on noised latents in place of clean ones at t = 0.")
    warmup_from: str | None = _key(None, "Start phase 2 from the `warmup` folder (or Hub repo) of an earlier run.")
    init_from: str | None = _key(
        None,
        "Fine-tune the pipeline of an earlier run (folder or Hub repo); data, classes and sample_size may be others.",
    )
    hand_over_projector: Fixed[bool] = _key(True, "Hand the warmup's projector over to phase 2.")
    projector_depth: Fixed[int] = _key(8, "Block whose output is aligned in phase 2.")
    alignment_schedule: Literal["constant", "half_life", "stop"] = _key("constant", "Schedule of lambda in phase 2.")
    alignment_weight: float = _key(0.5, "lambda at the first step of phase 2.")
    alignment_half_life: int | None = _key(None, 'Steps in which lambda halves; schedule "half_life".')
    alignment_stop_step: int | None = _key(None, 'First step of phase 2 without alignment; schedule "stop".')

    # Objective
    path_type: Fixed[Literal["linear", "cosine"]] = _key("linear", "Interpolation path.")
    timestep_distribution: Fixed[Literal["uniform", "logit_normal"]] = _key("uniform", "Distribution of t.")
    timestep_logit_mean: Fixed[float] = _key(0.0, "Mean of logit(t); logit_normal.")
    timestep_logit_std: Fixed[float] = _key(1.0, "Standard deviation of logit(t); logit_normal.")
    timestep_shift: Fixed[float] = _key(1.0, "Shift of t towards the noise; 1 for none.")

    contrastive_weight: Fixed[float] = _key(
        0.0, "Weight of contrastive flow matching, which parts samples of a batch; 0.05 as published, 0 for none."
    )

    class_token_weight: Fixed[float] = _key(
        0.0,
        "Weight of drawing the first encoder's class token beside the image, as REG; 0.03 as published, 0 for a model "
        "without one.",
    )

    # Optimisation
    train_batch_size: int = _key(32, "Samples of one process in one forward.")
    gradient_accumulation_steps: int = _key(1, "Forwards of one process in one step.")
    max_train_steps: int = _key(400_000, "Steps of both phases together.")
    learning_rate: float = _key(1e-4, "Peak learning rate of phase 2.")
    warmup_learning_rate: float | None = _key(None, "Peak learning rate of phase 1; learning_rate by default.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = _key(
        "constant", "Learning rate after lr_warmup_steps, in each phase."
    )
    lr_warmup_steps: int = _key(0, "Steps in which the learning rate rises, at the start of each phase.")
    optimizer: Fixed[Literal["adamw", "muon"]] = _key(
        "adamw", "muon: for the matrices of the blocks; AdamW for the others."
    )
    adam_beta1: float = _key(0.9, "AdamW beta 1.")
    adam_beta2: float = _key(0.999, "AdamW beta 2.")
    adam_epsilon: float = _key(1e-8, "AdamW epsilon.")
    adam_weight_decay: float = _key(0.0, "AdamW weight decay.")
    max_grad_norm: float = _key(1.0, "Gradient clipping.")
    ema_decay: float = _key(0.9999, "Decay of the exponential moving average of the weights, in phase 2.")
    ema_sigma_rel: Fixed[float | None] = _key(
        None, "In place of ema_decay: relative width of a power-function average (EDM2), 0.05 to 0.15."
    )
    ema_snapshot_steps: Fixed[int] = _key(
        0, "Steps between stored power-function averages, from which any width is rebuilt later; 0 for none."
    )
    gradient_checkpointing: bool = _key(
        False, "Recompute blocks in the backward pass: less memory, a third more time."
    )
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = _key(
        "auto", '"auto": bf16 where the device is fast at it (CUDA, CPUs with AMX), else float32.'
    )
    torch_compile: Literal["auto", "yes", "no"] = _key(
        "auto",
        "Compile blocks and encoders; auto: on CUDA. The first step of each phase then takes up to a minute.",
    )
    max_nonfinite_steps: int = _key(10, "Stop after this many steps in a row with a non-finite gradient.")

    # Checkpoints
    checkpointing_steps: int = _key(5_000, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = _key(3, "Checkpoints to keep.")
    resume_from_checkpoint: str | None = _key(None, 'A checkpoint folder, its name in output_dir, or "latest".')

    # Logging and pictures
    report_to: str = _key("tensorboard", "Trackers of accelerate: tensorboard, trackio, wandb, all; none for none.")
    tracker_project_name: str = _key("erw", "Name of the project in the tracker.")
    validation_steps: int = _key(5_000, "Steps between sample grids in phase 2; 0 for none.")
    num_validation_images: int = _key(16, "Images of a sample grid.")
    num_inference_steps: int = _key(50, "Sampling steps of a sample grid.")
    guidance_scale: float = _key(1.8, "Guidance of a sample grid.")

    # Quality during training, by the code of training/evaluate.py and training/probe.py
    evaluation_steps: int = _key(0, "Steps between measurements of FID in phase 2; 0 for none.")
    evaluation_samples: int = _key(1000, "Images drawn for a measurement.")
    evaluation_reference: str | None = _key(None, "What FID compares with: npz of statistics, or a data set.")
    evaluation_extractor: str = _key("inception", "Network behind FID: inception, or the folder of a classifier.")
    evaluation_guidance_scale: float = _key(1.0, "Guidance of the images drawn; published curves have none.")
    probe_steps: int = _key(0, "Steps between probes of every block, by CKNNA and linear probe; 0 for none.")
    probe_dataset: str | None = _key(None, "Data set of images to probe with; by default the one trained on.")
    probe_split: str = _key("validation", "Held-out split of the data set to probe with.")
    probe_samples: int = _key(1000, "Held-out images of a probe, and as many training images to fit it on.")
    probe_time: float = _key(0.5, "Flow time of the noised tokens, which are probed beside the clean ones.")

    # Hub
    push_to_hub: bool = _key(False, "Push to the Hub, beside the training. A failed push never ends a run.")
    hub_model_id: str | None = _key(None, "Hub repo; the name of output_dir by default.")
    hub_private: bool = _key(False, "Make the repo private.")
    hub_strategy: Literal["end", "every_save", "checkpoint"] = _key(
        "end",
        "end: once; every_save: the EMA's pipeline with each checkpoint too; checkpoint: and the checkpoint, as "
        "last-checkpoint, to resume from.",
    )
    hub_license: str = _key("apache-2.0", "Licence of the weights, as the Hub names it.")

    def __post_init__(self) -> None:
        for name, annotation in get_type_hints(TrainingConfig).items():
            value = getattr(self, name)
            allowed = get_args(annotation)
            if get_origin(annotation) is Literal and value not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
            # A YAML file can hold anything; argparse looks at flags alone.
            if (annotation is int or annotation == (int | None)) and value is not None and type(value) is not int:
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if annotation is bool and type(value) is not bool:
                raise ValueError(f"{name} must be true or false, got {value!r}")
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.max_train_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must lie in [0, max_train_steps={self.max_train_steps}]: "
                "max_train_steps counts both phases"
            )
        if self.contrastive_weight > 0 and self.train_batch_size < 2:
            raise ValueError(
                "contrastive_weight needs a train_batch_size of at least 2: it compares samples of a batch"
            )
        if self.class_token_weight > 0 and self.encoder is None:
            raise ValueError("class_token_weight needs an encoder, whose class token the model learns to draw")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), got {self.class_dropout_prob}")
        if self.ema_sigma_rel is not None:
            power_of(self.ema_sigma_rel)  # raises for an impossible width
        if self.sample_size % self.patch_size != 0:
            raise ValueError(f"sample_size={self.sample_size} is no multiple of patch_size={self.patch_size}")
        if self.vae is None and self.in_channels not in (1, 3):
            raise ValueError(f"without a vae, in_channels is 1 (grey) or 3 (RGB), got {self.in_channels}; or set vae")
        if self.encoder is None and self.warmup_steps > 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} needs an encoder to align with")
        if self.warmup_from is not None and self.warmup_steps > 0:
            raise ValueError("warmup_from starts phase 2 from an earlier warmup: set warmup_steps to 0")
        if self.init_from is not None and (self.warmup_steps > 0 or self.warmup_from is not None):
            raise ValueError("init_from starts from a whole model: set warmup_steps to 0 and leave warmup_from out")
        if self.encoder is not None and not 1 <= self.projector_depth <= self.num_layers:
            raise ValueError(f"projector_depth={self.projector_depth} must lie in [1, num_layers={self.num_layers}]")
        if self.warmup_steps > 0 and not 1 <= self.warmup_depth <= self.num_layers:
            raise ValueError(f"warmup_depth={self.warmup_depth} must lie in [1, num_layers={self.num_layers}]")
        if self.evaluation_steps > 0 and self.evaluation_reference is None:
            raise ValueError("evaluation_steps needs evaluation_reference, an npz of statistics or a data set")
        if self.evaluation_samples < 2:
            raise ValueError(f"evaluation_samples must be at least 2, got {self.evaluation_samples}")
        if self.alignment_schedule == "half_life" and not self.alignment_half_life:
            raise ValueError('alignment_schedule "half_life" needs alignment_half_life')
        if self.alignment_schedule == "stop" and self.alignment_stop_step is None:
            raise ValueError('alignment_schedule "stop" needs alignment_stop_step')

    def ema_profiles(self) -> list[EMAProfile]:
        """
        Returns:
            `list[EMAProfile]`: The averages of the weights: first the one that pictures and the pipeline are made with.
        """
        first = (
            EMAProfile(decay=self.ema_decay)
            if self.ema_sigma_rel is None
            else EMAProfile(sigma_rel=self.ema_sigma_rel)
        )
        stored = SNAPSHOT_SIGMA_RELS if self.ema_snapshot_steps else ()
        return [first, *(EMAProfile(sigma_rel=width) for width in stored)]

    @property
    def encoders(self) -> list[str]:
        """The encoders that any step of the run looks at."""
        if self.warmup_steps == 0 and self.alignment_weight == 0 and self.class_token_weight == 0:
            return []
        if self.encoder is None:
            return []
        return split_names(self.encoder)

    def step_batch_size(self, processes: int) -> int:
        """
        Args:
            processes (`int`): Number of training processes.

        Returns:
            `int`: Images of a step.
        """
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def compiles(self, device_type: str) -> bool:
        """
        Args:
            device_type (`str`): `"cuda"`, `"cpu"` ...

        Returns:
            `bool`: Whether the blocks are compiled.
        """
        return self.torch_compile == "yes" or (self.torch_compile == "auto" and device_type == "cuda")

    @property
    def token_grid(self) -> int:
        """Side of the transformer's token grid."""
        return self.sample_size // self.patch_size

    def model_config(self, num_classes: int, class_token_dim: int | None = None) -> dict[str, Any]:
        """
        Args:
            num_classes (`int`): Number of classes of the data.
            class_token_dim (`int`, *optional*): Width of the encoder's class token, for a run that draws it.

        Returns:
            `dict[str, Any]`: Arguments of the [`ERWTransformer2DModel`].
        """
        names = (
            "sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim",
            "mlp_ratio", "class_dropout_prob", "use_rope", "norm_type", "activation_fn",
        )  # fmt: skip
        config: dict[str, Any] = {name: getattr(self, name) for name in names}
        config["num_classes"] = num_classes
        config["class_token_dim"] = class_token_dim
        config["qk_norm"] = None if self.qk_norm == "none" else self.qk_norm
        return config

    def source_arguments(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: Arguments of [`~data.source.load_source`].
        """
        return {
            "dataset_name": self.dataset_name,
            "split": self.dataset_split,
            "dataset_config_name": self.dataset_config_name,
            "image_column": self.image_column,
            "label_column": self.label_column,
            "num_classes": self.num_classes,
            "streaming": self.streaming,
            "retry_seconds": self.stream_retry_seconds,
            "needs_images": bool(self.encoders),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """
        Writes the resolved configuration as YAML, which `--config` takes again.

        Args:
            path (`str` or `os.PathLike`): File to write.
        """
        values = dataclasses.asdict(self)
        for name, value in values.items():
            # Beside this file, a relative path would mean another place.
            if isinstance(value, str) and value.startswith(("./", "../")):
                values[name] = os.path.abspath(value)
        with written_whole(path) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False))

    def check_resumable(self, path: str | os.PathLike[str]) -> None:
        """
        Compares what must not change when a run goes on.

        Args:
            path (`str` or `os.PathLike`): The `config.yaml` of the run so far.

        Raises:
            ValueError: if the model, the data, the seed or the length of the warmup is another.
        """
        before = yaml.safe_load(Path(path).read_text())
        hints = get_type_hints(TrainingConfig, include_extras=True)
        now = {name: getattr(self, name) for name, hint in hints.items() if get_origin(hint) is Annotated}
        for name, value in now.items():
            # A run that comes from the Hub names models and data without the folders of the machine that it ran on.
            same = (
                name not in before
                or before[name] == value
                or (name in PATH_OR_ID and Path(str(before[name])).name == Path(str(value)).name)
            )
            if not same:
                raise ValueError(
                    f"{name} is {value!r}, the run so far had {before[name]!r}: a run goes on with what it began with; "
                    "start another one in another --output_dir"
                )


def parse_config(arguments: list[str] | None = None) -> TrainingConfig:
    """
    Reads `--config FILE.yaml` and flags; a flag wins over the file.

    Args:
        arguments (`list[str]`, *optional*): Command line without the program's name. Defaults to `sys.argv[1:]`.

    Returns:
        [`TrainingConfig`]: The configuration.

    Raises:
        SystemExit: for an unknown key or an impossible value, with a message that says which.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", help="YAML file with any of the keys below; flags win over it.")
    known, rest = config_parser.parse_known_args(arguments)

    parser = HfArgumentParser(
        TrainingConfig,
        parents=[config_parser],
        allow_abbrev=False,
        usage="accelerate launch training/train_erw.py [--config FILE.yaml] [--any_key value ...]",
    )
    types = get_type_hints(TrainingConfig)  # not the fields' own, which HfArgumentParser simplifies
    if known.config is not None:
        try:
            values = yaml.safe_load(Path(known.config).read_text()) or {}
        except OSError as error:
            parser.error(f"cannot read the config: {error}")
        for key in values:
            if key not in types:
                parser.error(f"{known.config}: {_unknown('key', key, list(types))}")
        folder = Path(known.config).parent
        parser.set_defaults(**{key: _coerce(value, types[key], folder) for key, value in values.items()})
    namespace, unknown = parser.parse_known_args(rest)
    if unknown:
        parser.error(_unknown("argument", unknown[0], [f"--{name}" for name in types]))
    values = {name: getattr(namespace, name) for name in types}
    for name, value in values.items():
        # So that a flag can take back what the file sets: `--encoder none`.
        if types[name] == (str | None) and value in ("none", "null", ""):
            values[name] = None
    try:
        config = TrainingConfig(**values)
    except ValueError as error:
        parser.error(str(error))
    return config


def _unknown(kind: str, key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"unknown {kind} {key}" + (f"; did you mean {nearest[0]}?" if nearest else "")


def _coerce(value: object, annotation: object, folder: Path) -> object:
    # YAML 1.1 reads 1e-4 as a string and 1 as an integer.
    if annotation in (float, float | None) and isinstance(value, (str, int)) and not isinstance(value, bool):
        return float(value)
    # What a file names with a leading dot lies beside the file, wherever the command runs.
    if isinstance(value, str) and value.startswith(("./", "../")):
        return os.path.normpath(folder / value)
    return value


def resolve_mixed_precision(mixed_precision: str) -> str:
    """
    Args:
        mixed_precision (`str`): `"auto"`, `"no"`, `"fp16"` or `"bf16"`.

    Returns:
        `str`: The same, with `"auto"` decided: bf16 on CUDA devices that have it and on CPUs with AMX, where it is
        several times faster; float32 elsewhere, where it would be slower.
    """
    if mixed_precision != "auto":
        return mixed_precision
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "no"
