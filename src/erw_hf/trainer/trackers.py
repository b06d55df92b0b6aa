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
"""The trackers of accelerate (`report_to`): checked, started, given pictures, forgiven their failures; the files they leave."""

import logging
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from erw_hf.trainer.config import TrainingConfig


logger = logging.getLogger(__name__)

TRACKER_PROJECT = "erw"
# What TensorBoard writes into the folder of the project.
TRACKER_FILES = ("events.out.tfevents.*", "*/events.out.tfevents.*", "*/hparams.yml")


def check_trackers(config: TrainingConfig, accelerator: Accelerator) -> None:
    """Raises ValueError if a tracker of `report_to` is not installed."""
    if config.report_to != "none" and not accelerator.log_with:
        raise ValueError(f"report_to={config.report_to!r} is not installed: pip install it, or --report_to none")


def start_trackers(config: TrainingConfig, accelerator: Accelerator, step: int) -> None:
    """Starts the trackers after a step, each as a [`ForgivingTracker`]; the run's keys become hyperparameters. One that does not
    start is done without."""
    if config.report_to != "none":
        # Numbers stay numbers on the trackers, so that runs can be sorted by them.
        hyperparameters = {k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in vars(config).items()}
        after = {
            "tensorboard": {"purge_step": step + 1}
        }  # hides what a run that was killed wrote beyond its checkpoint
        try:
            accelerator.init_trackers(TRACKER_PROJECT, config=hyperparameters, init_kwargs=after)
        except Exception as error:
            logger.warning(f"the tracker {config.report_to} did not start, the run continues without it: {error!r}")
            accelerator.trackers = []
        accelerator.trackers = [ForgivingTracker(tracker) for tracker in accelerator.trackers]


def track_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Hands a picture of a step to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(picture.convert("RGB"))[None]}, step=step, **layout)


class ForgivingTracker:
    """A started tracker of accelerate whose failures cost only its own record. It warns at the first failure and keeps
    trying."""

    def __init__(self, tracker: GeneralTracker) -> None:
        self._tracker = tracker
        self._has_warned = False

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._tracker, name)
        if not callable(attribute):
            return attribute

        def forgiving(*args: Any, **kwargs: Any) -> Any:
            try:
                return attribute(*args, **kwargs)
            except Exception as error:
                if not self._has_warned:
                    logger.warning(f"the tracker {self._tracker.name} failed, the run continues: {error!r}")
                self._has_warned = True

        return forgiving
