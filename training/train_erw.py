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

One run does everything: warmup of the early blocks, verified hand-over, full training, pictures and a pipeline. It can be stopped anywhere and started again with `--resume_from_checkpoint latest`.

    train                           the two phases and the hand-over between them
      warmup_phase, full_phase      the model of a phase and what it starts from
      train_phase                   the loop
        train_step                  samples, latents and tokens, losses, backward, clip, optimizer, EMA
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import set_seed

from erw_hf.data.latents import moments_to_latents, pixels_to_latents
from erw_hf.files import folder_written_whole, write_record
from erw_hf.hub.cards import write_warmup_record
from erw_hf.hub.public import public_name
from erw_hf.hub.upload import prepare_repo
from erw_hf.objective import Batch
from erw_hf.trainer.batches import Batches, Samples
from erw_hf.trainer.checkpoints import (
    Progress,
    agree_on_checkpoint,
    check_checkpoint,
    check_same_data,
    load_checkpoint,
    load_data_state,
    save_checkpoint,
)
from erw_hf.trainer.config import TrainingConfig, given_values, local_names, parse_config
from erw_hf.trainer.cost import cost_report, first_names, start_report, summary_of
from erw_hf.trainer.device import choose_precision, to_device
from erw_hf.trainer.ema import whole_state_dict
from erw_hf.trainer.engines import check_engine, close_accelerator, open_accelerator
from erw_hf.trainer.initialization import find_warmup, load_initial, load_warmup, new_class_ids, save_warmup
from erw_hf.trainer.optimizers import clip_gradients
from erw_hf.trainer.phase import Phase
from erw_hf.trainer.plan import write_plan
from erw_hf.trainer.run_folder import RunFolder, check_vacant
from erw_hf.trainer.run_record import describe_environment, read_metrics
from erw_hf.trainer.setup import Inputs, add_lora, build_full_model, build_warmup_model, fit_to_encoder, open_inputs
from erw_hf.trainer.signals import stop_on_signals
from erw_hf.trainer.snapshots import Snapshots
from erw_hf.trainer.step_log import Step, StepLog
from erw_hf.trainer.trackers import check_trackers
from erw_hf.warmup import check_hand_over, hand_over


logger = get_logger(__name__)

State = dict[str, torch.Tensor]

TIMED_STEPS = 5  # of each phase, for a plan


def main() -> None:
    if (values := given_values()).get("plan"):
        try:
            print(write_plan(values, time_steps), end="")
        except (ValueError, OSError) as error:
            raise SystemExit(f"no plan: {error}") from None
        return
    config = parse_config()
    config.check_names()
    if config.dry_run:
        try:
            if os.environ.get("RANK", "0") == "0":
                print(cost_report(config))
        except ConnectionError as error:  # the Hub does not answer: say so without a traceback
            raise SystemExit(str(error)) from None
        return
    run(config)


def run(config: TrainingConfig) -> None:
    """A run, from its processes to its last push."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger(__name__).setLevel(logging.INFO)
    logging.getLogger("erw_hf.trainer").setLevel(logging.INFO)
    precision = choose_precision(config.mixed_precision)
    accelerator = open_accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=precision[0],
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
    )
    # All checks come before the first step, and before an earlier run is touched.
    check_trackers(config, accelerator)
    check_engine(config, accelerator)
    with RunFolder(config.output_dir, accelerator) as folder:
        snapshots = train(config, accelerator, folder, precision)
        close_accelerator(accelerator)
        if snapshots is not None:
            snapshots.wait_for_push()


def time_steps(config: TrainingConfig) -> tuple[float, float]:
    """Seconds of a step of the warmup and of a full one, here, for a plan: the medians of a few steps of such a run."""
    warmup = TIMED_STEPS if config.warmup_steps > 0 else 0
    off = dict.fromkeys(("validation_steps", "evaluation_steps", "probe_steps", "lr_warmup_steps"), 0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        short = dataclasses.replace(
            config,
            output_dir=f"{folder}/run",
            warmup_steps=warmup,
            max_train_steps=warmup + TIMED_STEPS,
            report_to="none",
            push_to_hub=False,
            patience=None,
            num_validation_images=1,
            num_inference_steps=1,
            **off,
        )
        run(short)
        records = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    batch = config.step_batch_size(processes=1)
    times = [batch / record["images_per_second"] for record in records]  # the first of each phase sets things up
    return (statistics.median(times[1:warmup]) if warmup else 0.0), statistics.median(times[warmup + 1 :])


def train(
    config: TrainingConfig, accelerator: Accelerator, folder: RunFolder, precision: tuple[str, str]
) -> Snapshots | None:
    """A run, by the owner of its folder; returns what is still being pushed, `None` if the run was told to stop."""
    fit_to_encoder(config)
    checkpoint, progress = find_checkpoint(config, accelerator)
    if config.push_to_hub and accelerator.is_main_process:
        config.hub_model_id = prepare_repo(
            config.hub_model_id or Path(config.output_dir).resolve().name, config.hub_private
        )
    inputs = open_inputs(config, accelerator)
    check_same_data(progress, inputs.source, config.dataset_name, config.stream_retry_seconds)
    start = load_start(inputs, checkpoint)
    if accelerator.is_main_process:
        data = summary_of(inputs.source, inputs.image_size, inputs.image_channels)
        print(start_report(config, data, precision, accelerator.device, accelerator.num_processes), flush=True)
    stop_requested = stop_on_signals()
    if inputs.warmup_teacher is not inputs.teacher:
        logger.info("the patch embedding before the encoder's blocks is new; the warmup trains it")
    begin_folder(inputs, folder, checkpoint, progress)

    batches, snapshots = Batches(inputs), Snapshots(inputs, progress)
    log = StepLog(inputs, folder, progress, batches, stop_requested)
    phase = None
    # A run that stopped at the last step of its warmup ends it again, to hand it over.
    if config.warmup_steps > 0 and progress.step <= config.warmup_steps:
        phase = warmup_phase(inputs)
        resume(phase, batches, checkpoint)
        if not train_phase(phase, progress, batches, log, snapshots):
            return None
        start = end_warmup(phase, progress)
        checkpoint = phase = None  # full training starts from the hand-over
    # A run that stopped at its very last step writes its pipeline and pictures again.
    if progress.step < config.max_train_steps or checkpoint is not None:
        phase = full_phase(inputs, start)
        resume(phase, batches, checkpoint)
        if not train_phase(phase, progress, batches, log, snapshots):
            return None
    snapshots.finish(phase)
    return snapshots


def warmup_phase(inputs: Inputs) -> Phase:
    """The warmup: the embedders, the first `warmup_depth` blocks and a projector learn what images mean."""
    config = inputs.config
    set_seed(config.seed)
    model = build_warmup_model(config, inputs.source.num_classes, inputs.teacher.encoders, inputs.start_encoder)
    rate = config.learning_rate if config.warmup_learning_rate is None else config.warmup_learning_rate
    return Phase(inputs, model, range(config.warmup_steps), rate)


def end_warmup(phase: Phase, progress: Progress) -> State:
    """Writes the warmup, which can start other runs too, and returns what it hands over."""
    inputs = phase.inputs
    config, accelerator = inputs.config, inputs.accelerator
    state = whole_state_dict(accelerator.unwrap_model(phase.model))
    if accelerator.is_main_process:
        taught = inputs.warmup_teacher is not inputs.teacher
        with folder_written_whole(Path(config.output_dir) / "warmup") as folder:
            save_warmup(state, inputs.model_config, config.warmup_depth, folder)
            write_warmup_record(folder, vars(config), vars(progress), inputs.model_config, taught)
    accelerator.free_memory(phase.model)
    return state


def full_phase(inputs: Inputs, start: State | None) -> Phase:
    """Full training: the whole model learns to draw, from the handed-over early blocks, lambda keeping them aligned."""
    config = inputs.config
    set_seed(config.seed)  # the later blocks start the same after any warmup
    start_encoder = inputs.start_encoder if config.warmup_steps == 0 else None
    model = build_full_model(config, inputs.source.num_classes, inputs.teacher.encoders, start_encoder)
    new_classes: list[int] = []
    if start is not None and config.init_from is not None:
        model.transformer.load_state_dict(start)
        new_classes = new_class_ids(start)
        if new_classes:
            label = inputs.source.id2label or {}
            names = first_names([label.get(i, str(i)) for i in new_classes])
            logger.info(f"classes that {config.init_from} does not know: {names}")
    elif start is not None:
        names = hand_over(start, model, hands_over_projector(config, start))
        logger.info(f"hand-over: {len(names)} tensors of the warmup are now the full model's, each verified")
    if config.lora_rank > 0:  # a checkpoint brings the base's weights and the mask of new classes with it
        add_lora(model, config, new_classes)
    if config.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    return Phase(inputs, model, range(config.warmup_steps, config.max_train_steps), config.learning_rate)


def train_phase(phase: Phase, progress: Progress, batches: Batches, log: StepLog, snapshots: Snapshots) -> bool:
    """The loop of either phase; returns whether it reached its end, or was told to stop."""
    config, accelerator = phase.inputs.config, phase.inputs.accelerator
    if progress.step > phase.steps.start:
        snapshots.take(phase, resumed=True)
    if snapshots.is_over(phase) and progress.step < phase.steps.stop:  # it ended early before, and is started again
        end_early(phase, progress, batches, saved=True)
        return True
    batches.start(range(progress.step, phase.steps.stop))
    phase.model.train()
    for step in log.steps(phase):
        stopping = log.add(phase, train_step(phase, batches, step))
        saving = progress.step % config.checkpointing_steps == 0 or progress.step == phase.steps.stop
        if saving or stopping or snapshots.is_due(phase):
            stopping |= log.settle()
        snapshots.store_averages(phase)  # before the checkpoint: a run that resumes from it does not repeat this step
        if saving or stopping:
            save_checkpoint(
                accelerator, config.output_dir, progress, config.checkpoints_total_limit, phase, batches.state_dict()
            )
            logger.info(f"saved checkpoint-{progress.step}")
            if config.push_to_hub and config.hub_strategy != "end" and progress.step < config.max_train_steps:
                snapshots.push_checkpoint(phase)
        if stopping:
            logger.info("stopped: resume with --resume_from_checkpoint latest")
            return False
        snapshots.take(phase)
        if snapshots.is_over(phase) and progress.step < phase.steps.stop:
            end_early(phase, progress, batches, saved=saving)
            break
    return True


def end_early(phase: Phase, progress: Progress, batches: Batches, saved: bool) -> None:
    """Makes the last step the run's last of all: its record and its pushes say so."""
    config, accelerator = phase.inputs.config, phase.inputs.accelerator
    if not saved:
        save_checkpoint(
            accelerator, config.output_dir, progress, config.checkpoints_total_limit, phase, batches.state_dict()
        )
    config.max_train_steps = progress.step
    if accelerator.is_main_process:
        config.save(Path(config.output_dir) / "config.yaml")


def train_step(phase: Phase, batches: Batches, step: int) -> Step:
    """One optimizer step."""
    inputs, model, optimizer = phase.inputs, phase.model, phase.optimizer
    config, accelerator = inputs.config, inputs.accelerator
    started, waited, learning_rate = time.perf_counter(), batches.waited, phase.learning_rate
    weight = phase.weight_at(step)  # lambda
    sums: dict[str, torch.Tensor] = {}
    for _ in range(config.gradient_accumulation_steps):
        samples = batches.next()
        with accelerator.accumulate(model):
            batch = make_batch(phase, to_device(samples, accelerator.device), aligned=weight > 0)
            losses = phase.loss(model, batch, weight)
            accelerator.backward(losses.loss)
            for name, value in losses.values.items():
                sums[name] = sums.get(name, 0) + value.detach() / config.gradient_accumulation_steps
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(accelerator, optimizer.optimizer, phase.parameters, config.max_grad_norm)
                # The optimizer skips a non-finite step on the device, as it does for fp16's loss scaler.
                skip = ~grad_norm.isfinite()
                optimizer.optimizer.found_inf = skip.float()
                # On other devices torch's kernel does not look (pytorch 186360), so the host does.
                if accelerator.device.type in ("cpu", "cuda") or not skip:
                    optimizer.step()
            optimizer.zero_grad()
    if phase.ema is not None:
        phase.ema.step()
    phase.lr_scheduler.step()
    flops = phase.flops[weight > 0] * inputs.step_batch_size
    return Step(started, batches.waited - waited, weight, learning_rate, flops, sums, grad_norm)


def make_batch(phase: Phase, samples: Samples, aligned: bool) -> Batch:
    """What the loss sees of samples as they were read; the teacher runs if the step aligns, or for a class token."""
    inputs = phase.inputs
    if "moments" in samples:  # of a latent cache
        x0 = moments_to_latents(samples["moments"], inputs.vae, samples["posterior_noise"])
    else:
        with inputs.autocast_vae():
            x0 = pixels_to_latents(samples["pixels"], inputs.vae, samples["posterior_noise"])  # (B, C, h, w)
    t = inputs.objective.flow_time(samples["time_normal"])  # (B,)
    targets, class_token = phase.teacher(samples, aligned)  # (B, N, D) of each encoder, (B, E)
    return Batch(
        x0=x0 / inputs.config.noise_scale,
        noise=samples["noise"],
        t=t if phase.noised else torch.zeros_like(t),
        class_labels=samples["label"],
        drop=samples["drop"],
        targets=targets,
        class_token=class_token,
        class_noise=samples.get("class_noise"),
        # A warmup that teaches a new patch embedding has no projector to hide tokens from.
        hidden=samples.get("hidden") if phase.teacher is inputs.teacher else None,
    )


def find_checkpoint(config: TrainingConfig, accelerator: Accelerator) -> tuple[Path | None, Progress]:
    """The checkpoint to resume from and the progress of its run; `None` and no progress for a new run."""
    checkpoint = agree_on_checkpoint(accelerator, config.output_dir, config.resume_from_checkpoint)
    if checkpoint is None:
        check_vacant(Path(config.output_dir), may_replace(config))
        return None, Progress()
    if (checkpoint.parent / "config.yaml").exists():
        config.check_resumable(checkpoint.parent / "config.yaml")
    progress = check_checkpoint(checkpoint, config.output_dir, config.step_batch_size(accelerator.num_processes))
    if config.streaming:
        load_data_state(accelerator, checkpoint, config.dataloader_num_workers, config.train_batch_size)
    return checkpoint, progress


def may_replace(config: TrainingConfig) -> bool:
    """Whether a new run may replace another: if told so, or if that one was killed before its first checkpoint."""
    return config.overwrite_output_dir or config.resume_from_checkpoint is not None


def load_start(inputs: Inputs, checkpoint: Path | None) -> State | None:
    """The state that a new run's full training starts from: the warmup of `--warmup_from`, after checking that it fits, or the model
    of `--init_from`."""
    config = inputs.config
    if checkpoint is not None:  # which holds it
        return None
    if config.warmup_from is not None:
        state = load_warmup(config.warmup_from, inputs.model_config)
        with torch.device("meta"):
            model = build_full_model(config, inputs.source.num_classes, inputs.teacher.encoders)
            check_hand_over(state, model, hands_over_projector(config, state))
        warn_of_other_origin(config, hands_over_projector(config, state) and len(model.projectors) > 0)
        return state
    if config.init_from is not None:
        return load_initial(config.init_from, inputs.model_config, inputs.source.id2label)
    return None


def warn_of_other_origin(config: TrainingConfig, with_projectors: bool) -> None:
    """Of a warmup with another encoder or data, whose tensors fit nevertheless. By names: a folder may have been moved."""
    file = find_warmup(str(config.warmup_from)) / "warmup.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    advice = {"dataset": "its classes become those of the same number here"}
    if with_projectors:
        advice["encoder"] = "set hand_over_projector to false, or the projectors start as that one's"
    for key, text in advice.items():
        ours = public_name(config.encoder if key == "encoder" else config.dataset_name)
        if record.get(key) not in (None, ours):
            logger.warning(
                f"the warmup {config.warmup_from} was made with the {key} {record[key]}, this run has {ours}: unless they are the "
                f"same, {text}"
            )


def hands_over_projector(config: TrainingConfig, state: State) -> bool:
    """A warmup that taught a new patch embedding before an encoder's blocks has none."""
    has_none = config.start_from_encoder > 0 and not any(name.startswith("projectors.") for name in state)
    return config.hand_over_projector and not has_none


def begin_folder(inputs: Inputs, folder: RunFolder, checkpoint: Path | None, progress: Progress) -> None:
    """Makes the run's folder, or removes what an earlier process wrote after the checkpoint; writes the run's configuration."""
    config, accelerator = inputs.config, inputs.accelerator
    output_dir = Path(config.output_dir)
    resume_step = None if checkpoint is None else progress.step
    folder.begin(resume_step, progress.step - config.warmup_steps, may_replace(config))
    if checkpoint is not None and config.overwrite_output_dir:
        logger.warning(f"resuming from {checkpoint}, so overwrite_output_dir deletes nothing: omit one of the two")
    if accelerator.is_main_process:
        config.save(output_dir / "config.yaml")
        environment = describe_environment(
            accelerator.device.type, accelerator.num_processes, accelerator.mixed_precision, local_names(vars(config))
        )
        write_record(output_dir / "environment.json", environment)
        if checkpoint is None and config.warmup_from is not None:
            record = find_warmup(config.warmup_from) / "warmup.json"
            if record.is_file():
                shutil.copyfile(record, output_dir / "warmup_from.json")
    accelerator.wait_for_everyone()


def resume(phase: Phase, batches: Batches, checkpoint: Path | None) -> None:
    """Puts a phase and its data where a checkpoint was; without one they start."""
    config, accelerator = phase.inputs.config, phase.inputs.accelerator
    if checkpoint is None:
        return
    load_checkpoint(accelerator, checkpoint, phase)
    if config.streaming:
        batches.load_state_dict(
            load_data_state(accelerator, checkpoint, config.dataloader_num_workers, config.train_batch_size)
        )
    logger.info(f"resumed from {checkpoint}")


if __name__ == "__main__":
    main()
