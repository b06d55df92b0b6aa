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
"""A phase of a run (warmup or full training): model, optimizer, schedule, EMA and lambda, as an object that saves itself."""

from typing import Any

from erw_hf.objective import AlignedTransformer
from erw_hf.trainer.device import compile_blocks
from erw_hf.trainer.ema import EMA, ema_profiles
from erw_hf.trainer.engines import autocast_forward
from erw_hf.trainer.flops import count_step_flops, count_vae_flops
from erw_hf.trainer.optimizers import build_lr_scheduler, build_optimizer, restore_learning_rate
from erw_hf.trainer.setup import Inputs
from erw_hf.transformer_erw import ERWTransformer2DModel


class Phase:
    """
    A model with a fresh optimizer, learning-rate schedule and EMA, and the steps of the run that train it.

    It saves what accelerate's own checkpoint lacks. It is not registered with accelerate, which would load it as a pickle
    that can execute code.

    Args:
        inputs ([`~trainer.setup.Inputs`]): The run.
        model ([`AlignedTransformer`]): What to train; its `warmup` says which phase this is. The warmup has no EMA.
        steps (`range`): The steps, counted over both phases from 0.
        learning_rate (`float`): Peak learning rate.
    """

    def __init__(self, inputs: Inputs, model: AlignedTransformer, steps: range, learning_rate: float) -> None:
        config, accelerator = inputs.config, inputs.accelerator
        self.inputs, self.steps = inputs, steps
        self.warmup = model.warmup
        self.name = "warmup" if model.warmup else "full"
        self.loss = inputs.objective.warmup_loss if model.warmup else inputs.objective.full_loss
        self.noised = config.warmup_noised or not model.warmup
        self.teacher = inputs.warmup_teacher if model.warmup else inputs.teacher
        encoding = 0 if inputs.source.is_latent_cache else count_vae_flops(inputs.vae, inputs.image_size)
        self.flops = {  # of an image, by whether the step aligns
            aligned: encoding + count_step_flops(model, self.teacher.encoders_for(aligned))
            for aligned in (False, True)
        }
        if config.compiles(accelerator.device.type):
            compile_blocks(model.transformer, accelerator.device.type, config.activation_memory_budget)
        optimizer = build_optimizer(
            model,
            config.optimizer,
            learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.adam_weight_decay,
        )
        self.lr_scheduler = build_lr_scheduler(optimizer, config.lr_scheduler, config.lr_warmup_steps, len(steps))
        self.peak_learning_rate = learning_rate
        autocast_forward(model, accelerator)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.parameters = list(self.model.parameters())  # once: in every step it would take the host 4 ms for XL
        self.ema = None if self.warmup else EMA(self.transformer, ema_profiles(config))

    @property
    def transformer(self) -> ERWTransformer2DModel:
        """The transformer as it is trained: its weights may be sharded."""
        return self.inputs.accelerator.unwrap_model(self.model).transformer

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def weight_at(self, step: int) -> float:
        """
        Weight of the alignment at a step of the run, from 0: 1 in the warmup, which has no other loss; then lambda, whose
        schedule starts with full training.
        """
        return 1.0 if self.warmup else self.inputs.objective.weight_at(step - self.steps.start)

    def state_dict(self) -> dict[str, Any]:
        return {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        # The config's rate overrides the checkpoint's, so that a run that diverged can resume with a lower one.
        restore_learning_rate(self.optimizer, self.lr_scheduler, self.peak_learning_rate)
