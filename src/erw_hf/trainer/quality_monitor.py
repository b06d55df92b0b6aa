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
"""Quality during training: FID of a few images and probes of every block, by the code that evaluates finished models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from erw_hf.data.source import load_source
from erw_hf.evaluation.extractors import load_extractor
from erw_hf.evaluation.images import dataset_images, generated_images
from erw_hf.evaluation.probes import NEIGHBOURS, load_probe_pair, probe_blocks
from erw_hf.evaluation.quality import (
    Reference,
    available_metrics,
    extractor_hashes,
    feature_widths,
    load_reference,
    make_reference,
    measure,
    reference_file,
)
from erw_hf.pipeline_erw import ERWPipeline
from erw_hf.processes import done_by_all, forgiven
from erw_hf.trainer.phase import Phase
from erw_hf.trainer.plots import plot_probes, plot_quality
from erw_hf.trainer.run_record import MetricsFile, measured_alike, read_metrics
from erw_hf.trainer.setup import Inputs
from erw_hf.transformer_erw import ERWTransformer2DModel


BATCH_SIZE = 64  # of real images through the extractor
PROBE_TIMES = [0.0, 0.5]  # flow times: clean tokens and noised ones


class QualityMonitor:
    """Measures a model while it is trained, into `evaluations.jsonl`, `quality_curve.png` and `probes.png`, without
    touching the random state of the run. Measurements after `resume_step` are dropped. CKNNA compares with the
    run's first encoder.

    Created and called on all ranks, which draw the images together. What cannot work (missing weights, a reference
    that does not fit) raises here, before the first step."""

    def __init__(self, inputs: Inputs, resume_step: int) -> None:
        config, accelerator, source = inputs.config, inputs.accelerator, inputs.source
        self.config, self.accelerator, self.vae = config, accelerator, inputs.vae
        self.encoder = inputs.teacher.encoders[0] if inputs.teacher.encoders else None
        self.folder = Path(config.output_dir)
        self.work = self.folder / ".evaluation-work"  # "evaluation" is where users keep their own
        self.file = None
        if not (config.evaluation_steps or config.probe_steps):
            return
        if accelerator.is_main_process:
            self.file = MetricsFile(self.folder / "evaluations.jsonl", resume_step)
        side, channels = inputs.image_size, inputs.image_channels
        if config.evaluation_steps:
            with accelerator.main_process_first():
                self.extractor = load_extractor(config.evaluation_extractor).to(accelerator.device)
            self.metrics = [
                metric
                for metric in available_metrics([self.extractor], source.num_classes, source.id2label)
                if metric in ("fid", "accuracy")
            ]
            self.reference = self._reference(side)
        if config.probe_steps and accelerator.is_main_process:
            arguments = config.source_arguments() | {"needs_images": True}
            if config.probe_dataset is not None:
                arguments["dataset_name"] = config.probe_dataset
                source = load_source(**arguments)
            same = arguments["split"] == config.probe_split
            held_out = None if same else load_source(**arguments | {"split": config.probe_split})
            self.fit_images, self.held_out_images = load_probe_pair(
                source,
                held_out,
                config.probe_samples,
                side,
                channels,
                config.seed,
            )
            if self.encoder is not None and len(self.held_out_images.pixels) <= NEIGHBOURS:
                raise ValueError(
                    f"CKNNA needs more than {NEIGHBOURS} images, {config.probe_split} gave {len(self.held_out_images.pixels)}: "
                    "set probe_samples higher, or another probe_split"
                )

    def _reference(self, side: int) -> Reference:
        config, name = self.config, str(self.config.evaluation_reference)
        path, split = Path(name), config.dataset_split
        if path.suffix != ".npz":
            real = dataset_images(name, split, side, num_classes=0)
            path = reference_file(self.folder, name, split, real, [self.extractor], config.seed)
            if not path.exists():
                self._remove_work()
                make_reference(path, real, [self.extractor], self.accelerator, self.work, BATCH_SIZE, config.seed)
                self._remove_work()
        widths = feature_widths([self.extractor], (side, side))
        return load_reference(path, self.metrics, extractor_hashes([self.extractor]), (side, side), widths)

    def _remove_work(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(self.work, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def is_due(self, phase: Phase, step: int) -> bool:
        """Whether there is something to measure; the warmup's model is probed but cannot draw."""
        return self._draws(phase, step) or self._probes(step)

    def _draws(self, phase: Phase, step: int) -> bool:
        return not phase.warmup and self.config.evaluation_steps > 0 and step % self.config.evaluation_steps == 0

    def _probes(self, step: int) -> bool:
        return self.config.probe_steps > 0 and step % self.config.probe_steps == 0

    def measure(self, phase: Phase, step: int, images_seen: int, make_pipeline: Callable[[], ERWPipeline]) -> None:
        """Measures what is due of the pipeline, records it and hands it to the trackers; failures are skipped."""
        record: dict[str, Any] = {"step": step, "phase": phase.name, "images_seen": images_seen}
        if self._draws(phase, step):
            record |= {
                "samples": self.config.evaluation_samples,
                "inference_steps": self.config.num_inference_steps,
                "reference": Path(str(self.config.evaluation_reference)).name,
            }
        with forgiven(f"step {step} has no evaluation"):  # which all processes make together, or none of them
            pipe = done_by_all(self.accelerator, make_pipeline)
            if self._draws(phase, step):
                record |= self._measure_images(pipe)
            if self._probes(step) and self.accelerator.is_main_process:
                record["probes"] = self._probe(pipe.transformer)
        self.accelerator.wait_for_everyone()
        if self.file is not None:
            with forgiven(f"step {step} has no line in evaluations.jsonl"):
                self.file.write(record)
            with forgiven(f"step {step} has no picture of its evaluation"):
                self._plot()
        logged = {
            name: value for name, value in record.items() if name in ("fid", "accuracy", "fid_error", "accuracy_error")
        }
        for result in record.get("probes", []):
            for measure_name in ("cknna", "accuracy"):
                for depth, value in enumerate(result.get(measure_name, []), start=1):
                    logged[f"{measure_name}_t{result['t']:g}/block_{depth:02d}"] = value
        self.accelerator.log(logged, step=step)

    def has_measured(self, step: int) -> bool:
        """Whether `evaluations.jsonl` has the step."""
        path = self.folder / "evaluations.jsonl"
        return path.exists() and any(record["step"] == step for record in read_metrics(path))

    def since_best(self, step: int) -> int | None:
        """Measurements of FID since the lowest one, which counts as 0, of those made alike; `None` if this step has none. On the
        main process."""
        records = measured_alike(self.folder / "evaluations.jsonl")
        if not records or records[-1]["step"] != step:
            return None
        values = [record["fid"] for record in records]
        return len(values) - 1 - values.index(min(values))

    def _measure_images(self, pipe: ERWPipeline) -> dict[str, float]:
        config = self.config
        images = generated_images(
            pipe,
            config.evaluation_samples,
            config.seed,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=1.0,  # published curves have none
            autocast=self.accelerator.autocast,
        )
        self._remove_work()  # of a run that was killed here: its weights need not be the same to the last bit
        quality = measure(
            images,
            self.metrics,
            self.reference,
            [self.extractor],
            self.accelerator,
            self.work,
            config.train_batch_size,
        )
        self._remove_work()
        return quality.metrics | {f"{name}_error": value for name, value in quality.errors.items()}

    def _probe(self, transformer: ERWTransformer2DModel) -> list[dict[str, Any]]:
        return probe_blocks(
            transformer,
            self.fit_images,
            self.held_out_images,
            PROBE_TIMES,
            self.vae,
            self.encoder,
            self.config.path_type,
        )

    def _plot(self) -> None:
        records = read_metrics(self.folder / "evaluations.jsonl")
        if any(record.get("fid") is not None for record in records):
            plot_quality(records, self.folder / "quality_curve.png")
        probes = [(f"step {r['step']}", result) for r in records for result in r.get("probes", [])]
        if probes:
            plot_probes(probes, self.folder / "probes.png")
