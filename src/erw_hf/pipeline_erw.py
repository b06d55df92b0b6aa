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
"""The class-conditional pipeline, and the scaling of latents. One file with absolute diffusers imports, because it travels in
Hub repos."""

import contextlib
import copy
import difflib
import inspect
import json
import math
import operator
import os
import re
import shutil
import sys
import tempfile
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin  # diffusers.loaders has it only beside peft
from diffusers.models.modeling_utils import ModelMixin, _get_model_file
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import is_peft_available, is_torch_xla_available, logging, replace_example_docstring
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import is_offline_mode, upload_folder
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open


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

# diffusers' schedulers that step a velocity correctly, with the values of options with which they do not.
FLOW_MATCHING_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
FLOW_MATCHING_SPOILT_BY: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("invert_sigmas", "stochastic_sampling", "use_dynamic_shifting"), (True,)
)
# These need `use_flow_sigmas` and `prediction_type="flow_prediction"`, and then step along the linear path. DEIS and SA-Solver
# would, too, but leave the last step out: with 10 steps a tenth of the noise stays in the picture.
FLOW_SIGMA_SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
FLOW_SIGMAS_SPOILT_BY: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver", "sde-dpmsolver"),
    "final_sigmas_type": ("sigma_min",),  # noise stays, as above
    "predict_x0": (False,),
    **dict.fromkeys(
        (
            "thresholding", "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_karras_sigmas",
            "use_lu_lambdas",
        ),
        (True,),
    ),
}  # fmt: skip
UNIPC_SPOILT_BY = {"lower_order_final": (False,), "solver_type": ("bh1",)}


# Beside an adapter's weights: the embeddings of its new classes, and in the file's metadata their names.
CLASS_EMBEDDINGS = "class_embeddings.safetensors"
# The variant of a file of weights or of their index, if it has one.
_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(?:\.(?!safetensors|bin)([^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index(?:\.([^.]+))?\.json)?"
)
_LORA_KEY = re.compile(r"transformer\.(.+)\.lora_([AB])\.weight")


@dataclass(eq=False)
class _Call:
    """The state of one call."""

    guidance_scale: float = 1.0
    num_timesteps: int = 0
    interrupt: bool = False
    scheduler: Any = None
    timestep: Any = None


# diffusers executes this file anew, in the same module, for each pipeline that it loads as remote code: what calls share stays.
# The calls that run in this thread or task, the innermost last: a callback may draw with another pipeline.
_CALLS: ContextVar[tuple[tuple["ERWPipeline", _Call], ...]]
_CALLS = globals().get("_CALLS", ContextVar("erw_calls", default=()))

# Held while a call changes a model in a way that others must not see: step caches, offloading, LoRA scales, an upcast decoder.
_ONE_AT_A_TIME = globals().get("_ONE_AT_A_TIME", threading.RLock())


class ERWPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):
    r"""
    Pipeline for class-conditional image generation with [`ERWTransformer2DModel`].

    Args:
        transformer ([`ERWTransformer2DModel`]): Predicts the velocity of the path from data (t = 0) to noise (t = 1).
        vae ([`AutoencoderKL`] or another diffusers autoencoder, *optional*):
            Decodes the latents. `None` for a model that works on pixels in [-1, 1].
        scheduler ([`FlowMatchEulerMaruyamaScheduler`], or another flow-matching scheduler):
            Turns velocities into steps. Each call steps its own copy, so that threads can share a pipeline.
        id2label (`dict[int, str]`, *optional*):
            Names of the classes 0 to `num_classes - 1`; several names of one class are separated by commas, as in
            ImageNet.
        guidance_transformer ([`ERWTransformer2DModel`], *optional*):
            A weaker model of the same latents (smaller, or trained for less time) that replaces the null class in guidance
            (autoguidance, arXiv 2406.02507).

    Raises:
        ValueError: if the parts do not fit together, or the scheduler would not step a velocity.
    """

    model_cpu_offload_seq = "transformer->guidance_transformer->vae"
    _optional_components = ["vae", "guidance_transformer"]
    _callback_tensor_inputs = ["latents"]
    _source = Path(__file__).read_bytes()  # is saved; by then the file may be that of another pipeline's remote code

    # diffusers compares annotations with the loaded config, where the keys of `id2label` are strings: no annotation.
    def __init__(self, transformer, vae, scheduler, id2label=None, guidance_transformer=None) -> None:
        super().__init__()
        self._running: list[_Call] = []
        self._last_call = _Call()
        # Of each loaded adapter the names (None for a class without) and embeddings of its classes; what was there before.
        self._adapter_classes: dict[str, list[tuple[str | None, torch.Tensor]]] = {}
        self._own_classes: tuple[torch.Tensor, dict[str, str]] | None = None
        id2label = _checked_id2label(id2label)
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, guidance_transformer=guidance_transformer
        )
        # Strings, as JSON makes them in a loaded config.
        self.register_to_config(id2label={str(key): value for key, value in id2label.items()} or None)
        self.check_components()
        self.labels, self._ambiguous_labels = _label_table(id2label)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # diffusers does not notice what is put into an empty slot, and would save the pipeline without it.
        if value is not None and hasattr(self, "config") and self.config.get(name) == (None, None):
            self.register_modules(**{name: value})

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return self.vae_scale_factor_of(self.vae)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs) -> "ERWPipeline":
        """
        Loads a pipeline, as [`~DiffusionPipeline.from_pretrained`] does.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or the id of a Hub repo.
            kwargs: Arguments of [`~DiffusionPipeline.from_pretrained`].

        Returns:
            [`ERWPipeline`]: The pipeline.

        Raises:
            OSError: for a folder or a repo that does not exist.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if not os.path.exists(name) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):  # no id of a repo either
            raise OSError(f"there is no pipeline {name}: name a folder or a Hub repo")
        return super().from_pretrained(name, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "ERWPipeline":
        """
        Another pipeline of the same components, class names included. Nothing is copied or cast.

        Args:
            pipeline ([`ERWPipeline`]): Where the components come from.
            kwargs: Components and `id2label` that replace them; `dtype` casts the components, shared ones too.

        Returns:
            [`ERWPipeline`]: The new pipeline.
        """
        # diffusers' own passes on no component that `__init__` leaves unannotated, and casts shared ones to float32.
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        new = cls(**{**pipeline.components, "id2label": pipeline.config.get("id2label"), **kwargs})
        # With its adapters. By attribute: of remote code there may be several classes ERWPipeline.
        if hasattr(pipeline, "_own_classes") and new.transformer is pipeline.transformer:
            new._adapter_classes, new._own_classes = dict(pipeline._adapter_classes), pipeline._own_classes
            new._merged_adapters = set(pipeline._merged_adapters)
        if pipeline.config.get("_name_or_path"):
            new.register_to_config(_name_or_path=pipeline.config._name_or_path)
        return new if dtype is None else new.to(dtype=dtype)

    def check_components(self) -> None:
        """
        Checks that the parts fit together. Called when a pipeline is built and again at each call.

        Raises:
            ValueError: if they do not.
        """
        for name in ("transformer", "guidance_transformer", "vae"):
            component = getattr(self, name)
            if component is not None and (isinstance(component, type) or not hasattr(component, "config")):
                raise ValueError(
                    f"the {name} is a {type(component).__name__}, not a diffusers model"
                    + ("; pass its `.module`" if hasattr(component, "module") else "")
                )
        if self.scheduler is not None:
            _check_scheduler(self.scheduler, self.transformer, self.guidance_transformer)
        if self.transformer is None:
            return
        config = self.transformer.config
        if "num_classes" not in config or "sample_size" not in config:
            raise ValueError(f"the transformer is a {_kind(self.transformer)}, not an ERWTransformer2DModel")
        ids = [int(key) for key in self.config.get("id2label") or {}]
        beyond = [class_id for class_id in ids if not 0 <= class_id < config.num_classes]
        if beyond:
            raise ValueError(
                f"id2label names the class {beyond[0]}, but the transformer has num_classes={config.num_classes}: ids "
                f"run from 0 to {config.num_classes - 1}"
                + (
                    ". Another pipeline took away an adapter's classes: unload_lora_weights() here, too"
                    if self._own_classes
                    else ""
                )
            )
        if self.vae is not None:
            _check_vae(self.vae, config.in_channels)
        if self.guidance_transformer is not None:
            for key in ("num_classes", "sample_size", "in_channels", "class_token_dim", "noise_scale"):
                worse = self.guidance_transformer.config.get(key)
                if worse != config.get(key):
                    raise ValueError(
                        f"the guidance_transformer has {key}={worse}, the transformer {config.get(key)}: it must predict "
                        "the same latents of the same classes"
                    )

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict, adapter_name: str | None = None, hotswap: bool = False, **kwargs
    ) -> None:
        """
        Loads a LoRA adapter, and the classes that it was trained on beside those of this pipeline: they get the next free ids,
        and are drawn by name.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A folder or Hub repo with safetensors files, such a file, or a state dict.
            adapter_name (`str`, *optional*): `"default_N"` by default.
            hotswap (`bool`, *optional*, defaults to `False`): Replace the adapter of that name, which has the same shapes.
            kwargs: As in other diffusers pipelines: `weight_name`, `subfolder`, `revision`, `token` ...

        Raises:
            ImportError: without peft.
            ValueError: before anything changes, for a file that is pickled, damaged or made for another model.
        """
        if not is_peft_available():
            raise ImportError("LoRA adapters need peft: pip install peft")
        self._check_switchable()
        if _is_on_disk(self.transformer):
            raise ValueError("the transformer is offloaded to a disk: load adapters before enable_group_offload()")
        is_cast = any(name == "layerwise_casting" for name, _ in _hooks(self.transformer))
        if is_cast and not getattr(self.transformer, "peft_config", None):
            raise ValueError("layers are stored in another precision: load adapters before enable_layerwise_casting()")
        if adapter_name is not None and (not adapter_name or "." in adapter_name):
            raise ValueError(f"adapter_name={adapter_name!r} must be a name without a dot")
        where = pretrained_model_name_or_path_or_dict
        is_id = isinstance(where, dict) or re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(where))
        if not is_id and not os.path.exists(where):
            raise ValueError(f"there is no adapter {where}: name a folder, a safetensors file or a Hub repo")
        name = kwargs.get("weight_name") or where
        is_file = not isinstance(name, dict) and (kwargs.get("weight_name") or os.path.isfile(name))
        if is_file and not str(name).endswith(".safetensors"):
            raise ValueError(
                f"{name} is refused: LoRA weights are read from safetensors files alone, which hold no code"
            )
        kwargs["use_safetensors"] = True
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        try:
            state, metadata = self.lora_state_dict(
                pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
            )
        except (SafetensorError, ValueError) as error:  # of a header, of the metadata
            raise ValueError(f"{pretrained_model_name_or_path_or_dict} cannot be read: {error}") from error
        metadata = _check_lora(state, metadata, self.transformer)
        classes = self._read_classes(pretrained_model_name_or_path_or_dict, kwargs)
        if self.guidance_transformer is not None and classes:
            raise ValueError(
                "the adapter has classes that the guidance_transformer does not know: load it without one"
            )
        self._check_switchable(bool(classes))
        before = set(getattr(self.transformer, "peft_config", {}))
        with _ONE_AT_A_TIME:  # peft replaces torch's `register_parameter` meanwhile, for all threads
            self.load_lora_into_transformer(
                state,
                self.transformer,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
            )
        for loaded in (set(self.transformer.peft_config) - before) or {adapter_name}:
            self._adapter_classes[loaded] = classes
        self._put_classes()

    def unload_lora_weights(self) -> None:
        """Takes all adapters away, with their classes; those of fused adapters stay."""
        self._check_switchable()
        super().unload_lora_weights()
        self._adapter_classes = {name: own for name, own in self._adapter_classes.items() if name in self.fused_loras}
        self._put_classes()
        self._adapter_classes, self._own_classes = {}, None
        self._merged_adapters: set[str] = set()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """
        Takes adapters away, with their classes.

        Args:
            adapter_names (`str` or `list[str]`): Which.
        """
        self._check_switchable()
        super().delete_adapters(adapter_names)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._adapter_classes.pop(name, None)
        self._put_classes()

    def set_adapters(self, *args, **kwargs) -> None:
        """As in other diffusers pipelines. Classes that several adapters know are drawn as the active ones learned them."""
        self._check_switchable()
        super().set_adapters(*args, **kwargs)
        self._put_classes()

    def disable_lora(self) -> None:
        """As in other diffusers pipelines. The model's own classes are drawn as they were, those of adapters can still be named."""
        self._check_switchable()
        super().disable_lora()
        self._put_classes()

    def enable_lora(self) -> None:
        """As in other diffusers pipelines."""
        self._check_switchable()
        super().enable_lora()
        self._put_classes()

    def fuse_lora(self, *args, **kwargs) -> None:
        """As in other diffusers pipelines. The classes of fused adapters are drawn as these learned them."""
        self._check_switchable()
        super().fuse_lora(*args, **kwargs)
        self._put_classes()

    def unfuse_lora(self, *args, **kwargs) -> None:
        """As in other diffusers pipelines."""
        self._check_switchable()
        super().unfuse_lora(*args, **kwargs)
        self._put_classes()

    def _check_switchable(self, has_classes: bool = False) -> None:
        """Raises ValueError where adapters or their classes would be changed in part or not at all."""
        if not isinstance(self.transformer, ModelMixin):
            raise ValueError(
                "the transformer is wrapped, by torch.compile for instance, and diffusers does not reach adapters in it: compile "
                "it in place, pipe.transformer.compile()"
            )
        table = self.transformer.time_class_embed.class_embedder.weight
        if table.is_meta and (has_classes or self._own_classes is not None):
            raise ValueError(
                "the class embeddings are offloaded, so an adapter's classes cannot be put beside them: load and set adapters "
                "before enable_sequential_cpu_offload()"
            )

    def _read_classes(self, adapter, kwargs: dict[str, Any]) -> list[tuple[str | None, torch.Tensor]]:
        """Names and embeddings of the classes that come with an adapter."""
        if isinstance(adapter, dict):
            return []
        folder = os.path.dirname(adapter) or "." if os.path.isfile(adapter) else adapter
        where = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
        try:
            file = _get_model_file(
                folder, weights_name=CLASS_EMBEDDINGS, **{k: kwargs[k] for k in where if k in kwargs}
            )
        except OSError as error:
            cause = error.__cause__ or error.__context__
            if isinstance(
                cause, LocalEntryNotFoundError
            ):  # not in the cache, and the Hub was not asked or not reached
                has_none = bool(kwargs.get("local_files_only")) or is_offline_mode()
            else:
                has_none = isinstance(cause, EntryNotFoundError)
            if os.path.isdir(folder) or has_none:
                return []
            raise  # of a network that failed, the classes would be lost in silence
        width = self.transformer.time_class_embed.class_embedder.weight.shape[1]
        try:
            with safe_open(file, "pt") as opened:
                table = opened.get_tensor("class_embeddings")
                names = json.loads((opened.metadata() or {}).get("names", "null"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as embeddings of classes: {error}") from error
        if table.ndim != 2 or table.shape[1] != width or not table.is_floating_point() or not table.isfinite().all():
            raise ValueError(
                f"{file} holds {tuple(table.shape)} {table.dtype}, not finite class embeddings of this model's width {width}"
            )
        if names is None:
            return [(None, row) for row in table]
        well_named = isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)
        if not well_named or len(names) != len(table) or len(set(names)) != len(names):
            raise ValueError(f"{file} does not name each of its {len(table)} classes, by a name of its own")
        return list(zip(map(_composed, names), table, strict=True))

    def _put_classes(self) -> None:
        """Puts the classes of the loaded adapters behind the model's own; of one name, the active adapter that was loaded last
        counts."""
        if self._own_classes is None:
            if not any(self._adapter_classes.values()):
                return
            own = self.transformer.time_class_embed.class_embedder.weight.detach().clone()
            self._own_classes = own, dict(self.config.get("id2label") or {})
        table, id2label = self._own_classes
        rows, id2label = list(table[:-1]), dict(id2label)
        ids = {label: int(class_id) for class_id, label in id2label.items()}
        layers = [module for module in self.transformer.modules() if hasattr(module, "disable_adapters")]  # peft's
        active = {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
        for adapter, classes in self._adapter_classes.items():
            for name, embedding in classes:
                class_id = len(rows) if name is None else ids.setdefault(name, len(rows))
                if class_id == len(rows) or adapter in active or adapter in self.fused_loras:
                    rows[class_id : class_id + 1] = [embedding.to(table)]
                if name is not None:
                    id2label[str(class_id)] = name
        self.transformer.set_class_table(torch.stack([*rows, table[-1]]))
        self.register_to_config(id2label=id2label or None)
        self.labels, self._ambiguous_labels = _label_table(_checked_id2label(id2label or None))

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
        transformer alone. The module files of our own classes travel with their weights. Of an earlier pipeline in the
        folder only the weights of other variants stay, and those only if this one is saved as a `variant`.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Also upload it, as `push_to_hub` does, to the repo `repo_id` (default: the folder's name).
            kwargs: Arguments of [`~DiffusionPipeline.save_pretrained`], or of `push_to_hub` if that is set.

        Raises:
            ValueError: before anything is written, for pipelines that would not load again (adapters, wrapped models, several
                `.bin` files), and for classes of your own, since their file would be published.
        """
        self._check_saveable()
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file: name a folder")
        variant = kwargs.get("variant")
        if variant is not None and not re.fullmatch(r"[\w-]+", str(variant)):
            raise ValueError(f'`variant` is a part of file names, such as "fp16", got {variant!r}')
        repo_id = kwargs.pop("repo_id", folder.absolute().name) if push_to_hub else ""
        pushed_with = {name: value for name, value in kwargs.items() if name != "max_shard_size"}
        if push_to_hub:
            own = inspect.signature(DiffusionPipeline.save_pretrained).parameters
            kwargs = {name: value for name, value in kwargs.items() if name in own}
        folder.mkdir(parents=True, exist_ok=True)
        # Written beside the folder, then moved: until then the old files stay, and the weights may be memory-mapped
        # from them.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
            written = Path(name)
            super().save_pretrained(written, **kwargs)
            if any(written.glob("*/*.bin.index*.json")):
                raise ValueError(
                    "diffusers loads weights in several files from safetensors only: omit safe_serialization=False, or "
                    "set a larger max_shard_size"
                )
            self._make_portable(written)
            _replace(folder, written, kwargs.get("variant"))
        if push_to_hub:  # last: a push that fails must not cost the folder
            self.push_to_hub(repo_id, **pushed_with)

    def push_to_hub(self, repo_id: str, *args, **kwargs) -> str:
        """
        Uploads what [`~ERWPipeline.save_pretrained`] writes.

        Args:
            repo_id (`str`): Repo to push to; it is created if it does not exist.
            args: Further arguments of [`~utils.PushToHubMixin.push_to_hub`].
            kwargs: The same.

        Returns:
            `str`: Address of the upload.

        Raises:
            ValueError: before the repo is created, for what `save_pretrained` refuses.
        """
        self._check_saveable()
        return super().push_to_hub(repo_id, *args, **kwargs)

    def _upload_folder(
        self, working_dir, repo_id, token=None, commit_message=None, create_pr=False, subfolder=None
    ) -> str:
        """As diffusers', which would leave other weights of the repo beside the new ones, and they would be loaded."""
        stale = []
        for folder in (path for path in Path(working_dir).iterdir() if path.is_dir()):
            variant = next((of for path in folder.iterdir() if (of := _variant_of(path.name))), None)
            stale.append(f"{folder.name}/diffusion_pytorch_model*" + f".{variant}[.-]*" * (variant is not None))
        return upload_folder(
            repo_id=repo_id,
            folder_path=working_dir,
            path_in_repo=subfolder,
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
            delete_patterns=stale,
        )

    def _check_saveable(self) -> None:
        if not _may_be_copied(type(self)):
            raise ValueError(
                f"{_described(type(self))} is your own pipeline: saving it would publish that file. Save the components "
                "by `ERWPipeline.from_pipe(pipe).save_pretrained(...)`"
            )
        for name, component in self.components.items():
            if component is None and name not in self._optional_components:
                raise ValueError(f"a pipeline without a {name} would not load again: set `pipe.{name}`")
            if component is None:
                continue
            component = getattr(component, "_orig_mod", component)  # compiled models are wrapped
            if not isinstance(component, (ModelMixin, SchedulerMixin)):
                wrapped = (
                    ": it wraps the model that loads again, so unwrap it first" if hasattr(component, "module") else ""
                )
                if hasattr(component, "merge_and_unload"):
                    wrapped = f": merge it first, `pipe.{name} = pipe.{name}.merge_and_unload()`"
                raise ValueError(f"the {name} is a {type(component).__name__}, which does not load again{wrapped}")
            if type(component).__module__.split(".")[0] != "diffusers" and not _may_be_copied(type(component)):
                raise ValueError(
                    f"the {name} is of {_described(type(component))}: saving it would publish that file, and run it "
                    "where the pipeline is loaded. Use a class of erw_hf or of diffusers before saving"
                )
            if isinstance(component, ModelMixin) and getattr(component, "hf_quantizer", None) is None:
                _check_loads_again(name, component)

    def _make_portable(self, folder: Path) -> None:
        """Adds the module files of our own classes to a folder that diffusers wrote, and drops paths of this machine."""
        index_path = folder / self.config_name
        index = json.loads(index_path.read_text(encoding="utf-8"))
        for name, component in self.components.items():
            own_class = type(getattr(component, "_orig_mod", component))
            if component is None or own_class.__module__.split(".")[0] == "diffusers":
                continue
            source = Path(str(inspect.getsourcefile(own_class)))
            for file in map(Path, get_relative_import_files(source)):
                shutil.copyfile(file, folder / name / file.name)
            (folder / name / source.name).write_bytes(_source_of(own_class))
            index[name] = [source.stem, own_class.__name__]
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in (index_path, *folder.glob("*/*config.json")):
            config = json.loads(path.read_text(encoding="utf-8"))
            # A Hub id tells others where it came from; a path is useless to them and reveals local folders.
            name = config.get("_name_or_path") or ""
            if name and (os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)):
                del config["_name_or_path"]
                path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / "pipeline.py").write_bytes(_source_of(type(self)))

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
            `list[int]`: One id per name.

        Raises:
            ValueError: for an unknown name (the message suggests the nearest ones), or a name that two classes share.
        """
        names = [label] if isinstance(label, str) else list(label)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"class names are strings, got {label!r}; ids need no table")
        ids = []
        for name in map(_composed, names):
            if name in self._ambiguous_labels:
                raise ValueError(f"{name!r} names the classes {self._ambiguous_labels[name]}: pass one of these ids")
            if name not in self.labels:
                if not self.labels:
                    raise ValueError(
                        f"unknown class {name!r}: this pipeline has no class names. Pass ids, or build it with id2label; "
                        "`pipe.components` lacks that, `ERWPipeline.from_pipe(pipe)` keeps it"
                    )
                lowered = {known.lower(): known for known in self.labels}
                nearest = [lowered[key] for key in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
                nearest = nearest or sorted(self.labels)[:3]
                raise ValueError(f"unknown class {name!r}; did you mean {' or '.join(map(repr, nearest))}?")
            ids.append(self.labels[name])
        return ids

    def check_inputs(
        self,
        class_labels: list[int],
        num_images_per_prompt: int,
        guidance_interval: tuple[float, float],
        generator,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs: Sequence[str],
        attention_kwargs: dict[str, Any] | None,
    ) -> None:
        """Raises on invalid inputs of `__call__`, before anything is computed."""
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be a function, got {_kind(callback_on_step_end)}")
        names = callback_on_step_end_tensor_inputs
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` must be a list of names, got {_kind(names)}")
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found {unknown}"
            )
        low, high = guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"`guidance_interval` must be (low, high) with 0 <= low <= high <= 1, got {guidance_interval!r}"
            )
        _check_output(output_type, self.transformer, self.vae)
        if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
            raise ValueError(f"`attention_kwargs` must be a dict, got {_kind(attention_kwargs)}")
        if set(attention_kwargs or {}) - {"scale"}:
            raise ValueError(f"`attention_kwargs` takes 'scale' alone, got {attention_kwargs}")
        if attention_kwargs is not None and "scale" in attention_kwargs:
            _number("attention_kwargs['scale']", attention_kwargs["scale"])

        _check_noise(generator, latents, self._latents_shape(len(class_labels) * num_images_per_prompt))

    def _latents_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        return (batch_size, config.in_channels, config.sample_size, config.sample_size)

    def _class_ids(self, class_labels) -> list[int]:
        num_classes = self.transformer.config.num_classes
        if class_labels is None:
            return [num_classes]
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            if class_labels.ndim > 1 or not _is_ids_or_names(class_labels):
                raise ValueError("`class_labels` as a tensor must be a LongTensor of one dimension")
            class_labels = class_labels.reshape(-1).tolist()
        if isinstance(class_labels, str) or _as_integer(class_labels) is not None:
            class_labels = [class_labels]
        if not isinstance(class_labels, Sequence) or isinstance(class_labels, bytes):
            raise ValueError(f"`class_labels` must be names or ids, got {_kind(class_labels)}")
        if len(class_labels) == 0:
            raise ValueError("`class_labels` is empty")
        ids = []
        for label in class_labels:
            class_id = _as_integer(label)
            if isinstance(label, str):
                ids.extend(self.get_label_ids(label))
            elif class_id is None:
                raise ValueError(f"a class label must be a name or an id, got {label!r} ({_kind(label)})")
            elif not 0 <= class_id <= num_classes:  # num_classes itself is the null class: unconditional samples
                raise ValueError(f"class id {class_id} is not in [0, {num_classes - 1}] ({num_classes}: no class)")
            else:
                ids.append(class_id)
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
            generator (`torch.Generator` or a list of them, *optional*): Source of the noise; a list has one per image.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): Noise instead of a draw.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`: The noise.
        """
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        return randn_tensor(self._latents_shape(batch_size), generator=generator, device=device, dtype=torch.float32)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Decodes latents into images.

        Args:
            latents (`torch.Tensor` of shape `(B, C, H, W)`): Latents as the transformer sees them.

        Returns:
            `torch.Tensor` of shape `(B, channels, height, width)`: Images, nominally in [-1, 1].
        """
        _check_output("pt", self.transformer, self.vae)
        latents = latents * self.transformer.config.noise_scale
        if self.vae is None:
            return latents
        with upcast(self.vae, latents.device):
            return self._decode(latents)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = self.vae.decode(unscale_latents(latents, self.vae).to(self.vae.dtype), return_dict=False)[0]
        return images * 2 - 1 if is_representation_autoencoder(self.vae) else images

    @staticmethod
    def _join(latents: torch.Tensor, class_token: torch.Tensor | None = None) -> torch.Tensor:
        # One row per sample holds both, so that one scheduler step and one draw cover both.
        return latents if class_token is None else torch.cat([latents.flatten(1), class_token], dim=1)

    def split_state(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Splits the scheduler's state: with a class token, latents and class token form one row per sample.

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
        self,
        transformer,
        cache_context: str,
        state: torch.Tensor,
        time: float,
        labels: torch.Tensor,
        attention_kwargs: dict[str, Any] | None,
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
                attention_kwargs=attention_kwargs,
                return_dict=False,
            )
        return self._join(*(velocity.float() for velocity in velocities))

    # The properties below belong to the call that runs in this thread, so that callbacks see and change their own call. Outside
    # a call they have the values that the last one left.

    @property
    def _call(self) -> _Call:
        return next((call for pipe, call in reversed(_CALLS.get()) if pipe is self), self._last_call)

    def _get_scheduler(self):
        return self._call.scheduler or self.__dict__["scheduler"]

    def _set_scheduler(self, scheduler) -> None:
        self.__dict__["scheduler"] = scheduler

    scheduler = property(_get_scheduler, _set_scheduler, doc="In a callback, the copy that its call steps.")

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, guidance_scale: float) -> None:
        self._call.guidance_scale = guidance_scale

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the running call; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of scheduler times in the running call."""
        return self._call.num_timesteps

    @property
    def current_timestep(self) -> Any:
        """The scheduler's time in the running call, which diffusers' step caches ask for."""
        return self._call.timestep

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool) -> None:
        call = self._call
        for one in list(self._running) if call is self._last_call else [call]:
            one.interrupt = interrupt

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to end its call early, or from another thread to end all running calls."""
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
                Classes to draw. Names are those of `pipe.labels`; id `num_classes` and `None` mean no class.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images for each label.
            num_inference_steps (`int`, *optional*, defaults to 250): Number of steps of the scheduler.
            guidance_scale (`float`, *optional*, defaults to 1.8):
                w of classifier-free guidance, `v_null + w (v_class - v_null)` (arXiv 2207.12598); 1 turns it off. With a
                `guidance_transformer`, its prediction replaces `v_null`.
            guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.7)`):
                Flow times `low <= t <= high` at which guidance applies (arXiv 2404.07724). Outside of it only the
                conditional prediction is computed.
            generator (`torch.Generator` or a list of them, *optional*):
                Makes the result reproducible. With a list of one generator per image, an image does not depend on the rest
                of its batch.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): Starting noise instead of a draw.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (`(B, H, W, C)` in [0, 1]), `"pt"` (`(B, C, H, W)` in [0, 1]) or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Return an [`~pipelines.ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, callback_kwargs)`; the dict that it may return
                replaces the tensors of these names. `pipe.guidance_scale`, `pipe.num_timesteps` and `pipe.scheduler`
                are those of this call, and `pipe._interrupt = True` ends it.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Names of the tensors that the callback gets.
            attention_kwargs (`dict`, *optional*): Passed to the transformer; `{"scale": s}` scales LoRA layers.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: the images, `num_images_per_prompt` of each label in turn.

        Raises:
            ValueError: for unknown names, ids out of range, arguments and components that do not fit together, and
                images with NaN or infinity.

        Examples:
        """
        # 1. Check the inputs
        for name in ("transformer", "scheduler"):
            if self.components[name] is None:
                raise ValueError(f"this pipeline was built without a {name}: set `pipe.{name}`")
        self.check_components()
        # One of diffusers' own callbacks says itself what it takes.
        wanted = getattr(callback_on_step_end, "tensor_inputs", None)
        callback_on_step_end_tensor_inputs = wanted or callback_on_step_end_tensor_inputs
        class_ids = self._class_ids(class_labels)
        num_images_per_prompt = _positive("num_images_per_prompt", num_images_per_prompt)
        num_inference_steps = _positive("num_inference_steps", num_inference_steps)
        guidance_scale = _number("guidance_scale", guidance_scale)
        guidance_interval = _interval(guidance_interval)
        generator = list(generator) if isinstance(generator, tuple) else generator
        self.check_inputs(
            class_ids,
            num_images_per_prompt,
            guidance_interval,
            generator,
            latents,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            attention_kwargs,
        )

        config = self.transformer.config
        if (
            guidance_scale != 1
            and self.guidance_transformer is None
            and config.num_classes
            and config.class_dropout_prob == 0
        ):
            warnings.warn(  # once, where a logger would at each call
                "the transformer has class_dropout_prob=0: unless its null class was trained before, guidance spoils the "
                "pictures; pass guidance_scale=1",
                stacklevel=2,
            )
        if guidance_scale < 1:
            warnings.warn(
                f"guidance_scale={guidance_scale:g} goes towards the pictures of no class, which 0 draws; 1 turns guidance off",
                stacklevel=2,
            )
        call = _Call(guidance_scale, scheduler=copy.deepcopy(self.__dict__["scheduler"]))
        with self._running_call(call):
            device = self._execution_device

            # 2. Labels and noise
            labels = torch.tensor(class_ids, device=device).repeat_interleave(num_images_per_prompt)  # (B,)
            null_labels = torch.full_like(labels, self.transformer.config.num_classes)
            state = self.prepare_latents(len(labels), device, generator, latents)
            if self.transformer.config.class_token_dim is not None:
                shape = (len(labels), self.transformer.config.class_token_dim)
                state = self._join(state, randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))

            # 3. Times
            scheduler = call.scheduler
            _set_timesteps(scheduler, num_inference_steps, device)
            timesteps = scheduler.timesteps
            flow_times = _flow_times(scheduler)
            call.num_timesteps = len(timesteps)
            step_kwargs = (
                {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
            )

            # 4. Denoise
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            low, high = guidance_interval
            # Between the null class and itself there is no direction.
            can_guide = self.guidance_transformer is not None or any(c != config.num_classes for c in class_ids)
            with self.progress_bar(total=len(timesteps)) as progress_bar:
                for i, t in enumerate(timesteps):
                    call.timestep = t
                    if call.interrupt:
                        break
                    # The grid holds 0.7 as 0.69999998: a bound that names a grid point includes it.
                    guide = call.guidance_scale != 1 and can_guide and low - 1e-6 <= flow_times[i] <= high + 1e-6
                    time = flow_times[i]
                    if not guide:
                        velocity = self._velocity(self.transformer, "cond", state, time, labels, attention_kwargs)
                    else:
                        if self.guidance_transformer is not None:
                            velocity = self._velocity(self.transformer, "cond", state, time, labels, attention_kwargs)
                            worse = self._velocity(
                                self.guidance_transformer, "cond", state, time, labels, attention_kwargs
                            )
                        else:
                            # Both predictions in one batch: for these models faster than two calls. The cache context
                            # is another than without guidance, since step caches hold tensors of the batch's size.
                            velocity, worse = self._velocity(
                                self.transformer,
                                "cond_uncond",
                                torch.cat([state, state]),
                                time,
                                torch.cat([labels, null_labels]),
                                attention_kwargs,
                            ).chunk(2)
                        velocity = worse + call.guidance_scale * (velocity - worse)

                    state = scheduler.step(velocity, t, state, **step_kwargs, return_dict=False)[0]

                    if callback_on_step_end is not None:
                        latents, class_token = self.split_state(state)
                        callback_kwargs = {}
                        for name in callback_on_step_end_tensor_inputs:
                            callback_kwargs[name] = locals()[name]
                        changed = callback_on_step_end(self, i, t, callback_kwargs)
                        state = self._join(_changed_latents(changed, latents), class_token)

                    progress_bar.update()
                    if XLA_AVAILABLE:
                        xm.mark_step()

            # 5. Decode; the class token is not needed any more
            latents, _ = self.split_state(state)
            images = latents if output_type == "latent" else self.decode_latents(latents).float()
            self._check_finite(images)
            if output_type != "latent":
                images = self.image_processor.postprocess(images, output_type=output_type)
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    @contextlib.contextmanager
    def _running_call(self, call: _Call) -> Iterator[None]:
        """Makes this the call that callbacks in this thread see. Calls take turns if a model holds state of one."""
        models = [model for model in (self.transformer, self.vae, self.guidance_transformer) if model is not None]
        with _ONE_AT_A_TIME if any(map(_holds_state, models)) else contextlib.nullcontext():
            token = _CALLS.set((*_CALLS.get(), (self, call)))
            self._running.append(call)
            try:
                yield
            finally:
                self.maybe_free_model_hooks()  # resets step caches too, which a call that failed leaves half full
                call.scheduler = None  # it may hold tensors
                self._running.remove(call)
                self._last_call = call
                _CALLS.reset(token)

    def _check_finite(self, images: torch.Tensor) -> None:
        broken = ~torch.isfinite(images).flatten(1).all(dim=1)
        if broken.any():  # 8 bits would show it as black or white
            dtypes = {model.dtype for model in (self.transformer, self.vae) if model is not None}
            raise ValueError(
                f"image {int(broken.int().argmax())} of {len(images)} holds NaN or infinity: the weights are broken, or "
                f"{' and '.join(sorted(map(str, dtypes)))} is too low a precision (try float32)"
            )


def is_representation_autoencoder(vae: Any) -> bool:
    """
    Args:
        vae (a diffusers autoencoder): Any.

    Returns:
        `bool`: Whether it is an AutoencoderRAE, which has images in [0, 1] and scales its latents itself.
    """
    return type(vae).__name__ == "AutoencoderRAE"


def scale_latents(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """
    Args:
        latents (`torch.Tensor` of shape `(B, C, H, W)`): Latents as the autoencoder makes them.
        vae (a diffusers autoencoder): Its config says how they are scaled: by `scaling_factor` and `shift_factor`, or by
            the statistics `latents_mean` and `latents_std` of each channel.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: Latents as the transformer sees them.
    """
    mean, std, scaling = _latent_scaling(vae, latents)
    return (latents - mean) * scaling / std


def unscale_latents(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """
    The inverse of [`scale_latents`].

    Args:
        latents (`torch.Tensor` of shape `(B, C, H, W)`): Latents as the transformer sees them.
        vae (a diffusers autoencoder): See there.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`: Latents as the autoencoder decodes them.
    """
    mean, std, scaling = _latent_scaling(vae, latents)
    return latents * std / scaling + mean


def _latent_scaling(vae: Any, latents: torch.Tensor) -> tuple[Any, Any, float]:
    if is_representation_autoencoder(vae):
        return 0.0, 1.0, 1.0
    scaling = getattr(vae.config, "scaling_factor", None) or 1.0
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return getattr(vae.config, "shift_factor", None) or 0.0, 1.0, scaling
    mean, std = (
        torch.as_tensor(values, device=latents.device, dtype=latents.dtype).reshape(1, -1, 1, 1)
        for values in (mean, std)
    )
    return mean, std, scaling


def _kind(value: object) -> str:
    return type(value).__name__


def _as_integer(value: object) -> int | None:
    """A whole number from Python, NumPy or torch (a 0-dimensional tensor) as an `int`; `None` for anything else."""
    if isinstance(value, (bool, np.ndarray)) or (isinstance(value, torch.Tensor) and not _is_scalar_id(value)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _is_scalar_id(value: torch.Tensor) -> bool:
    return value.ndim == 0 and not value.is_floating_point() and value.dtype != torch.bool


def _is_ids_or_names(values: torch.Tensor | np.ndarray) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "iuU"
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _positive(name: str, value: object) -> int:
    number = _as_integer(value)
    if number is None or number < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r} ({_kind(value)})")
    return number


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor of several numbers
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be a finite number, got {value!r} ({_kind(value)})")
    return number


def _interval(value: Any) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, (Sequence, np.ndarray, torch.Tensor)) or len(value) != 2:
        raise ValueError(f"`guidance_interval` must be two numbers (low, high), got {value!r} ({_kind(value)})")
    return _number("guidance_interval", value[0]), _number("guidance_interval", value[1])


def _changed_latents(changed: Any, latents: torch.Tensor) -> torch.Tensor:
    """The latents after a callback: those it returned, or those it got."""
    if changed is None:
        return latents
    if not isinstance(changed, dict):
        raise ValueError(f"`callback_on_step_end` must return a dict or None, got {_kind(changed)}")
    changed = changed.get("latents", latents)
    if not isinstance(changed, torch.Tensor) or changed.shape != latents.shape:
        got = tuple(changed.shape) if isinstance(changed, torch.Tensor) else _kind(changed)
        raise ValueError(f"`callback_on_step_end` must return latents of the shape {tuple(latents.shape)}, got {got}")
    return changed


def _check_scheduler(scheduler: Any, *transformers: Any) -> None:
    """Raises ValueError for a scheduler that would not take the model's output as the velocity that it is."""
    bases = [base.__name__ for base in type(scheduler).__mro__ if base.__module__.split(".")[0] == "diffusers"]
    if "SchedulerMixin" not in bases:
        raise ValueError(f"the scheduler is a {_kind(scheduler)}, not a diffusers scheduler")
    kind, config = bases[0], scheduler.config
    path_type = config.get("path_type", "linear")
    samples = any(model is not None and model.config.get("prediction_type") == "sample" for model in transformers)
    if samples and path_type != "linear":
        raise ValueError(
            f"the transformer predicts samples, which give the velocity of the linear path, and the scheduler steps along the "
            f"{path_type} one"
        )
    if kind == "SchedulerMixin":  # ours, or somebody's own
        shift = config.get("shift", config.get("flow_shift", 1.0))
        if shift != 1 and not {"shift", "flow_shift"} & set(inspect.signature(type(scheduler).__init__).parameters):
            raise ValueError(
                f"{type(scheduler).__name__} has no shift, and its config, from another scheduler, asks for {shift}: make it "
                "without that config"
            )
        return
    advice = (
        "Use FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler, "
        f'{", ".join(FLOW_MATCHING_SCHEDULERS)}, or, with use_flow_sigmas=True and prediction_type="flow_prediction", '
        f"{', '.join(FLOW_SIGMA_SCHEDULERS)}"
    )
    if kind not in FLOW_MATCHING_SCHEDULERS + FLOW_SIGMA_SCHEDULERS:
        raise ValueError(f"{kind} does not step the velocity of a flow-matching model. {advice}")
    spoilt_by = FLOW_MATCHING_SPOILT_BY
    if kind in FLOW_SIGMA_SCHEDULERS:
        spoilt_by = FLOW_SIGMAS_SPOILT_BY | (UNIPC_SPOILT_BY if kind == "UniPCMultistepScheduler" else {})
        if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction":
            raise ValueError(
                f"this {kind} reads the velocity as another prediction: make it by {kind}.from_config(config, "
                f'use_flow_sigmas=True, prediction_type="flow_prediction"). {advice}'
            )
        if config.get("path_type", "linear") != "linear":  # kept from the config that it was made from
            raise ValueError(f"{kind} steps along the linear path, and the model's is {config['path_type']}. {advice}")
    options = [f"{option}={config[option]!r}" for option, values in spoilt_by.items() if config.get(option) in values]
    if options:
        raise ValueError(f"{kind} with {' and '.join(options)} does not step a flow-matching model correctly: omit it")


def _check_vae(vae: Any, in_channels: int) -> None:
    """Raises ValueError for an autoencoder that cannot decode latents of so many channels."""
    if not hasattr(vae, "decode"):
        raise ValueError(f"the vae is a {_kind(vae)}, not an autoencoder of diffusers")
    channels = next(
        (
            vae.config[key]
            for key in ("vq_embed_dim", "latent_channels", "encoder_hidden_size", "z_dim")
            if vae.config.get(key)
        ),
        None,
    )
    if channels is not None and channels != in_channels:
        raise ValueError(
            f"the vae decodes latents of {channels} channels, and the transformer has in_channels={in_channels}"
        )
    if any(isinstance(module, torch.nn.Conv3d) for module in vae.modules()):
        raise ValueError(f"the vae is a {_kind(vae)}, an autoencoder of videos: take one of images")
    for name in ("latents_mean", "latents_std"):
        values = None if is_representation_autoencoder(vae) else vae.config.get(name)
        if values is not None and np.size(values) not in (1, in_channels):
            raise ValueError(f"the vae's {name} has {np.size(values)} values, and its latents {in_channels} channels")


def _check_noise(generator: Any, latents: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError for generators or starting noise that do not fit latents of this shape."""
    for one in generator if isinstance(generator, list) else [generator] if generator is not None else []:
        if not isinstance(one, torch.Generator):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {_kind(one)}")
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"got {len(generator)} generators for {shape[0]} images")
    if latents is None:
        return
    if not isinstance(latents, torch.Tensor):
        raise ValueError(f"`latents` must be a torch.Tensor, got {_kind(latents)}")
    if tuple(latents.shape) != shape:
        raise ValueError(f"`latents` must have the shape {shape}, got {tuple(latents.shape)}")
    if not torch.isfinite(latents).all():
        raise ValueError("`latents` holds NaN or infinity")


def _check_output(output_type: str, transformer: Any, vae: Any) -> None:
    """Raises ValueError for an unknown output, or one that the parts cannot make."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f'`output_type` must be "pil", "np", "pt" or "latent", got {output_type!r}')
    channels = transformer.config.in_channels
    if output_type != "latent" and vae is None and channels not in (1, 3):
        raise ValueError(
            f"latents of {channels} channels are not pixels, and this pipeline has no vae: set `pipe.vae`, or take "
            '`output_type="latent"`'
        )


def _set_timesteps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Sets SiT's grid, evenly from 1 to 0. That of diffusers' flow-matching schedulers would go to 1 / num_train_timesteps and
    then to 0; so near to the data, a model that predicts samples multiplies its errors by num_train_timesteps."""
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)
    else:
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            scheduler.sigma_min = 1 / steps
        scheduler.set_timesteps(steps, device=device)
    if not torch.as_tensor(scheduler.timesteps).isfinite().all():  # as with `shift_terminal` and one step
        raise ValueError(f"the scheduler has no grid of {steps} steps: its times are {scheduler.timesteps.tolist()}")


def _flow_times(scheduler: Any) -> list[float]:
    """The times of the model calls in [0, 1]. In Python's floats: not every device has float64."""
    if not scheduler.timesteps.is_floating_point():  # rounded from these
        return scheduler.sigmas[: len(scheduler.timesteps)].tolist()
    return [t / scheduler.config.num_train_timesteps for t in scheduler.timesteps.tolist()]


def _holds_state(model: Any) -> bool:
    """Whether a model works by hooks of diffusers or accelerate (caches, offloading, casting), or has LoRA layers."""
    return (
        bool(getattr(model, "peft_config", None))
        or next(_hooks(model), None) is not None
        or any(hasattr(module, "_hf_hook") for module in model.modules())
    )


def _hooks(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and hooks of diffusers."""
    for module in model.modules():
        yield from getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).items()


def _is_on_disk(model: Any) -> bool:
    """Whether group offloading keeps the weights on a disk, and empty tensors in their place."""
    return any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) for _, hook in _hooks(model))


@contextlib.contextmanager
def upcast(vae: Any, device: torch.device) -> Iterator[None]:
    """
    Runs an autoencoder with `force_upcast` in float32, because its activations overflow in float16.

    Args:
        vae (a diffusers autoencoder): The autoencoder.
        device (`torch.device`): Where it runs.

    Returns:
        `contextlib.AbstractContextManager`: The block in which it does; `vae.dtype` tells the dtype of its inputs there.
    """
    if not vae.config.get("force_upcast"):
        yield
        return
    with _ONE_AT_A_TIME:
        dtype = vae.dtype
        half = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        half = half and torch.get_autocast_dtype(device.type) == torch.float16
        if dtype == torch.float16:
            vae.to(torch.float32)
        try:
            with torch.autocast(device.type, enabled=False) if half else contextlib.nullcontext():
                yield
        finally:
            if dtype == torch.float16:
                vae.to(dtype)


def _described(own_class: type) -> str:
    return f"{own_class.__module__}.{own_class.__qualname__}"


def _source_of(own_class: type) -> bytes:
    """The file that a class was loaded from, as it was then if the class has kept it."""
    for base in own_class.__mro__:
        if base.__module__ == own_class.__module__ and "_source" in vars(base):
            return vars(base)["_source"]
    return Path(str(inspect.getsourcefile(own_class))).read_bytes()


def _may_be_copied(own_class: type) -> bool:
    """Whether the file of a class belongs to this package, or came with a repo as remote code."""
    return own_class.__module__.split(".")[0] in (__name__.split(".")[0], "diffusers_modules")


def _check_loads_again(name: str, model: ModelMixin) -> None:
    """Raises ValueError unless the tensors of a model are those that its config creates."""
    if _is_on_disk(model):
        raise ValueError(
            f"the {name} is offloaded to a disk, from where diffusers does not save it: save before enable_group_offload()"
        )
    with torch.device("meta"):  # accelerate's init_empty_weights would do it to all threads
        expected = type(model).from_config(model.config).state_dict()
    state = model.state_dict()
    if cast := next(
        (key for key, value in state.items() if str(getattr(value, "dtype", "")).startswith("torch.float8")), None
    ):
        raise ValueError(
            f"the {name} stores {cast} in {state[cast].dtype}, in which it would not load again: save before "
            "enable_layerwise_casting()"
        )
    wrong = [key for key in state if key not in expected or state[key].shape != expected[key].shape]
    wrong += [key for key in expected if key not in state] + [
        key for key, value in state.items() if getattr(value, "is_meta", False)
    ]
    if not wrong:
        return
    merge, unload = f"pipe.{name}.fuse_lora()", f"pipe.{name}.unload_lora()"
    if name == "transformer":  # with the classes of its adapters
        merge, unload = "pipe.fuse_lora()", "pipe.unload_lora_weights()"
    remedies = {
        "lora_": f"merge the adapter (`{merge}; {unload}`), or take it away (`{unload}`)",
        "_orig_mod.": "compile in place, by `module.compile()` or `compile_repeated_blocks()`",
        "to_qkv": f"undo the fusion by `pipe.{name}.unfuse_qkv_projections()`",
        "module.": "unwrap the modules that hold another as `.module`",
    }
    remedy = next((text for mark, text in remedies.items() if any(mark in key for key in wrong)), None)
    raise ValueError(
        f"the {name} would not load again: {wrong[0]} and {len(wrong) - 1} more tensors differ from those that its config creates"
        + (f". Before saving, {remedy}" if remedy else "")
    )


def _check_lora(
    state: dict[str, torch.Tensor], metadata: dict[str, Any] | None, transformer: ModelMixin
) -> dict[str, Any]:
    """
    The options that peft is to make the adapter with: ranks and layers from the tensors, and of the file's metadata, which may
    ask for anything, the scale alone. Raises ValueError unless every tensor is a finite half of a LoRA pair of a layer of this
    transformer.
    """
    if not state:
        raise ValueError("the adapter holds no tensors")
    ranks: dict[str, int] = {}
    for key, tensor in state.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"the adapter is not one of this model: it holds {key!r}, not `transformer.….lora_A.weight`"
            )
        try:
            layer = transformer.get_submodule(match[1])
        except AttributeError:
            layer = None
        if "base_layer" in match[1] or not isinstance(getattr(layer, "base_layer", layer), torch.nn.Linear):
            raise ValueError(f"the adapter was made for another model: this one has no linear layer {match[1]!r}")
        weight = layer.weight
        first, second = (state.get(f"transformer.{match[1]}.lora_{half}.weight") for half in "AB")
        fits = first is not None and second is not None and first.ndim == second.ndim == 2
        if fits:
            (rank, columns), (rows, same) = first.shape, second.shape  # type: ignore[union-attr]
            fits = rank == same and (rows, columns) == weight.shape
            ranks[match[1]] = rank
        if not fits:
            raise ValueError(
                f"the adapter was made for another model: {key!r} is {tuple(tensor.shape)}, without its half or not for a "
                f"layer of {tuple(weight.shape)}"
            )
        if not 0 < ranks[match[1]] <= min(weight.shape):
            raise ValueError(
                f"{key!r} has rank {ranks[match[1]]}, where a layer of {tuple(weight.shape)} has {min(weight.shape)}"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{key!r} of the adapter is {tensor.dtype}, or holds NaN or infinity")
    if not isinstance(metadata, (dict, type(None))):
        raise ValueError(f"the adapter's metadata are a {_kind(metadata)}, not a dict")
    written = {key.removeprefix("transformer."): value for key, value in (metadata or {}).items()}
    most = max(ranks.values(), key=list(ranks.values()).count)
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    alpha, alphas = written.get("lora_alpha", most), written.get("alpha_pattern") or ({} if written else others)
    for value in (alpha, *(alphas.values() if isinstance(alphas, dict) else [None])):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"the adapter's metadata give {value!r} as its lora_alpha, a number above 0")
    if strange := [name for name in alphas if not re.fullmatch(r"\^?[\w.\\]+", name)]:
        raise ValueError(f"the adapter's metadata name a layer {strange[0]!r}")
    options = {
        "r": most,
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        "rank_pattern": others,
        "alpha_pattern": alphas,
        "use_rslora": written.get("use_rslora") is True,
    }
    return {f"transformer.{key}": value for key, value in options.items()}


def _variant_of(name: str) -> str | None:
    """Variant of a file of weights or of their index, `""` for none; `None` for files of other kinds."""
    match = _WEIGHTS.fullmatch(name)
    return match and (match[1] or match[2] or "")


def _replace(folder: Path, written: Path, variant: str | None) -> None:
    """Replaces the pipeline in a folder by a newly written one. Other files in the folder stay."""
    index: Any = {}
    with contextlib.suppress(OSError, ValueError):  # none, or no JSON
        index = json.loads((folder / DiffusionPipeline.config_name).read_text(encoding="utf-8"))
    index = index if isinstance(index, dict) else {}
    if index and "ERWPipeline" not in (index.get("_class_name") or ""):  # or ["pipeline", "ERWPipeline"]
        raise ValueError(f"{folder} holds a {index.get('_class_name')}: choose another folder")
    module = folder / "pipeline.py"
    if not index and module.exists() and "class ERWPipeline" not in module.read_text("utf-8", errors="replace"):
        raise ValueError(f"{module} is not of a pipeline of erw_hf: choose another folder")
    components = {path.name for path in written.iterdir() if path.is_dir()}
    stale = []
    for name in components | {
        name for name, value in index.items() if isinstance(value, list) and name.isidentifier()
    }:
        if (folder / name).is_symlink() or not (folder / name).is_dir():
            stale += [folder / name] * (name in components)
            continue
        module_of_class = f"{index[name][0]}.py" if name in index and index[name] else None
        others = []
        for path in (folder / name).iterdir():
            of = _variant_of(path.name)
            if name in components and variant is not None and of not in (None, variant):
                others.append(path.name)
            elif of is not None or path.name in ("config.json", "scheduler_config.json", module_of_class):
                stale.append(path)
        if others and _model_config(folder / name) != _model_config(written / name):
            raise ValueError(
                f"{folder / name} holds {others[0]} of a model with another config: choose another folder, or save without a "
                "variant first"
            )
    for path in stale:
        path.unlink(missing_ok=True)
    # The index comes last.
    for path in sorted(written.rglob("*"), key=lambda path: path.name == DiffusionPipeline.config_name):
        if path.is_file():
            target = folder / path.relative_to(written)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
    for path in {path.parent for path in stale} - {folder}:
        if not any(path.iterdir()):
            path.rmdir()


def _model_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {key: value for key, value in config.items() if key not in ("_diffusers_version", "_name_or_path")}


def _checked_id2label(id2label: Any) -> dict[int, str]:
    if id2label is None:
        return {}
    if not isinstance(id2label, dict):
        raise ValueError(
            f"`id2label` must be a dict from class ids to names, got {_kind(id2label)}; of a list, dict(enumerate(names))"
        )
    checked: dict[int, str] = {}
    for key, name in id2label.items():
        class_id = int(key) if isinstance(key, str) and key.isdecimal() else _as_integer(key)
        if class_id is None or not isinstance(name, str) or class_id in checked:
            raise ValueError(f"`id2label` must map each class id to one name, got {key!r}: {name!r}")
        checked[class_id] = name
    return checked


def _composed(name: str) -> str:
    """An "é" may be written as one character or as two, depending on the system or keyboard: here it is one (NFC)."""
    return unicodedata.normalize("NFC", name)


def _label_table(id2label: dict[int, str]) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Name -> id for every full label and every comma-separated synonym that means one class, and the others.

    ImageNet has two classes "crane" and two "maillot": a guess would draw the wrong one. A class's full label wins over
    a synonym of another class ("maillot" over "maillot, tank suit").
    """
    id2label = {class_id: _composed(label) for class_id, label in id2label.items()}
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
