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
"""ERW as modular blocks, so that every guider of diffusers works: labels -> noise and times -> loop -> images.

blocks = ModularPipelineBlocks.from_pretrained("pipelines/modular_erw", trust_remote_code=True)
pipe = blocks.init_pipeline()
pipe.update_components(transformer=..., scheduler=..., vae=None)
pipe(class_labels=[207], num_inference_steps=250).images
"""

import contextlib
import copy
import inspect

import torch
from diffusers import AutoModel, BaseGuidance, ClassifierFreeGuidance
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import (
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .pipeline_erw import (
    _ONE_AT_A_TIME,
    _check_noise,
    _check_output,
    _check_scheduler,
    _check_vae,
    _holds_state,
    _positive,
    _set_timesteps,
    is_representation_autoencoder,
    unscale_latents,
    upcast,
)


class ERWInputStep(ModularPipelineBlocks):
    model_name = "erw"

    @property
    def description(self) -> str:
        return "Turns class ids into the labels of the batch and those of the null class."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("transformer", AutoModel)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("class_labels", required=True, type_hint=list[int], description="Class ids."),
            InputParam("num_images_per_prompt", default=1, type_hint=int, description="Images for each label."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("labels", type_hint=torch.Tensor, description="Labels (B,)."),
            OutputParam("null_labels", type_hint=torch.Tensor, description="The null class (B,)."),
        ]

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        try:
            labels = torch.as_tensor(block_state.class_labels, device=components._execution_device).reshape(-1)
        except (TypeError, ValueError, RuntimeError):  # names, which the blocks do not know
            labels = torch.empty(0)
        if labels.is_floating_point() or labels.dtype == torch.bool or len(labels) == 0:
            raise ValueError(f"`class_labels` must be class ids, got {block_state.class_labels!r}")
        num_classes = components.transformer.config.num_classes
        labels = labels.long()
        if labels.min() < 0 or labels.max() > num_classes:
            raise ValueError(f"class ids must lie in [0, {num_classes - 1}] ({num_classes}: no class)")
        count = _positive("num_images_per_prompt", block_state.num_images_per_prompt)
        block_state.labels = labels.repeat_interleave(count)
        block_state.null_labels = torch.full_like(block_state.labels, num_classes)
        self.set_block_state(state, block_state)
        return components, state


class ERWPrepareStep(ModularPipelineBlocks):
    model_name = "erw"

    @property
    def description(self) -> str:
        return "Draws the starting noise and sets the times."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("transformer", AutoModel),
            ComponentSpec("scheduler", SchedulerMixin),
            ComponentSpec("vae", AutoModel),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("labels", required=True, type_hint=torch.Tensor, description="Labels (B,)."),
            InputParam("output_type", default="pil", type_hint=str, description='"pil", "np", "pt" or "latent".'),
            InputParam("num_inference_steps", default=250, type_hint=int, description="Number of steps."),
            InputParam("generator", description="A generator, or a list of one per image."),
            InputParam("latents", type_hint=torch.Tensor, description="Starting noise in place of a draw."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", type_hint=torch.Tensor, description="Noise (B, C, H, W), float32."),
            OutputParam("timesteps", type_hint=torch.Tensor, description="Times of the scheduler."),
            OutputParam(
                "stepper", type_hint=SchedulerMixin, description="The scheduler's copy, which this call steps."
            ),
        ]

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        device, config = components._execution_device, components.transformer.config
        if config.get("class_token_dim") is not None:
            raise ValueError("these blocks denoise latents alone: use ERWPipeline for a model with a class token")
        shape = (len(block_state.labels), config.in_channels, config.sample_size, config.sample_size)
        _check_output(block_state.output_type, components.transformer, components.vae)
        _check_noise(block_state.generator, block_state.latents, shape)
        _check_scheduler(components.scheduler, components.transformer)
        if components.vae is not None:
            _check_vae(components.vae, config.in_channels)
        if block_state.latents is None:
            block_state.latents = randn_tensor(shape, block_state.generator, device=device, dtype=torch.float32)
        else:
            block_state.latents = block_state.latents.to(device, torch.float32)
        steps = _positive("num_inference_steps", block_state.num_inference_steps)
        block_state.stepper = scheduler = copy.deepcopy(components.scheduler)
        _set_timesteps(scheduler, steps, device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        block_state.timesteps = scheduler.timesteps
        self.set_block_state(state, block_state)
        return components, state


class ERWLoopDenoiser(ModularPipelineBlocks):
    model_name = "erw"

    @property
    def description(self) -> str:
        return "Within the loop: the velocity, guided as the guider says."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        guider = ComponentSpec(
            "guider",
            ClassifierFreeGuidance,
            config=FrozenDict({"guidance_scale": 1.8}),
            default_creation_method="from_config",
        )
        return [guider, ComponentSpec("transformer", AutoModel), ComponentSpec("scheduler", SchedulerMixin)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor, description="Latents (B, C, H, W)."),
            InputParam("labels", required=True, type_hint=torch.Tensor, description="Labels (B,)."),
            InputParam("null_labels", required=True, type_hint=torch.Tensor, description="The null class (B,)."),
            InputParam("timesteps", required=True, type_hint=torch.Tensor, description="Times of the scheduler."),
            InputParam("stepper", required=True, type_hint=SchedulerMixin, description="The scheduler of this call."),
        ]

    @torch.no_grad()
    def __call__(self, components, block_state, i: int, t: torch.Tensor):
        transformer, guider = components.transformer, block_state.guider
        if t.is_floating_point():  # in Python's floats: not every device has float64
            time = float(t) / block_state.stepper.config.num_train_timesteps
        else:  # rounded from these
            time = float(block_state.stepper.sigmas[i])
        guider.set_state(step=i, num_inference_steps=len(block_state.timesteps), timestep=t)
        batches = guider.prepare_inputs({"class_labels": (block_state.labels, block_state.null_labels)})
        for batch in batches:
            guider.prepare_models(transformer)
            try:
                with transformer.cache_context(getattr(batch, guider._identifier_key)):
                    batch.noise_pred = transformer(
                        block_state.latents.to(transformer.dtype),
                        timestep=torch.full((len(batch.class_labels),), time, device=block_state.latents.device),
                        class_labels=batch.class_labels,
                        force_drop_ids=torch.zeros_like(batch.class_labels),
                        return_dict=False,
                    )[0].float()
            finally:
                guider.cleanup_models(transformer)
        block_state.velocity = guider(batches).pred
        return components, block_state


class ERWLoopStep(ModularPipelineBlocks):
    model_name = "erw"

    @property
    def description(self) -> str:
        return "Within the loop: the scheduler's step."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("scheduler", SchedulerMixin)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("generator", description="A generator, or a list of one per image."),
            InputParam("stepper", required=True, type_hint=SchedulerMixin, description="The scheduler of this call."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor, description="Latents (B, C, H, W).")]

    @torch.no_grad()
    def __call__(self, components, block_state, i: int, t: torch.Tensor):
        step = block_state.stepper.step
        kwargs = {"generator": block_state.generator} if "generator" in inspect.signature(step).parameters else {}
        block_state.latents = step(block_state.velocity, t, block_state.latents, **kwargs, return_dict=False)[0]
        return components, block_state


class ERWDenoiseStep(LoopSequentialPipelineBlocks):
    model_name = "erw"
    block_classes = [ERWLoopDenoiser, ERWLoopStep]
    block_names = ["denoiser", "step"]

    @property
    def description(self) -> str:
        return "Goes from noise to latents, one scheduler time after the other."

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [InputParam("timesteps", required=True, type_hint=torch.Tensor, description="Times of the scheduler.")]

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        if components.guider is None:
            raise ValueError("the blocks need a guider; for none, ClassifierFreeGuidance(guidance_scale=1)")
        block_state.guider = copy.deepcopy(components.guider)  # a call has its own step and momentum
        transformer = components.transformer
        hooks = type(block_state.guider).prepare_models is not BaseGuidance.prepare_models
        with _ONE_AT_A_TIME if hooks or _holds_state(transformer) else contextlib.nullcontext():
            try:
                with self.progress_bar(total=len(block_state.timesteps)) as progress_bar:
                    for i, t in enumerate(block_state.timesteps):
                        components, block_state = self.loop_step(components, block_state, i=i, t=t)
                        progress_bar.update()
            finally:
                if transformer.is_cache_enabled:
                    transformer._reset_stateful_cache()
        self.set_block_state(state, block_state)
        return components, state


class ERWDecodeStep(ModularPipelineBlocks):
    model_name = "erw"

    @property
    def description(self) -> str:
        return "Decodes the latents; without a vae they are the pixels."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        processor = ComponentSpec(
            "image_processor",
            VaeImageProcessor,
            config=FrozenDict({"vae_scale_factor": 1}),
            default_creation_method="from_config",
        )
        return [ComponentSpec("transformer", AutoModel), ComponentSpec("vae", AutoModel), processor]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor, description="Latents (B, C, H, W)."),
            InputParam("output_type", default="pil", type_hint=str, description='"pil", "np", "pt" or "latent".'),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("images", description="The images.")]

    @torch.no_grad()
    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        images, vae = block_state.latents, components.vae
        if block_state.output_type != "latent":
            images = images * components.transformer.config.noise_scale
        if block_state.output_type != "latent" and vae is not None:
            with upcast(vae, images.device):
                images = vae.decode(unscale_latents(images, vae).to(vae.dtype), return_dict=False)[0].float()
            images = images * 2 - 1 if is_representation_autoencoder(vae) else images
        if not torch.isfinite(images).all():  # 8 bits would show it as black or white
            raise ValueError("an image holds NaN or infinity: the weights are broken, or the precision is too low")
        if block_state.output_type != "latent":
            images = components.image_processor.postprocess(images, output_type=block_state.output_type)
        block_state.images = images
        self.set_block_state(state, block_state)
        return components, state


class ERWBlocks(SequentialPipelineBlocks):
    model_name = "erw"
    block_classes = [ERWInputStep, ERWPrepareStep, ERWDenoiseStep, ERWDecodeStep]
    block_names = ["input", "prepare", "denoise", "decode"]

    @property
    def description(self) -> str:
        return "Class-conditional image generation with an ERWTransformer2DModel."

    @property
    def outputs(self) -> list[OutputParam]:
        return [OutputParam("images", description="The images.")]
