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
"""Pictures, measurements, pushes and the final pipeline of a run, made with the averaged weights."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from PIL import Image

from erw_hf.hub.push import BackgroundPush, link_folder
from erw_hf.pipeline_erw import ERWPipeline
from erw_hf.processes import forgiven
from erw_hf.scheduling_erw import FlowMatchEulerMaruyamaScheduler
from erw_hf.trainer.checkpoints import Progress
from erw_hf.trainer.ema import save_snapshots, whole_state_dict
from erw_hf.trainer.lora import save_lora
from erw_hf.trainer.phase import Phase
from erw_hf.trainer.plots import image_grid, plot_losses
from erw_hf.trainer.quality_monitor import QualityMonitor
from erw_hf.trainer.setup import Inputs
from erw_hf.trainer.trackers import track_picture
from erw_hf.transformer_erw import ERWTransformer2DModel


logger = get_logger(__name__)


class Snapshots:
    """Created and called on all ranks, since weights may be sharded and images are measured together."""

    def __init__(self, inputs: Inputs, progress: Progress) -> None:
        config = inputs.config
        self.inputs, self.progress, self.folder = inputs, progress, Path(config.output_dir)
        self.push = None
        if config.push_to_hub and inputs.accelerator.is_main_process:
            self.push = BackgroundPush(self.folder, progress.step)
        self.quality = QualityMonitor(inputs, progress.step)

    def is_due(self, phase: Phase) -> bool:
        """Whether the last step is one after which the run shows something."""
        return self._draws(phase) or self.quality.is_due(phase, self.progress.step)

    def take(self, phase: Phase, resumed: bool = False) -> None:
        """Draws and measures what is due; if `resumed`, what an earlier process did not get to after its last checkpoint."""
        step, drawn, measured = self.progress.step, False, False
        if resumed:
            drawn, measured = broadcast_object_list([self._picture().exists(), self.quality.has_measured(step)])
        if self._draws(phase) and not drawn:
            self._draw(phase)
        if self.quality.is_due(phase, step) and not measured:
            self.quality.measure(phase, step, self.progress.images_seen, self._pipeline(phase))

    def store_averages(self, phase: Phase) -> None:
        """Stores the power-function averages if they are due."""
        every = self.inputs.config.ema_snapshot_steps
        if phase.ema and every and self.progress.step % every == 0:
            save_snapshots(phase.ema, self.folder / "ema_snapshots", self.inputs.accelerator.is_main_process)

    def is_over(self, phase: Phase) -> bool:
        """Keeps the model with the lowest FID so far, and says, on all ranks alike, whether `patience` is at its end."""
        patience, accelerator = self.inputs.config.patience, self.inputs.accelerator
        if patience is None or phase.warmup or self.progress.step % self.inputs.config.evaluation_steps != 0:
            return False
        make_pipeline, since = self._pipeline(phase), None
        if accelerator.is_main_process:
            since = self.quality.since_best(self.progress.step)
            if since == 0:
                with forgiven(f"the model of step {self.progress.step} is not kept as the best"):
                    if self.inputs.config.lora_rank > 0:
                        self._save_lora(phase, self.folder / "best")
                    else:
                        make_pipeline().save_pretrained(self.folder / "best")
        (since,) = broadcast_object_list([since])
        if since is None or since < patience:
            return False
        logger.info(
            f"stopped early: no lower FID in {since} measurement{'s' * (since > 1)}; {self.folder}/best is the model with the lowest"
        )
        return True

    def push_checkpoint(self, phase: Phase) -> None:
        """Hands the pipeline of full training and, by strategy, the checkpoint of this step to the process that pushes."""
        make_pipeline = None if phase.warmup else self._pipeline(phase)
        checkpoint, step = self._checkpoint(), self.progress.step
        if self.push is not None and (make_pipeline is not None or checkpoint is not None):
            with forgiven(f"the pipeline of step {step} is not pushed"):
                write = make_pipeline and make_pipeline().save_pretrained
                if self.inputs.config.lora_rank > 0:
                    write = partial(self._save_lora, phase)
                self.push.submit(step, write, checkpoint)

    def finish(self, phase: Phase | None) -> None:
        """Writes the pipeline, a grid of its pictures and the loss curve, and has them pushed; `None` after a warmup alone."""
        folder, make_pipeline = self.folder, None if phase is None else self._pipeline(phase)
        if make_pipeline is not None and self.inputs.accelerator.is_main_process:
            pipeline = make_pipeline()
            pipeline.save_pretrained(folder / "pipeline")
            if phase is not None and self.inputs.config.lora_rank > 0:
                self._save_lora(phase, folder / "lora")
            with forgiven("there is no grid.png"):
                self._grid(pipeline).save(folder / "grid.png")
            with forgiven("there is no loss_curve.png"):
                plot_losses(folder / "metrics.jsonl", folder / "loss_curve.png")
            pictures = [f", {folder / name}" for name in ("grid.png", "loss_curve.png") if (folder / name).is_file()]
            logger.info(f"done: {folder}/pipeline{''.join(pictures)}")
        if self.push is not None and phase is None:
            self.push.submit(self.progress.step, None, None)
        elif self.push is not None:
            what = folder / ("lora" if self.inputs.config.lora_rank > 0 else "pipeline")
            self.push.submit(self.progress.step, partial(link_folder, what), self._checkpoint())

    def wait_for_push(self) -> None:
        """Waits for the push of the finished run; after a failure one command finishes it."""
        if self.push is None:
            return
        repo_id = self.inputs.config.hub_model_id
        logger.info(f"pushing to {repo_id}, log: {self.folder}/push.log")
        if self.push.wait():
            logger.info(f"pushed to {repo_id}")
        else:
            logger.warning(
                f"the push to {repo_id} failed (see {self.folder}/push.log). Everything is in {self.folder}; to finish "
                f"the push: {self.push.command}"
            )

    def _save_lora(self, phase: Phase, folder: Path) -> None:
        save_lora(phase, self.inputs.source.id2label, self.inputs.config.init_from, folder)

    def _picture(self) -> Path:
        return self.folder / "samples" / f"step-{self.progress.step:07d}.png"

    def _draws(self, phase: Phase) -> bool:
        every = self.inputs.config.validation_steps
        return not phase.warmup and every > 0 and self.progress.step % every == 0

    def _checkpoint(self) -> Path | None:
        if self.inputs.config.hub_strategy != "checkpoint":
            return None
        return self.folder / f"checkpoint-{self.progress.step}"

    def _pipeline(self, phase: Phase) -> Callable[[], ERWPipeline]:
        """What makes the pipeline with the EMA weights, those of the warmup, which has no EMA, as they are. All processes call
        it, since weights may be sharded; what it returns concerns one alone."""
        lora = getattr(phase.transformer, "peft_config", None)
        weights = whole_state_dict(phase.transformer) if phase.ema is None or lora else {}
        if phase.ema is not None:
            weights |= {name: tensor.to("cpu") if lora else tensor for name, tensor in phase.ema.weights().items()}
        inputs = self.inputs
        num_layers = phase.transformer.config.num_layers  # fewer in the warmup

        def make() -> ERWPipeline:
            with inputs.accelerator.device:  # initialising XL takes a CPU 20 s
                transformer = ERWTransformer2DModel(**inputs.model_config | {"num_layers": num_layers})
            if lora:
                transformer.add_adapter(lora["default"])
            transformer.load_state_dict(weights, strict=False)  # the averages lack buffers
            if lora:
                transformer.fuse_lora()
                transformer.unload_lora()
            pipeline = ERWPipeline(
                transformer=transformer.eval(),
                vae=inputs.vae,
                scheduler=FlowMatchEulerMaruyamaScheduler(path_type=inputs.config.path_type),
                id2label=inputs.source.id2label,
            )
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

        return make

    def _grid(self, pipeline: ERWPipeline) -> Image.Image:
        """The same labels and the same noise at every step of the run."""
        config, num_classes = self.inputs.config, self.inputs.source.num_classes
        count = config.num_validation_images
        if num_classes == 0:
            labels = [0] * count  # the null class of an unconditional model
        elif num_classes <= count:
            labels = [i % num_classes for i in range(count)]  # all of them, in turn
        else:
            labels = [i * num_classes // count for i in range(count)]  # evenly spaced ones
        with self.inputs.accelerator.autocast():
            images = pipeline(
                class_labels=labels,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                generator=[torch.Generator().manual_seed(config.seed + i) for i in range(count)],
            ).images
        columns = num_classes if 4 <= num_classes <= count else math.ceil(math.sqrt(count))
        return image_grid(images, columns=columns)

    def _draw(self, phase: Phase) -> None:
        """Writes `samples/step-N.png` and hands it to the trackers."""
        accelerator, step = self.inputs.accelerator, self.progress.step
        make_pipeline = self._pipeline(phase)
        if accelerator.is_main_process:
            with forgiven(f"step {step} has no pictures"):
                grid = self._grid(make_pipeline())
                self._picture().parent.mkdir(exist_ok=True)
                grid.save(self._picture())
                track_picture(accelerator, "samples", grid, step)
        accelerator.wait_for_everyone()
