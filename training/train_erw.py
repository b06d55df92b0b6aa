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
"""Train a representation-aligned diffusion transformer: SiT, REPA or ERW, which differ in settings only.

    accelerate launch training/train_erw.py --config training/configs/digits.yaml [--any_key value ...]

One run does everything: warmup of the early blocks (phase 1), verified hand-over, full training (phase 2), pictures and
a pipeline. It can be stopped anywhere and started again with `--resume_from_checkpoint latest`.

    train_warmup, train_full        the model of a phase, and the loss that it minimises
      train_phase                   the loop:
        train_step                    read, latents and tokens, loss, backward, clip, optimizer, EMA
        settle                        the line of metrics.jsonl, a step late, so that the host never waits for a GPU
        save, validate, measure_quality
"""

import itertools
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object, set_seed
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm.auto import tqdm

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler, RepresentationEncoder
from erw_hf.alignment import (
    alignment_weight,
    cosine_alignment_loss,
    nt_xent_alignment_loss,
    spatial_normalize,
    structural_alignment_loss,
)
from erw_hf.data.latents import moments_to_latents, pixels_to_latents
from erw_hf.data.samples import SampleMaker, StepSampler, TrainingSamples
from erw_hf.data.source import Source, load_source
from erw_hf.data.streaming import StreamingSamples, stream_loader
from erw_hf.flow import timestep_from_normal
from erw_hf.hub.cards import write_warmup_record
from erw_hf.hub.push import BackgroundPush, link_folder
from erw_hf.hub.upload import prepare_repo
from erw_hf.trainer.checkpoints import (
    Progress,
    TrainingState,
    check_checkpoint,
    load_checkpoint,
    load_data_state,
    prepare_output_dir,
    remove_later_checkpoints,
    resolve_checkpoint,
    save_checkpoint,
)
from erw_hf.trainer.config import TrainingConfig, parse_config, resolve_mixed_precision
from erw_hf.trainer.cost import cost_report
from erw_hf.trainer.device import LateValues, peak_memory, to_device
from erw_hf.trainer.ema import EMA, remove_later_snapshots, save_snapshots, whole_state_dict, whole_tensor
from erw_hf.trainer.engines import check_engine
from erw_hf.trainer.flops import count_step_flops, peak_flops
from erw_hf.trainer.initialization import find_warmup, load_initial, load_warmup, save_warmup
from erw_hf.trainer.inputs import check_cache, load_encoders, load_vae
from erw_hf.trainer.models import (
    build_full_model,
    build_warmup_model,
    choose_attention,
    class_token_dim,
    compile_blocks,
    encoders_of_step,
)
from erw_hf.trainer.optimizers import build_optimizer
from erw_hf.trainer.plots import image_grid, plot_losses
from erw_hf.trainer.quality_monitor import QualityMonitor
from erw_hf.trainer.run_record import MetricsFile, describe_environment
from erw_hf.warmup import (
    AlignmentLoss,
    TrainingBatch,
    build_warmup_transformer,
    check_hand_over,
    full_loss,
    hand_over,
    warmup_loss,
)


logger = get_logger(__name__)

Batch = dict[str, torch.Tensor]
LossFunction = Callable[[torch.nn.Module, Batch, int], dict[str, torch.Tensor]]


@dataclass
class Run:
    """What both phases share."""

    config: TrainingConfig
    accelerator: Accelerator
    source: Source
    vae: torch.nn.Module | None
    encoders: list[RepresentationEncoder]
    model_config: dict[str, object]  # of the transformer
    pixels: tuple[int, int]  # side and channels of the images
    progress: Progress
    state: TrainingState = field(default_factory=TrainingState)
    metrics: MetricsFile | None = None  # on the main process
    quality: QualityMonitor | None = None
    stream: StatefulDataLoader | None = None  # of streamed data
    stream_state: dict | None = None  # where the stream goes on
    push: BackgroundPush | None = None  # on the main process
    batch: Batch | None = None  # the last one that was read
    data_error: str | None = None  # why this process has no next one
    last_arrival: float = 0.0  # when the device was done with the last step that was written
    stop_requested: bool = False  # by SIGTERM, which schedulers send before they end a job

    @property
    def step_batch_size(self) -> int:
        return self.config.step_batch_size(self.accelerator.num_processes)


@dataclass
class LateStep:
    """A step that is done as far as the host knows; its losses are still on their way from the device."""

    record: dict[str, object]  # what the host knows
    flops: float
    started: float  # on time.perf_counter's clock
    waited: float  # seconds, for data
    loss_names: list[str]
    values: LateValues


def main() -> None:
    config = parse_config()
    if config.dry_run:
        print(cost_report(config))
        return
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger(__name__).setLevel(logging.INFO)
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=resolve_mixed_precision(config.mixed_precision),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
    )
    # Everything that can be wrong is found out before the first step, and before an earlier run is touched.
    if config.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"report_to={config.report_to!r} is not installed: pip install it, or --report_to none")
    check_engine(config, accelerator)
    checkpoint, progress = find_checkpoint(config, accelerator)
    if config.push_to_hub and accelerator.is_main_process:
        config.hub_model_id = prepare_repo(
            config.hub_model_id or Path(config.output_dir).resolve().name, config.hub_private
        )
    run = open_inputs(config, accelerator, progress)
    warmup_state, initial_state = load_start(run, checkpoint)
    stop_on_sigterm(run)
    begin_folder(run)

    # A run that stopped at the last step of its warmup ends it once more, to hand it over.
    if config.warmup_steps > 0 and progress.step <= config.warmup_steps:
        warmup_state = train_warmup(run, checkpoint)
        checkpoint = None  # phase 2 starts from the hand-over
    # One that stopped at its last step of all writes its pipeline and pictures once more.
    if progress.step < config.max_train_steps or checkpoint is not None:
        train_full(run, warmup_state, initial_state, checkpoint)
    elif run.push is not None:
        run.push.submit(progress.step, None, None)  # a warmup alone
    # The main process drew the last pictures alone. A process that leaves while gloo's threads still put away its last
    # exchange can abort in them.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if run.push is not None:
        push_at_end(run)


def find_checkpoint(config: TrainingConfig, accelerator: Accelerator) -> tuple[Path | None, Progress]:
    """The checkpoint to go on from and what its run has done; none, and nothing, for a new run."""
    checkpoint = resolve_checkpoint(config.output_dir, config.resume_from_checkpoint)
    if checkpoint is None:
        return None, Progress()
    if (checkpoint.parent / "config.yaml").exists():
        config.check_resumable(checkpoint.parent / "config.yaml")
    progress = check_checkpoint(checkpoint, config.output_dir, config.step_batch_size(accelerator.num_processes))
    if config.streaming:
        load_data_state(accelerator, checkpoint, config.dataloader_num_workers)
    return checkpoint, progress


def open_inputs(config: TrainingConfig, accelerator: Accelerator, progress: Progress) -> Run:
    """The data, the autoencoder and the encoders of a run."""
    source = load_source(**config.source_arguments())
    check_cache(config, source)
    vae, pixels = load_vae(config, accelerator.device)
    encoders = load_encoders(config, accelerator.device, accelerator.mixed_precision)
    model_config = config.model_config(source.num_classes, class_token_dim(config, encoders))
    return Run(config, accelerator, source, vae, encoders, model_config, pixels, progress)


def load_start(
    run: Run, checkpoint: Path | None
) -> tuple[dict[str, torch.Tensor] | None, dict[str, torch.Tensor] | None]:
    """The states of `--warmup_from`, which is to fit, and of `--init_from`, that phase 2 starts from."""
    config, warmup_state, initial_state = run.config, None, None
    if config.warmup_from is not None:
        warmup_state = load_warmup(config.warmup_from, run.model_config)
        with torch.device("meta"):
            model = build_full_model(config, run.source.num_classes, run.encoders)
            check_hand_over(warmup_state, model, config.hand_over_projector)
    if config.init_from is not None and checkpoint is None:
        initial_state = load_initial(config.init_from, run.model_config, run.source.id2label)
    return warmup_state, initial_state


def begin_folder(run: Run) -> None:
    """Makes the run's folder, or takes away what an earlier process wrote after the checkpoint; opens what is written to."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    output_dir = Path(config.output_dir)
    if accelerator.is_main_process:
        resuming = config.resume_from_checkpoint is not None
        prepare_output_dir(output_dir, resuming, config.overwrite_output_dir)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        remove_later_checkpoints(output_dir, progress.step)
        remove_later_snapshots(output_dir / "ema_snapshots", progress.step - config.warmup_steps)
        config.save(output_dir / "config.yaml")
        environment = describe_environment(accelerator.device.type, accelerator.num_processes, vars(config))
        (output_dir / "environment.json").write_text(json.dumps(environment, indent=2))
        if config.warmup_from is not None and (record := find_warmup(config.warmup_from) / "warmup.json").is_file():
            shutil.copyfile(record, output_dir / "warmup_from.json")
        run.metrics = MetricsFile(output_dir / "metrics.jsonl", resume_step=progress.step)
        if config.push_to_hub:
            run.push = BackgroundPush(output_dir, progress.step)
    first_encoder = run.encoders[0] if run.encoders else None  # what CKNNA compares with
    run.quality = QualityMonitor(config, accelerator, run.source, run.pixels, run.vae, first_encoder, progress.step)
    if config.report_to != "none":
        # What trackers take as numbers stays one, so that runs can be sorted by it.
        hyperparameters = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in vars(config).items()}
        accelerator.init_trackers(config.tracker_project_name, config=hyperparameters)


def stop_on_sigterm(run: Run) -> None:
    """Makes SIGTERM end the run after the next step, with a checkpoint and status 0."""
    own_pid = os.getpid()

    def handle(signum: int, frame: object) -> None:
        if os.getpid() != own_pid:  # a loader worker, which inherits this handler
            os._exit(128 + signum)
        run.stop_requested = True

    signal.signal(signal.SIGTERM, handle)


def train_warmup(run: Run, checkpoint: Path | None) -> dict[str, torch.Tensor]:
    """Phase 1: the embedders, the first `warmup_depth` blocks and a projector learn what images mean."""
    config, accelerator = run.config, run.accelerator
    set_seed(config.seed)
    model = build_warmup_model(config, run.source.num_classes, run.encoders)
    alignment = choose_alignment_loss(config)

    def losses(model: torch.nn.Module, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        clean_or_noised = make_training_batch(run, batch, aligned=True, noised=config.warmup_noised)
        return warmup_loss(model, clean_or_noised, alignment, config.path_type)

    learning_rate = config.warmup_learning_rate or config.learning_rate
    model = train_phase(run, "warmup", model, losses, 0, config.warmup_steps, learning_rate, checkpoint)
    state = whole_state_dict(accelerator.unwrap_model(model))
    if accelerator.is_main_process:
        folder = Path(config.output_dir) / "warmup"
        save_warmup(state, run.model_config, config.warmup_depth, folder)
        write_warmup_record(folder, vars(config), vars(run.progress), run.model_config)
    run.state.lr_scheduler = None
    accelerator.free_memory(model)
    return state


def train_full(
    run: Run,
    warmup_state: dict[str, torch.Tensor] | None,
    initial_state: dict[str, torch.Tensor] | None,
    checkpoint: Path | None,
) -> None:
    """Phase 2: the whole model learns to draw, from the handed-over early blocks, lambda keeping them aligned."""
    config = run.config
    set_seed(config.seed)  # the later blocks start the same whatever the warmup was
    model = build_full_model(config, run.source.num_classes, run.encoders)
    alignment = choose_alignment_loss(config)
    if warmup_state is not None:
        names = hand_over(warmup_state, model, config.hand_over_projector)
        logger.info(f"hand-over: {len(names)} tensors of the warmup are the full model's, verified one by one")
    if initial_state is not None:
        model.transformer.load_state_dict(initial_state)
    if config.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()

    def losses(model: torch.nn.Module, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        weight = phase_2_weight(config, step)
        return full_loss(
            model, make_training_batch(run, batch, aligned=weight > 0), weight, config.path_type, alignment,
            config.contrastive_weight, config.class_token_weight,
        )  # fmt: skip

    train_phase(
        run, "full", model, losses, config.warmup_steps, config.max_train_steps, config.learning_rate, checkpoint
    )
    finish(run)


def train_phase(
    run: Run,
    phase: str,
    model: torch.nn.Module,
    losses: LossFunction,
    start_step: int,
    end_step: int,
    learning_rate: float,
    checkpoint: Path | None,
) -> torch.nn.Module:
    """The loop, for either phase."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    encoders = [] if run.source.has_features else run.encoders  # of a latent cache that holds their tokens
    flops_aligned = flops_unaligned = count_step_flops(model, encoders_of_step(config, encoders, aligned=False))
    if encoders:
        flops_aligned = count_step_flops(model, encoders_of_step(config, encoders, aligned=True))
    model, optimizer = prepare_phase(run, phase, model, end_step - start_step, learning_rate, checkpoint)
    batches = load_batches(run, progress.step, end_step)
    if progress.step < end_step:
        first = next_batch(run, batches)
        stop_without_data(run, progress.step + 1)  # which is then known before a step
        batches = itertools.chain([first], batches)
    model.train()

    bar = tqdm(
        range(progress.step, end_step),
        desc=f"{phase:6}",
        initial=progress.step - start_step,
        total=end_step - start_step,
        disable=not accelerator.is_main_process,
        unit="step",
    )
    late = None
    for step in bar:
        started, used_learning_rate = time.perf_counter(), optimizer.param_groups[0]["lr"]
        parts, grad_norm, waited = train_step(run, model, optimizer, losses, batches, step)

        progress.step = step + 1
        progress.step_batch_size = run.step_batch_size
        progress.images_seen += run.step_batch_size
        aligned = phase == "warmup" or phase_2_weight(config, step) > 0
        step_flops = (flops_aligned if aligned else flops_unaligned) * run.step_batch_size
        progress.flops += step_flops
        # The losses of a step are fetched while the next one runs, so that the host never waits for the device.
        stopping = late is not None and settle(run, late, bar)
        record = host_record(run, phase, step, used_learning_rate)
        late = LateStep(record, step_flops, started, waited, list(parts), LateValues(agree(run, parts, grad_norm)))
        saving = stopping or progress.step % config.checkpointing_steps == 0 or progress.step == end_step
        validating = phase == "full" and config.validation_steps and progress.step % config.validation_steps == 0
        measuring = run.quality.is_due(phase, progress.step)
        if saving or validating or measuring:
            stopping |= settle(run, late, bar)
            late = None
        if phase == "full" and config.ema_snapshot_steps and progress.step % config.ema_snapshot_steps == 0:
            save_snapshots(run.state.ema, Path(config.output_dir) / "ema_snapshots", accelerator.is_main_process)
        if saving:
            save(run, phase)
        if stopping:
            logger.info("stopped by SIGTERM: go on with --resume_from_checkpoint latest")
            accelerator.end_training()
            raise SystemExit(0)
        if validating:
            validate(run)
        if measuring:
            measure_quality(run, phase, accelerator.unwrap_model(model).transformer)
    return model


def prepare_phase(
    run: Run, phase: str, model: torch.nn.Module, steps: int, learning_rate: float, checkpoint: Path | None
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """A phase's model and a fresh optimizer, schedule and EMA, or a checkpoint's."""
    config, accelerator = run.config, run.accelerator
    choose_attention(model.transformer, accelerator.device.type, accelerator.mixed_precision)
    if config.compiles(accelerator.device.type):
        compile_blocks(model.transformer, accelerator.device.type)
    optimizer = build_optimizer(
        model,
        config.optimizer,
        learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    run.state.lr_scheduler = get_scheduler(
        "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=steps,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    if phase == "full":
        run.state.ema = EMA(accelerator.unwrap_model(model).transformer, config.ema_profiles())
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint, run.state)
        set_learning_rate(run.state.lr_scheduler, optimizer, learning_rate)
        if config.streaming:
            run.stream_state = load_data_state(accelerator, checkpoint, config.dataloader_num_workers)
        logger.info(f"resumed from {checkpoint} at step {run.progress.step}")
    return model, optimizer


def train_step(
    run: Run,
    model: torch.nn.Module,
    optimizer: AcceleratedOptimizer,
    losses: LossFunction,
    batches: Iterator[Batch],
    step: int,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """One optimizer step: this process's losses, the gradient's norm, and the seconds that it waited for data."""
    config, accelerator = run.config, run.accelerator
    waited, sums = 0.0, {}
    for _ in range(config.gradient_accumulation_steps):
        wait_started = time.perf_counter()
        batch = next_batch(run, batches)
        waited += time.perf_counter() - wait_started
        with accelerator.accumulate(model):
            parts = losses(model, to_device(batch, accelerator.device), step)
            accelerator.backward(parts["loss"])
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value.detach() / config.gradient_accumulation_steps
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                grad_norm = torch.as_tensor(whole_tensor(grad_norm), device=accelerator.device)
                # The optimizer leaves out a non-finite step on the device, as it does for fp16's loss scaler.
                optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()
                optimizer.step()
            optimizer.zero_grad()
    if run.state.ema is not None:
        run.state.ema.step()
    run.state.lr_scheduler.step()
    return sums, grad_norm, waited


def save(run: Run, phase: str) -> None:
    """A checkpoint of everything that the next step depends on; by strategy it goes to the Hub."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    data_state = None
    if run.stream is not None:
        run.stream_state = run.stream.state_dict()
        data_state = {"workers": config.dataloader_num_workers, "stream": run.stream_state}
    save_checkpoint(accelerator, config.output_dir, progress, config.checkpoints_total_limit, run.state, data_state)
    logger.info(f"saved checkpoint-{progress.step}")
    if config.push_to_hub and config.hub_strategy != "end" and progress.step < config.max_train_steps:
        push_checkpoint(run, phase)


def set_learning_rate(lr_scheduler, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Makes the config's rate hold, not the checkpoint's: a run that diverged goes on with a lower one."""
    lr_scheduler.base_lrs = [learning_rate] * len(lr_scheduler.base_lrs)
    for group, factor in zip(optimizer.param_groups, lr_scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = learning_rate
        group["lr"] = learning_rate * factor(lr_scheduler.last_epoch)


def next_batch(run: Run, batches: Iterator[Batch]) -> Batch | None:
    """The next batch; after a failure to read it the last one again, so that no other process waits for this one's share
    of a step for ever. `agree` then ends the run on all of them, and nothing of that step is kept."""
    if run.data_error is None:
        try:
            run.batch = next(batches)
        except Exception as error:
            logger.debug("reading failed", exc_info=True)
            run.data_error = f"{type(error).__name__}: {error}"
    return run.batch


def stop_without_data(run: Run, step: int) -> None:
    """Ends the run on all processes, with one message, if any of them had no data for a step."""
    errors = gather_object([(run.accelerator.process_index, run.data_error)])
    for process, error in errors:
        if error is not None:
            raise RuntimeError(
                f"process {process} of {len(errors)} could not read its data, so all stop before step {step}: {error}\n"
                "Go on from the last checkpoint with --resume_from_checkpoint latest"
            )


def agree(run: Run, sums: Batch, grad_norm: torch.Tensor) -> torch.Tensor:
    """In one reduction: the means of the losses over all processes, whether SIGTERM reached any, whether any lacks data;
    with them the norm of the gradient, which is one and the same everywhere."""
    device = run.accelerator.device
    flags = [torch.full((), float(flag), device=device) for flag in (run.stop_requested, run.data_error is not None)]
    values = torch.stack([*sums.values(), *flags])
    return torch.cat([run.accelerator.reduce(values, "mean"), grad_norm.reshape(1).float()])


def settle(run: Run, late: LateStep, bar: tqdm) -> bool:
    """Fetches a step's losses, counts it if it was left out, and writes its line; returns whether SIGTERM came."""
    config, progress = run.config, run.progress
    *losses, stopping, failing, grad_norm = late.values.fetch()
    # The device began with this step when the host did, or when it was done with the step before.
    seconds = late.values.arrived - max(late.started, run.last_arrival)
    run.last_arrival = late.values.arrived
    if failing:
        stop_without_data(run, late.record["step"])
    finite = math.isfinite(grad_norm)
    progress.nonfinite_steps += not finite
    progress.nonfinite_in_a_row = 0 if finite else progress.nonfinite_in_a_row + 1
    losses = dict(zip(late.loss_names, losses, strict=True))
    peak = peak_flops(run.accelerator.device)
    rates = {
        "images_per_second": run.step_batch_size / seconds,
        "data_wait": late.waited / seconds,
        "mfu": None if peak is None else late.flops / seconds / (peak * run.accelerator.num_processes),
    }
    record = {**late.record, **rates, **losses, "grad_norm": grad_norm, "nonfinite_steps": progress.nonfinite_steps}
    if run.metrics is not None:
        run.metrics.write(record)
    run.accelerator.log({k: v for k, v in record.items() if k not in ("step", "phase")}, step=record["step"])
    shown = {name: f"{loss:.4f}" for name, loss in losses.items()}
    bar.set_postfix({"img/s": f"{record['images_per_second']:.0f}", **shown}, refresh=False)
    if progress.nonfinite_in_a_row >= config.max_nonfinite_steps:
        raise RuntimeError(
            f"{progress.nonfinite_in_a_row} steps in a row had a non-finite gradient and were left out. Resume from the "
            f"last checkpoint in {config.output_dir} with a lower learning_rate"
        )
    return stopping > 0


def host_record(run: Run, phase: str, step: int, learning_rate: float) -> dict[str, object]:
    """What the host knows of a step for its line of metrics.jsonl and of the trackers."""
    progress = run.progress
    return {
        "step": progress.step,
        "phase": phase,
        "lambda": 1.0 if phase == "warmup" else phase_2_weight(run.config, step),
        "learning_rate": learning_rate,
        "images_seen": progress.images_seen,
        "flops": progress.flops,
        "peak_memory_gib": peak_memory(run.accelerator.device) / 2**30,
    }


def phase_2_weight(config: TrainingConfig, step: int) -> float:
    """lambda at a step of the run; its schedule starts with phase 2."""
    return alignment_weight(
        step - config.warmup_steps,
        config.alignment_schedule,
        config.alignment_weight if config.encoder is not None else 0.0,
        config.alignment_half_life,
        config.alignment_stop_step,
    )


def load_batches(run: Run, start_step: int, end_step: int) -> Iterator[Batch]:
    """The batches of steps [start_step, end_step)."""
    config, accelerator = run.config, run.accelerator
    side, channels = run.pixels
    maker = SampleMaker(
        run.source,
        image_size=side,
        channels=channels,
        latent_shape=(config.in_channels, config.sample_size, config.sample_size),
        seed=config.seed,
        class_dropout_prob=config.class_dropout_prob,
        random_flip=config.random_flip,
        class_token_dim=run.model_config["class_token_dim"],
    )
    pin_memory = accelerator.device.type == "cuda"
    if config.streaming:
        samples = StreamingSamples(
            maker, accelerator.num_processes, accelerator.process_index, retry_seconds=config.stream_retry_seconds
        )
        # What comes next in a stream is a state, kept for the checkpoints and for the next phase.
        run.stream = stream_loader(
            samples, config.train_batch_size, config.dataloader_num_workers, pin_memory, run.stream_state
        )
        return iter(run.stream)
    # Of data at hand the step alone decides.
    sampler = StepSampler(
        num_samples=len(run.source.dataset),
        batch_size=config.train_batch_size,
        accumulation_steps=config.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        start_step=start_step,
        end_step=end_step,
        seed=config.seed,
    )
    loader = DataLoader(
        TrainingSamples(maker, config.stream_retry_seconds),
        batch_sampler=sampler,
        num_workers=config.dataloader_num_workers,
        pin_memory=pin_memory,
    )
    return iter(loader)


def make_training_batch(run: Run, batch: Batch, aligned: bool, noised: bool = True) -> TrainingBatch:
    """Latents and the encoders' tokens of what was read; the tokens only for a step that aligns, or draws the class token."""
    config = run.config
    made = TrainingBatch(latents(run, batch), batch["label"], batch["drop"], targets=None)
    if noised:
        made.noise, made.class_noise = batch["noise"], batch.get("class_noise")
        made.t = timestep_from_normal(
            batch["time_normal"],
            config.timestep_distribution,
            config.timestep_logit_mean,
            config.timestep_logit_std,
            config.timestep_shift,
        )
    encoders = encoders_of_step(config, run.encoders, aligned)
    if encoders and "features" in batch:  # of a latent cache, which has no class tokens
        tokens = [batch["features"].unflatten(1, (config.token_grid**2, -1))]
    elif encoders:
        tokens, images = [], batch["pixels"].float() / 255
        for encoder in encoders:
            if config.class_token_weight > 0 and made.class_token is None:
                patch_tokens, class_token = encoder.patch_and_class_tokens(images)
                made.class_token = class_token.float()
            else:
                patch_tokens = encoder(images)
            tokens.append(patch_tokens)
    if aligned:
        made.targets = [spatial_normalize(t) for t in tokens] if config.spatial_norm else tokens
    return made


def latents(run: Run, batch: Batch) -> torch.Tensor:
    """Clean latents (B, C, h, w) of a batch."""
    if "moments" in batch:  # of a latent cache
        return moments_to_latents(batch["moments"], run.vae, batch["posterior_noise"])
    return pixels_to_latents(batch["pixels"], run.vae, batch["posterior_noise"])


def choose_alignment_loss(config: TrainingConfig) -> AlignmentLoss:
    if config.alignment_loss == "nt_xent":
        return partial(nt_xent_alignment_loss, temperature=config.alignment_temperature)
    return structural_alignment_loss if config.alignment_loss == "structural" else cosine_alignment_loss


def build_pipeline(run: Run, transformer: ERWTransformer2DModel) -> ERWPipeline:
    pipeline = ERWPipeline(
        transformer=transformer,
        vae=run.vae,
        scheduler=FlowMatchEulerMaruyamaScheduler(path_type=run.config.path_type),
        id2label=run.source.id2label,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_grid(run: Run, transformer: ERWTransformer2DModel) -> Image.Image:
    """Pictures of the model as it is: the same labels and the same noise at every step of the run."""
    count, num_classes = run.config.num_validation_images, run.source.num_classes
    if num_classes == 0:
        labels = [0] * count  # the null class of an unconditional model
    elif num_classes <= count:
        labels = [i % num_classes for i in range(count)]  # all of them, in turn
    else:
        labels = [i * num_classes // count for i in range(count)]  # evenly spaced ones
    pipeline = build_pipeline(run, transformer)
    with run.accelerator.autocast():
        images = pipeline(
            class_labels=labels,
            num_inference_steps=run.config.num_inference_steps,
            guidance_scale=run.config.guidance_scale,
            generator=[torch.Generator().manual_seed(run.config.seed + i) for i in range(count)],
        ).images
    columns = num_classes if 4 <= num_classes <= count else math.ceil(math.sqrt(count))
    return image_grid(images, columns=columns)


def averaged_transformer(run: Run, on_all_processes: bool = False) -> ERWTransformer2DModel | None:
    """A model with the EMA weights, on the main process; every process calls it, since weights may be sharded."""
    weights = run.state.ema.weights()
    if not (on_all_processes or run.accelerator.is_main_process):
        return None
    transformer = ERWTransformer2DModel(**run.model_config)
    transformer.load_state_dict(weights, strict=False)  # buffers are no weights
    return transformer.to(run.accelerator.device).eval()


def validate(run: Run) -> None:
    """Writes `samples/step-N.png`, made with the EMA weights, and hands it to the trackers."""
    transformer = averaged_transformer(run)
    if transformer is not None:
        grid = sample_grid(run, transformer)
        path = Path(run.config.output_dir) / "samples" / f"step-{run.progress.step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
        for tracker in run.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(
                    {"samples": np.asarray(grid.convert("RGB"))[None]}, step=run.progress.step, **layout
                )
    run.accelerator.wait_for_everyone()


def measure_quality(run: Run, phase: str, transformer: ERWTransformer2DModel) -> None:
    """FID and probes by all processes together, with the EMA weights; the warmup, which has none, with its own."""
    if phase == "full":
        transformer = averaged_transformer(run, on_all_processes=True)
    else:
        state = whole_state_dict(transformer)
        transformer = build_warmup_transformer(run.model_config, run.config.warmup_depth)
        transformer.load_state_dict(state)
        transformer.to(run.accelerator.device).eval()
    run.quality.measure(phase, run.progress.step, run.progress.images_seen, build_pipeline(run, transformer))


def finish(run: Run) -> None:
    """The pipeline with the EMA weights, a grid of its pictures, and the loss curve."""
    folder = Path(run.config.output_dir)
    transformer = averaged_transformer(run)
    if transformer is not None:
        sample_grid(run, transformer).save(folder / "grid.png")
        build_pipeline(run, transformer).save_pretrained(folder / "pipeline")
        plot_losses(folder / "metrics.jsonl", folder / "loss_curve.png")
        logger.info(f"done: {folder}/pipeline, {folder}/grid.png, {folder}/loss_curve.png")
    if run.push is not None:
        run.push.submit(run.progress.step, partial(link_folder, folder / "pipeline"), checkpoint_to_push(run))


def checkpoint_to_push(run: Run) -> Path | None:
    if run.config.hub_strategy != "checkpoint":
        return None
    return Path(run.config.output_dir) / f"checkpoint-{run.progress.step}"


def push_checkpoint(run: Run, phase: str) -> None:
    """Hands the EMA's pipeline and, by strategy, this step's checkpoint to the process that pushes; all call it."""
    transformer = averaged_transformer(run) if phase == "full" else None
    checkpoint = checkpoint_to_push(run)
    if run.push is not None and (transformer is not None or checkpoint is not None):
        write_pipeline = None if transformer is None else build_pipeline(run, transformer).save_pretrained
        run.push.submit(run.progress.step, write_pipeline, checkpoint)


def push_at_end(run: Run) -> None:
    """Waits for the push of the finished run, whose failure costs nothing but a command."""
    folder, repo_id = run.config.output_dir, run.config.hub_model_id
    logger.info(f"pushing to {repo_id}, log: {folder}/push.log")
    if run.push.wait():
        logger.info(f"pushed to {repo_id}")
    else:
        logger.warning(
            f"the push to {repo_id} failed (see {folder}/push.log). Everything is in {folder}; to finish the push: "
            f"{run.push.command}"
        )


if __name__ == "__main__":
    main()
