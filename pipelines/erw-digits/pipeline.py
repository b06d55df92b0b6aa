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
"""The class-conditional pipeline, in one file with absolute diffusers imports, so that it can travel in a Hub repo."""

import difflib
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import is_torch_xla_available, logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor


if is_torch_xla_available():
    import torch_xla.core.xla_model as xm

    XLA_AVAILABLE = True
else:
    XLA_AVAILABLE = False


logger = logging.get_logger(__name__)  # pylint: disable=invalid-name

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from erw_hf import ERWPipeline

        >>> pipe = ERWPipeline.from_pretrained("pipelines/erw-digits")
        >>> images = pipe(class_labels=["7", 3], num_inference_steps=50, generator=torch.manual_seed(0)).images
        >>> len(images)
        2

        ```
"""


class ERWPipeline(DiffusionPipeline):
    r"""
    Pipeline for class-conditional image generation with [`ERWTransformer2DModel`].

    Args:
        transformer ([`ERWTransformer2DModel`]): Predicts the velocity of the path from data (t = 0) to noise (t = 1).
        vae ([`AutoencoderKL`] or another diffusers autoencoder, *optional*):
            Decodes the latents. `None` for a model that works on pixels in [-1, 1].
        scheduler ([`FlowMatchEulerMaruyamaScheduler`], or any flow-matching scheduler of diffusers):
            Turns velocities into steps.
        id2label (`dict[int, str]`, *optional*):
            Names of the classes; several names of one class are separated by commas, as in ImageNet.
        guidance_transformer ([`ERWTransformer2DModel`], *optional*):
            A worse model of the same latents, smaller or trained for less time, that guides in place of the null class
            (autoguidance, arXiv 2406.02507).
    """

    model_cpu_offload_seq = "transformer->guidance_transformer->vae"
    _optional_components = ["vae", "guidance_transformer"]
    _callback_tensor_inputs = ["latents"]

    # diffusers compares annotations with the loaded config, where the keys of `id2label` are strings: no annotation.
    def __init__(self, transformer, vae, scheduler, id2label=None, guidance_transformer=None) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, guidance_transformer=guidance_transformer
        )
        # JSON turns the keys into strings, here as in a loaded config.
        id2label = {int(key): value for key, value in (id2label or {}).items()}
        self.register_to_config(id2label={str(key): value for key, value in id2label.items()} or None)
        self.labels, self._ambiguous_labels = _label_table(id2label)
        self.vae_scale_factor = self.vae_scale_factor_of(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        # An exported repo names the module files that it carries ("transformer_erw"). Where erw_hf is installed, its
        # own classes are meant, and no remote code is needed. In the copy that travels in the repo the root package
        # is `diffusers_modules`, which has no such table, and this changes nothing.
        package = sys.modules.get(cls.__module__.split(".")[0])
        modules = getattr(package, "_DIFFUSERS_COMPONENTS", {})
        config_dict = {
            name: [modules[value[1]], value[1]]
            if isinstance(value, (list, tuple)) and len(value) == 2 and value[1] in modules
            else value
            for name, value in config_dict.items()
        }
        return super().extract_init_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs) -> None:
        """
        Saves the pipeline so that it loads three ways, from a folder and from the Hub: by `ERWPipeline`; by
        `DiffusionPipeline` with `custom_pipeline` and `trust_remote_code=True` where erw_hf is not installed; and the
        transformer alone. The module files of our own classes travel with their weights.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Upload it too, as `push_to_hub` does, to the repo `repo_id`, by default the folder's name.
            kwargs: Arguments of [`~DiffusionPipeline.save_pretrained`], or of `push_to_hub` where that is asked for.
        """
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
            kwargs = {}
        super().save_pretrained(save_directory, **kwargs)
        index_path = Path(save_directory) / self.config_name
        index = json.loads(index_path.read_text(encoding="utf-8"))
        for name, component in self.components.items():
            own_class = type(getattr(component, "_orig_mod", component))  # compiled models are wrapped
            if component is None or own_class.__module__.split(".")[0] in ("diffusers", "transformers"):
                continue
            source = Path(str(inspect.getsourcefile(own_class)))
            shutil.copyfile(source, Path(save_directory) / name / source.name)
            index[name] = [source.stem, own_class.__name__]
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in (index_path, *Path(save_directory).glob("*/*config.json")):
            config = json.loads(path.read_text(encoding="utf-8"))
            # A Hub id tells others where it came from; a path means nothing to them and names our folders.
            name = config.get("_name_or_path") or ""
            if name and (os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)):
                del config["_name_or_path"]
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copyfile(str(inspect.getsourcefile(type(self))), Path(save_directory) / "pipeline.py")

    @staticmethod
    def vae_scale_factor_of(vae) -> int:
        """
        Args:
            vae (a diffusers autoencoder, *optional*): `None` stands for pixel space.

        Returns:
            `int`: Pixels per latent cell along one side.
        """
        if vae is None:
            return 1
        if getattr(vae, "spatial_compression_ratio", None) is not None:  # AutoencoderDC
            return vae.spatial_compression_ratio
        if hasattr(vae.config, "encoder_patch_size"):  # AutoencoderRAE: a latent cell is a patch of its decoder
            return vae.config.patch_size
        return 2 ** (len(vae.config.block_out_channels) - 1)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """
        Maps class names to class ids.

        Args:
            label (`str` or `list[str]`): One or several names.

        Returns:
            `list[int]`: One id a name.

        Raises:
            ValueError: for a name that the model has not, with the nearest ones offered, or that two classes share.
        """
        names = [label] if isinstance(label, str) else list(label)
        ids = []
        for name in names:
            if name in self._ambiguous_labels:
                raise ValueError(f"{name!r} names the classes {self._ambiguous_labels[name]}: pass one of these ids")
            if name not in self.labels:
                if not self.labels:
                    raise ValueError(f"unknown class {name!r}: this pipeline has no class names, pass ids")
                lowered = {known.lower(): known for known in self.labels}
                nearest = [lowered[key] for key in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
                nearest = nearest or sorted(self.labels)[:3]
                raise ValueError(f"unknown class {name!r}; did you mean {' or '.join(map(repr, nearest))}?")
            ids.append(self.labels[name])
        return ids

    def check_inputs(
        self,
        class_labels,
        num_images_per_prompt: int,
        num_inference_steps: int,
        guidance_interval: tuple[float, float],
        generator,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raises on inputs that `__call__` cannot serve, before anything is computed."""
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found {unknown}"
            )
        for name, value in (
            ("num_images_per_prompt", num_images_per_prompt),
            ("num_inference_steps", num_inference_steps),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}")
        if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` must be (low, high) with 0 <= low <= high <= 1, got {guidance_interval!r}"
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type` must be "pil", "np", "pt" or "latent", got {output_type!r}')

        batch_size = len(class_labels) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"got {len(generator)} generators for {batch_size} images "
                f"({len(class_labels)} labels x {num_images_per_prompt} each)"
            )
        worse = self.guidance_transformer
        if worse is not None and worse.config.class_token_dim != self.transformer.config.class_token_dim:
            raise ValueError(
                f"the guidance_transformer has class_token_dim={worse.config.class_token_dim}, the transformer "
                f"{self.transformer.config.class_token_dim}: it must denoise the same class token"
            )
        shape = self._latents_shape(batch_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape {shape}, got {tuple(latents.shape)}")

    def _latents_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        return (batch_size, config.in_channels, config.sample_size, config.sample_size)

    def _class_ids(self, class_labels) -> list[int]:
        num_classes = self.transformer.config.num_classes
        if class_labels is None:
            return [num_classes]
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            if class_labels.ndim > 1 or not _is_integral(class_labels):
                raise ValueError("`class_labels` as a tensor must be a LongTensor of one dimension")
            class_labels = class_labels.reshape(-1).tolist()
        if isinstance(class_labels, (str, int, np.integer)):
            class_labels = [class_labels]
        if not isinstance(class_labels, (list, tuple)):
            raise ValueError(f"`class_labels` must be names or ids, got {type(class_labels).__name__}")
        if len(class_labels) == 0:
            raise ValueError("`class_labels` is empty")
        ids = []
        for label in class_labels:
            if isinstance(label, str):
                ids.extend(self.get_label_ids(label))
            elif isinstance(label, (int, np.integer)) and not isinstance(label, bool):
                # num_classes itself is the null class: unconditional samples.
                if not 0 <= label <= num_classes:
                    raise ValueError(f"class id {label} is not in [0, {num_classes - 1}] ({num_classes}: no class)")
                ids.append(int(label))
            else:
                raise ValueError(f"a class label must be a name or an id, got {label!r}")
        return ids

    def prepare_latents(
        self,
        batch_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The starting noise, float32 whatever the dtype of the model.

        Args:
            batch_size (`int`): Number of images.
            device (`torch.device`): Where the noise goes.
            generator (`torch.Generator` or a list of them, *optional*): Source of the noise; a list has one an image.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): Noise to use in place of a draw.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`: The noise.
        """
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        return randn_tensor(self._latents_shape(batch_size), generator=generator, device=device, dtype=torch.float32)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decodes latents into images.

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): Latents as the transformer sees them.

        Returns:
            `torch.Tensor` of shape `(B, channels, height, width)`: Images, nominally in [-1, 1].
        """
        if self.vae is None:
            return latents
        if type(self.vae).__name__ == "AutoencoderRAE":  # which scales latents itself, and has images in [0, 1]
            return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0] * 2 - 1
        config = self.vae.config
        scaling, shift = getattr(config, "scaling_factor", None) or 1.0, getattr(config, "shift_factor", None) or 0.0
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            mean = torch.as_tensor(mean, device=latents.device, dtype=latents.dtype).reshape(1, -1, 1, 1)
            std = torch.as_tensor(std, device=latents.device, dtype=latents.dtype).reshape(1, -1, 1, 1)
            latents = latents * std / scaling + mean
        else:
            latents = latents / scaling + shift
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]

    @staticmethod
    def _join(latents: torch.Tensor, class_token: torch.Tensor | None = None) -> torch.Tensor:
        # One row a sample holds both, so that one step of the scheduler and one draw serve both.
        return latents if class_token is None else torch.cat([latents.flatten(1), class_token], dim=1)

    def split_state(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Takes apart what the scheduler steps: with a class token, latents and class token are one row a sample.

        Args:
            state (`torch.Tensor` of shape `(B, C, H, W)` or `(B, C H W + class_token_dim)`): The scheduler's sample.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: latents `(B, C, H, W)` and class token `(B, class_token_dim)`,
            `None` for a model without one.
        """
        class_token_dim = self.transformer.config.class_token_dim
        if class_token_dim is None:
            return state, None
        latents, class_token = state[:, :-class_token_dim], state[:, -class_token_dim:]
        return latents.reshape(self._latents_shape(len(state))), class_token

    def _velocity(
        self, transformer, cache_context: str, state: torch.Tensor, time: float, labels: torch.Tensor
    ) -> torch.Tensor:
        """One model call in the model's dtype, with the time and the result, the state's velocity, in float32."""
        latents, class_token = self.split_state(state)
        with transformer.cache_context(cache_context):
            velocities = transformer(
                latents.to(transformer.dtype),
                timestep=torch.full((len(labels),), time, device=latents.device),
                class_labels=labels,
                force_drop_ids=torch.zeros_like(labels),  # a model left in training mode must not drop labels here
                class_token=None if class_token is None else class_token.to(transformer.dtype),
                attention_kwargs=self._attention_kwargs,
                return_dict=False,
            )
        return self._join(*(velocity.float() for velocity in velocities))

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running call; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of scheduler times in the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` from a callback to end the running call early."""
        return self._interrupt

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.8,
        guidance_interval: tuple[float, float] = (0.0, 0.7),
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["ERWPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        attention_kwargs: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generates images.

        Args:
            class_labels (`int`, `str`, a list of either, or `torch.LongTensor` of shape `(n,)`, *optional*):
                What to draw. Names are those of `pipe.labels`; id `num_classes` and `None` mean no class.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images for each label.
            num_inference_steps (`int`, *optional*, defaults to 250): Number of steps of the scheduler.
            guidance_scale (`float`, *optional*, defaults to 1.8):
                w of classifier-free guidance, `v_null + w (v_class - v_null)` (arXiv 2207.12598); 1 turns it off. With a
                `guidance_transformer`, its prediction takes the place of `v_null`.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.7)`):
                Flow times `low <= t <= high` at which guidance applies (arXiv 2404.07724). Outside of it only the
                conditional prediction is computed.
            generator (`torch.Generator` or a list of them, *optional*):
                Makes the result reproducible. A list holds one generator an image, and then an image does not depend
                on the batch that it is made in.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): Starting noise to use in place of a draw.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(B, H, W, C)` in [0, 1]), `"pt"` (`(B, C, H, W)` in [0, 1]) or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Return an [`~pipelines.ImagePipelineOutput`] in place of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, callback_kwargs)`; what it returns replaces
                the tensors of these names.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Names of the tensors that the callback gets.
            attention_kwargs (`dict`, *optional*): Passed to the transformer; `{"scale": s}` scales LoRA layers.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: the images, `num_images_per_prompt` of each label in turn.

        Raises:
            ValueError: for unknown names, ids out of range, and arguments that do not fit together.

        Examples:
        """
        # 1. Check what was asked for
        class_ids = self._class_ids(class_labels)
        self.check_inputs(
            class_ids,
            num_images_per_prompt,
            num_inference_steps,
            guidance_interval,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._interrupt = False
        self._attention_kwargs = attention_kwargs
        device = self._execution_device

        # 2. Labels and noise
        labels = torch.tensor(class_ids, device=device).repeat_interleave(num_images_per_prompt)  # (B,)
        null_labels = torch.full_like(labels, self.transformer.config.num_classes)
        state = self.prepare_latents(len(labels), device, generator, latents)
        if self.transformer.config.class_token_dim is not None:
            shape = (len(labels), self.transformer.config.class_token_dim)
            state = self._join(state, randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))

        # 3. Times
        set_timesteps_arguments = inspect.signature(self.scheduler.set_timesteps).parameters
        if "sigmas" in set_timesteps_arguments:
            # diffusers' flow-matching schedulers would end their grid at 1 / num_train_timesteps. SiT's goes evenly
            # from 1 to 0.
            sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        flow_times = (timesteps.double() / self.scheduler.config.num_train_timesteps).tolist()
        self._num_timesteps = len(timesteps)
        step_kwargs = (
            {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        )

        # 4. Denoise
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        low, high = guidance_interval
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                # The grid holds 0.7 as 0.69999998: a bound that names a grid point includes it.
                guide = self.guidance_scale != 1 and low - 1e-6 <= flow_times[i] <= high + 1e-6
                time = flow_times[i]
                if not guide:
                    velocity = self._velocity(self.transformer, "cond", state, time, labels)
                else:
                    if self.guidance_transformer is not None:
                        velocity = self._velocity(self.transformer, "cond", state, time, labels)
                        worse = self._velocity(self.guidance_transformer, "cond", state, time, labels)
                    else:
                        # Both predictions in one batch, for these models faster than two calls. The cache context is
                        # another than without guidance, since step caches hold tensors of the batch's size.
                        velocity, worse = self._velocity(
                            self.transformer,
                            "cond_uncond",
                            torch.cat([state, state]),
                            time,
                            torch.cat([labels, null_labels]),
                        ).chunk(2)
                    velocity = worse + self.guidance_scale * (velocity - worse)

                state = self.scheduler.step(velocity, t, state, **step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    latents, class_token = self.split_state(state)
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    state = self._join(callback_outputs.pop("latents", latents), class_token)

                progress_bar.update()
                if XLA_AVAILABLE:
                    xm.mark_step()

        # 5. Decode; the class token has done its work
        latents, _ = self.split_state(state)
        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents).float(), output_type=output_type)

        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)


def _is_integral(values: torch.Tensor | np.ndarray) -> bool:
    if isinstance(values, np.ndarray):
        return np.issubdtype(values.dtype, np.integer)
    return not values.is_floating_point() and values.dtype != torch.bool


def _label_table(id2label: dict[int, str]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Name -> id for every full label and every comma-separated synonym that means one class, and the others.

    ImageNet has two classes "crane" and two "maillot": a guess would draw the wrong one. A class's full label wins over
    a synonym of another class ("maillot" over "maillot, tank suit").
    """
    full = {label.strip(): class_id for class_id, label in id2label.items()}
    owners: dict[str, list[int]] = {}
    for class_id, label in id2label.items():
        for synonym in label.split(","):
            owners.setdefault(synonym.strip(), []).append(class_id)
    for label in list(full):
        same = [class_id for class_id, other in id2label.items() if other.strip() == label]
        owners[label] = same
    labels = {name: ids[0] for name, ids in sorted(owners.items()) if len(set(ids)) == 1}
    return labels, {name: sorted(set(ids)) for name, ids in owners.items() if len(set(ids)) > 1}
