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
"""Conversion of published SiT, REPA, REG, ERW and LightningDiT checkpoints to [`ERWTransformer2DModel`].

Every tensor of a checkpoint is used, or named as dropped on purpose; anything else raises. Pickles are opened with
`weights_only=True` only, so a hostile file cannot execute anything.
"""

import argparse
import difflib
import inspect
import math
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PosixPath, WindowsPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from erw_hf.sizes import SIZES, mlp_ratio, published_heads
from erw_hf.transformer_erw import ERWTransformer2DModel


# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing insert into names.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|averaged?)(?![a-z])", re.IGNORECASE)
_FIRST, _CLASSES = "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
_REQUIRED = (_FIRST, "t_embedder.mlp.0.weight", "blocks.0.attn.qkv.weight")
_DTYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_COUNTS = (
    "sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "num_classes",
)  # fmt: skip
_NUMBERS = ("mlp_ratio", "class_dropout_prob", "norm_eps", "rope_theta", "rope_scale", "noise_scale")
_NOT_SERVED = (
    "DiT's files have the same tensors as SiT's but predict DDPM's noise and variance, and this library cannot draw "
    "with those; diffusers' DiTPipeline can"
)

# What published pickles hold beside tensors: their command line, paths and statistics.
_OF_NUMPY: list[Any] = [np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]]  # which make arrays and scalars
_PLAIN: list[Any] = [
    argparse.Namespace, PosixPath, WindowsPath, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdU"),
    *((function, f"numpy.{core}.multiarray.{function.__name__}") for function in _OF_NUMPY for core in ("core", "_core")),
]  # fmt: skip

_RENAMED = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_class_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_class_embed.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "time_class_embed.class_embedder",
    "final_layer.norm_final": "norm_out.norm",
    "final_layer.adaLN_modulation.1": "norm_out.modulation",
    "final_layer.linear": "proj_out",
    "cls_projectors2": "class_token_embed.proj",
    "wg_norm": "class_token_embed.norm",
    "final_layer.linear_cls": "class_token_out",
}
_BLOCK_RENAMED = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attn.to_out.0",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "mlp.w3": "ff.net.2",
    "adaLN_modulation.1": "modulation",
}


@dataclass
class Converted:
    """The content of a checkpoint, converted.

    Args:
        config (`dict`): Configuration of the [`ERWTransformer2DModel`].
        transformer (`dict[str, torch.Tensor]`): Its state dict; without a final layer if it is a warmup.
        projectors (`dict[str, torch.Tensor]`): State of the projectors, `projectors.<encoder>.layers.<i>.<name>`.
        dropped (`list[str]`): Tensors dropped on purpose: fixed tables that the model computes itself, and SiT's
            variance channels.
        is_warmup (`bool`): Whether it is a warmup, that is, not a whole model.
        facts (`list[str]`): What was inferred, one line each: which weights, dtype, size, classes, direction of time.
    """

    config: dict[str, Any]
    transformer: dict[str, torch.Tensor]
    projectors: dict[str, torch.Tensor]
    dropped: list[str]
    is_warmup: bool
    facts: list[str] = field(default_factory=list)


def convert_checkpoint(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], architecture: Mapping[str, Any] | None = None
) -> ERWTransformer2DModel:
    """
    Loads a published checkpoint.

    The architecture is inferred from the tensors. SiT's and LightningDiT's own files run time the other way (t = 1 is
    data) and predict the opposite velocity: the conversion absorbs both exactly, in the time embedding's first linear
    layer and the last one. A file counts as theirs if it has SiT's unused variance channels, or has SwiGLU or RMSNorm
    blocks and no projectors; `architecture={"time_reversed": True}` or `False` decides it. DiT's files have the same
    tensors but are recognised by their trained variance channels and refused.

    Args:
        path_or_state_dict (`str`, `os.PathLike` or `Mapping`):
            A `.pt` or `.safetensors` file, or its content: a state dict, or a checkpoint dict with one at any depth and
            behind any prefix. Averaged weights are preferred if they are complete. Other entries are ignored.
        architecture (`Mapping`, *optional*):
            Configuration values that the tensors do not determine (`num_attention_heads` for an unpublished width,
            `num_classes` for a table without a null class, or 0 for an unconditional model), or to check against them.

    Returns:
        [`ERWTransformer2DModel`]: The model, float32, in evaluation mode.

    Raises:
        ValueError: for a file that is damaged, refused or holds another model, and for a warmup, which lacks the later blocks.
    """
    return build_model(read_checkpoint(path_or_state_dict, architecture))


def build_model(converted: Converted) -> ERWTransformer2DModel:
    """The model of what was read, float32, in evaluation mode. Raises ValueError for a warmup, and for tensors that do
    not fit."""
    if converted.is_warmup:
        raise ValueError(
            "this checkpoint is a warmup, which has no final layer and no later blocks: give it to "
            "`train_erw.py --warmup_from`"
        )
    model = ERWTransformer2DModel(**converted.config)
    own = model.state_dict()
    missing = sorted(set(own) - set(converted.transformer))
    unexpected = sorted(set(converted.transformer) - set(own))
    if missing or unexpected:
        shown = [
            f"{names[:5]}{f' and {len(names) - 5} more' if len(names) > 5 else ''}" for names in (missing, unexpected)
        ]
        raise ValueError(f"the checkpoint does not fit {converted.config}: missing {shown[0]}, unexpected {shown[1]}")
    for name, tensor in converted.transformer.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the checkpoint, {tuple(own[name].shape)} in the model"
            )
    model.load_state_dict(converted.transformer)
    return model.eval()


def read_checkpoint(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], architecture: Mapping[str, Any] | None = None
) -> Converted:
    """
    Reads a checkpoint into our names, projectors and warmups included.

    Args:
        path_or_state_dict (`str`, `os.PathLike` or `Mapping`): See [`~hub.convert.convert_checkpoint`].
        architecture (`Mapping`, *optional*): See [`~hub.convert.convert_checkpoint`].

    Returns:
        [`Converted`]: What it holds.

    Raises:
        ValueError: for a file that is damaged, refused or of another model.
    """
    if isinstance(path_or_state_dict, Mapping):
        loaded = path_or_state_dict
    elif not isinstance(path_or_state_dict, (str, os.PathLike)):
        raise ValueError(f"a checkpoint is a path or a state dict, not a {type(path_or_state_dict).__name__}")
    else:
        loaded = _load(Path(path_or_state_dict))
    architecture = _checked_architecture(architecture)
    time_reversed = architecture.pop("time_reversed", None)
    if time_reversed is None:
        _refuse_dit(loaded)
    tensors, facts = _state_dict_of(loaded)
    config = _infer_config(tensors, architecture)
    return _convert(tensors, config, time_reversed, facts)


def _load(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file in it")
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}")
    if path.suffix in (".json", ".gz", ".npz", ".zip", ".tar"):
        raise ValueError(f"{path} is a {path.suffix} file: name a .pt or .safetensors file that holds the whole model")
    with path.open("rb") as file:
        start = file.read(24)
    if start == b"version https://git-lfs.":
        raise ValueError(f"{path} is a pointer of Git LFS, not the file that it stands for: git lfs pull fetches that")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise ValueError(f"{path} is a web page, not the file that it leads to: download that")
    try:
        # Told by its content, since files are renamed: the header of safetensors is JSON after eight bytes.
        if start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.startswith(b"PK")):
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # about pickle protocols that torch itself writes
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message recommends weights_only=False, which would execute code from the file.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is refused: it is not a checkpoint, or holds objects other than tensors and plain values, which "
            f"could execute code{f' (it asks for {found[1]})' if found else ''}. Nothing was executed; ask its author for the "
            "weights alone, as safetensors"
        ) from error
    except Exception as error:  # a damaged pickle raises anything
        reason = re.split(r"\. |\n", str(error))[0]  # what follows recommends weights_only=False too
        raise ValueError(f"{path} cannot be read, it may be truncated: {reason}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    return loaded


def _candidates(loaded: Mapping[str, Any], container: str = "") -> dict[str, dict[str, torch.Tensor]]:
    """Every model in a checkpoint, by its place: in nested dicts, and behind prefixes of the names."""
    named: dict[str, torch.Tensor] = {}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in loaded.items():
        if isinstance(value, Mapping):
            found |= _candidates(value, f"{container}.{key}" if container else str(key))
        elif isinstance(value, (torch.Tensor, np.ndarray)):
            value = torch.as_tensor(value).detach()
            if value.is_meta:
                raise ValueError(f"the checkpoint holds no data: {key!r} is on the meta device")
            value = value.cpu()
            name = _WRAPPERS.sub("", str(key))
            if name in named and (named[name].dtype != value.dtype or not torch.equal(named[name], value)):
                raise ValueError(
                    f"the checkpoint holds two tensors {name!r}, one under the name {key!r}: take one of them out"
                )
            named[name] = value
    for name in named:
        if name == _FIRST or name.endswith(f".{_FIRST}"):
            root = name.removesuffix(_FIRST)
            tensors = {other.removeprefix(root): tensor for other, tensor in named.items() if other.startswith(root)}
            if all(required in tensors for required in _REQUIRED):
                found[".".join(filter(None, (container, root.rstrip("."))))] = tensors
    return found


def _weights(tensors: Mapping[str, torch.Tensor]) -> int:
    """Number of tensors that every copy of a model has: an average may lack tables and projectors."""
    return sum(not re.match(r"pos_embed$|feat_rope\.|projectors\.", name) for name in tensors)


def _state_dict_of(loaded: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The averaged weights if they are complete, otherwise the others, and facts about the choice."""
    found = _candidates(loaded)
    if not found:
        seen = ", ".join(_key_names(loaded)[:12]) or "nothing"
        raise ValueError(
            f"it does not hold a SiT, REPA, REG, ERW or LightningDiT checkpoint: no state dict has the tensors "
            f"{', '.join(map(repr, _REQUIRED))}. It holds {seen}"
        )
    most = max(map(_weights, found.values()))
    whole = [where for where, tensors in found.items() if _weights(tensors) == most]
    where = next((name for name in whole if _AVERAGED.search(name)), whole[0])
    facts = [f"weights: {repr(where) if where else 'the file itself, a state dict'}"]
    if others := [f"{name or 'the state dict'!r}" for name in found if name != where]:
        facts[0] += f"; also there, not taken: {', '.join(others)}"
    averages = list(_averages(loaded))
    if averages and not _AVERAGED.search(where):
        facts.append(f"averaged weights: not taken, {averages[0]!r} is not a whole model")
    rest = max((found[name] for name in whole), key=len)
    if rest.keys() - found[where].keys():
        facts.append("tables and projectors: from the weights that are not averaged")
    return {**rest, **found[where]}, facts


def _averages(loaded: Mapping[str, Any]) -> Iterator[str]:
    """Keys of averaged weights, at any depth."""
    for key, value in loaded.items():
        if _AVERAGED.search(str(key)):
            # Not the counter of torch's AveragedModel, nor a rate.
            if isinstance(value, Mapping) or (isinstance(value, torch.Tensor) and value.ndim > 0):
                yield key
        elif isinstance(value, Mapping):
            yield from _averages(value)


def _key_names(loaded: Mapping[str, Any]) -> list[str]:
    names = []
    for key, value in loaded.items():
        inner = list(value)[:2] if isinstance(value, Mapping) else []
        names.append(f"{key!r}" + (f" (with {', '.join(map(repr, inner))}, …)" if inner else ""))
    return names


def _refuse_dit(loaded: Mapping[str, Any]) -> None:
    """Training checkpoints hold their command line, which names the model."""
    arguments = loaded.get("args")
    arguments = arguments if isinstance(arguments, Mapping) else getattr(arguments, "__dict__", {})
    if str(arguments.get("model", "")).startswith("DiT-"):
        raise ValueError(f"this is a checkpoint of {arguments['model']}: {_NOT_SERVED}")


def _checked_architecture(architecture: Mapping[str, Any] | None) -> dict[str, Any]:
    if not isinstance(architecture or {}, Mapping):
        raise ValueError(f"architecture must be a dict of configuration values, got {architecture!r}")
    architecture = dict(architecture or {})
    known = [name for name in inspect.signature(ERWTransformer2DModel.__init__).parameters if name != "self"]
    known.append("time_reversed")
    for name, value in architecture.items():
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            meant = f", did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"architecture has the unknown key {name!r}{meant} Known: {', '.join(known)}")
        lowest = 0 if name == "num_classes" else 1
        counts = name in _COUNTS and not (isinstance(value, int) and not isinstance(value, bool) and value >= lowest)
        if name in _NUMBERS and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf
        ):
            raise ValueError(f"architecture says {name}={value!r}, it must be a number of at least 0")
        if counts or (name == "time_reversed" and not isinstance(value, bool)):
            wanted = "true or false" if name == "time_reversed" else f"a whole number of at least {lowest}"
            raise ValueError(f"architecture says {name}={value!r}, it must be {wanted}")
    return architecture


def _check_shapes(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError for a tensor that cannot be what its name says; the model checks the rest."""
    for name in sorted(tensors, key=lambda name: name.endswith(".bias")):  # weights first
        tensor = tensors[name]
        module, _, kind = name.rpartition(".")
        if module.startswith("projectors."):
            continue
        of_weight = 4 if name == _FIRST else 1 if "norm" in module.rpartition(".")[2] else 2
        ndim = {"weight": of_weight, "bias": 1, "pos_embed": 3}.get(kind)
        fits = ndim in (None, tensor.ndim) and tensor.numel() > 0
        if fits and kind == "bias" and f"{module}.weight" in tensors:
            fits = len(tensor) == len(tensors[f"{module}.weight"])
        if not fits or (module.endswith(".qkv") and len(tensor) % 3):
            raise ValueError(f"{name!r} is {tuple(tensor.shape)}, which it is not in a checkpoint of this family")


def _shape(tensors: Mapping[str, torch.Tensor], name: str, ndim: int) -> torch.Size:
    if name not in tensors or tensors[name].ndim != ndim:
        found = f"is {tuple(tensors[name].shape)}" if name in tensors else "is missing"
        raise ValueError(f"{name!r} {found}; in a checkpoint of this family it has {ndim} dimensions")
    return tensors[name].shape


def _infer_config(tensors: Mapping[str, torch.Tensor], architecture: Mapping[str, Any]) -> dict[str, Any]:
    dim, in_channels, patch_size, _ = _shape(tensors, "x_embedder.proj.weight", 4)
    _check_shapes(tensors)
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    num_layers = 1 + max(blocks)
    if len(blocks) < num_layers:
        raise ValueError(f"the checkpoint has {len(blocks)} blocks, numbered up to {max(blocks)}: some are missing")
    swiglu = "blocks.0.mlp.w12.weight" in tensors
    inner = _shape(tensors, "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight", 2)[1]
    config = {
        "in_channels": in_channels,
        "patch_size": patch_size,
        "num_layers": num_layers,
        "num_classes": _num_classes(tensors, architecture),
        "activation_fn": "swiglu" if swiglu else architecture.get("activation_fn", "gelu-approximate"),
        "norm_type": "rms_norm" if "blocks.0.norm1.weight" in tensors else "layer_norm",
        # Files of parameters alone lack its tables.
        "use_rope": any(name.startswith("feat_rope.") for name in tensors) or architecture.get("use_rope", False),
        "qk_norm": None,
        "mlp_ratio": _mlp_ratio(inner, dim, swiglu),
    }
    if "cls_projectors2.weight" in tensors:  # REG
        config["class_token_dim"] = _shape(tensors, "cls_projectors2.weight", 2)[1]
    if "blocks.0.attn.q_norm.weight" in tensors:
        config["qk_norm"] = "layer_norm" if "blocks.0.attn.q_norm.bias" in tensors else "rms_norm"
        heads = max(1, dim // _shape(tensors, "blocks.0.attn.q_norm.weight", 1)[0])
    else:
        heads = architecture.get("num_attention_heads", published_heads(dim))
        if "attention_head_dim" in architecture and "num_attention_heads" not in architecture:
            heads = max(1, dim // architecture["attention_head_dim"])
        if heads is None:
            raise ValueError(
                f'no published size has the width {dim}: pass architecture={{"num_attention_heads": ...}}'
            )
        if dim % heads != 0:
            raise ValueError(f"num_attention_heads={heads} does not divide the checkpoint's width {dim}")
    config["num_attention_heads"], config["attention_head_dim"] = heads, dim // heads
    if "pos_embed" in tensors:
        config["sample_size"] = max(1, math.isqrt(tensors["pos_embed"].numel() // dim)) * patch_size
    elif "sample_size" not in architecture:
        raise ValueError('the checkpoint has no position table: pass architecture={"sample_size": ...}')
    for name, value in architecture.items():
        if name in config and config[name] != value:
            raise ValueError(f"architecture says {name}={value!r}, the checkpoint's tensors say {config[name]!r}")
    return {**architecture, **config}


def _num_classes(tensors: Mapping[str, torch.Tensor], architecture: Mapping[str, Any]) -> int:
    """Rows of the table minus one for the null class, unless `architecture` says that there is none."""
    said = architecture.get("num_classes")
    if _CLASSES not in tensors:
        if said == 0:
            return 0
        raise ValueError(
            f"the checkpoint has no classes, {_CLASSES!r} is missing: if the model is unconditional, pass "
            'architecture={"num_classes": 0}'
        )
    rows = _shape(tensors, _CLASSES, 2)[0]
    if said is not None and said not in (rows - 1, rows):
        raise ValueError(
            f"architecture says num_classes={said}, the checkpoint's table has {rows} rows: {rows - 1} classes and the "
            f"null class, or {rows} classes without one"
        )
    return rows - 1 if said is None else said


def _mlp_ratio(inner: int, dim: int, swiglu: bool) -> float:
    if not swiglu:
        return mlp_ratio(inner, dim)
    # The model rounds 2/3 of the width down, so the ratio is not unique: 4 if it fits, as published.
    return 4.0 if int(dim * 4.0 * 2 / 3) == inner else (inner + 0.5) * 1.5 / dim


def _convert(
    tensors: Mapping[str, torch.Tensor], config: dict[str, Any], time_reversed: bool | None, facts: list[str]
) -> Converted:
    is_warmup = "final_layer.linear.weight" not in tensors
    transformer: dict[str, torch.Tensor] = {}
    projectors: dict[str, torch.Tensor] = {}
    dropped: list[str] = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and tensor.numel() > 1:
            raise ValueError(f"{name!r} is {tensor.dtype}: quantized checkpoints are not supported")
        is_float, tensor = tensor.is_floating_point(), tensor.float()
        if not tensor.isfinite().all():
            raise ValueError(f"{name!r} holds NaN or infinity: the checkpoint is broken")
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        projector = re.fullmatch(r"projectors\.(\d+)\.(\d+)", module)
        if tensor.ndim == 0 or not is_float:  # counters, as n_averaged of torch's AveragedModel
            dropped.append(name)
        elif name == "pos_embed" and config.get("pos_embed_type") == "learned":
            transformer["pos_embed.pos_embed"] = tensor
        elif name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
            dropped.append(name)
        elif module in _RENAMED:
            transformer[f"{_RENAMED[module]}.{kind}"] = tensor
        elif projector:
            projectors[f"projectors.{projector[1]}.layers.{projector[2]}.{kind}"] = tensor.clone(
                memory_format=torch.contiguous_format
            )
        elif block and block[2] in _BLOCK_RENAMED:
            transformer[f"transformer_blocks.{block[1]}.{_BLOCK_RENAMED[block[2]]}.{kind}"] = tensor
        elif block and block[2] == "attn.qkv":
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                transformer[f"transformer_blocks.{block[1]}.attn.to_{part}.{kind}"] = rows.contiguous()
        elif block and block[2] == "mlp.w12":
            # Theirs is silu(first half) * second half; diffusers' SwiGLU puts the gated half last.
            transformer[f"transformer_blocks.{block[1]}.ff.net.0.proj.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
        else:
            raise ValueError(
                f"unknown tensor {name!r} {tuple(tensor.shape)}: this checkpoint is not of a known family"
            )

    classes = config["num_classes"]
    has_null_class = _add_null_class(transformer, config)
    learns_sigma = False
    if not is_warmup:
        learns_sigma = _keep_velocity_channels(transformer, config, dropped, time_reversed is None)
    why = "as architecture says"
    if time_reversed is None:
        is_lightning_dit = config["activation_fn"] == "swiglu" or config["norm_type"] == "rms_norm"
        time_reversed = not projectors and not is_warmup and (learns_sigma or is_lightning_dit)
        why = 'inferred; architecture={"time_reversed": ...} decides it'
    prediction = config.get("prediction_type", "velocity")
    if time_reversed:
        _reverse_time(transformer, of_velocities=prediction == "velocity")
    assumed = config["activation_fn"] == "gelu-approximate"  # tensors do not tell
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.ndim})
    null_class = ", and the null class" if classes else ""
    if classes and not has_null_class:
        null_class = "; no null class: the mean of all classes replaces it, untrained, so draw with guidance_scale=1"
    positions = "sin-cos and rotary" if config["use_rope"] else "sin-cos, none rotary"
    if not config["use_rope"] and "pos_embed" not in tensors:
        positions += " (a file of parameters alone does not tell; architecture would)"
    facts = [
        *facts,
        f"dtype: {', '.join(dtypes)}, float32 here",
        f"size: {_size_name(config)}",
        f"classes: {classes}{null_class}",
        f"time: t = {int(time_reversed)} is data{', reversed here' if time_reversed else ''} ({why})",
        f"prediction: {prediction}{'' if 'prediction_type' in config else ' (tensors do not tell; architecture would)'}",
        f"positions: {positions}",
        f"activation: {config['activation_fn']}{' (assumed)' * assumed}",
        f"projectors: {len({name.split('.')[1] for name in projectors})}",
    ]
    converted = Converted(config, transformer, projectors, dropped, is_warmup, facts)
    _check_tables(tensors, converted)
    return converted


def _add_null_class(transformer: dict[str, torch.Tensor], config: dict[str, Any]) -> bool:
    """Adds the null class that our table always ends with. Returns whether the checkpoint already has it."""
    name, classes = "time_class_embed.class_embedder.weight", config["num_classes"]
    width = transformer["time_class_embed.timestep_embedder.linear_1.weight"].shape[0]
    table = transformer.get(name, torch.zeros(0, width))
    if len(table) > classes:
        return True
    null = table.mean(dim=0, keepdim=True) if classes else torch.zeros(1, width)
    transformer[name] = torch.cat([table, null])
    config.setdefault("class_dropout_prob", 0.0)
    return False


def _size_name(config: Mapping[str, Any]) -> str:
    size = (config["num_layers"], config["num_attention_heads"], config["attention_head_dim"])
    name = next((name for name, published in SIZES.items() if published == size), "of no published name")
    return (
        f"{name}, {size[0]} blocks of {size[1]} heads of {size[2]} channels, patch size {config['patch_size']}, latents "
        f"{config['in_channels']}x{config['sample_size']}x{config['sample_size']}"
    )


def _keep_velocity_channels(
    transformer: dict[str, torch.Tensor], config: dict[str, Any], dropped: list[str], may_be_dit: bool
) -> bool:
    """
    Drops the second half of the output channels of SiT's final layer, left over from DiT's variance. SiT does not train
    them, so they are still zero; in DiT's files, which have the same tensors, they are not.
    """
    patches, channels = config["patch_size"] ** 2, config["in_channels"]
    rows = transformer["proj_out.weight"].shape[0]
    if rows == patches * channels:
        return False
    if rows != 2 * patches * channels:
        raise ValueError(f"the final layer has {rows} outputs, neither {patches * channels} nor twice as many")
    for name in ("proj_out.weight", "proj_out.bias"):
        if name not in transformer:
            continue  # named as missing when the model is built
        outputs = transformer[name].unflatten(0, (patches, 2 * channels))
        if may_be_dit and outputs[:, channels:].any():
            raise ValueError(
                f"this is a checkpoint of DiT, since its variance channels are trained: {_NOT_SERVED}. If it predicts a "
                'velocity nevertheless, pass architecture={"time_reversed": true}, or false if t = 0 is data'
            )
        transformer[name] = outputs[:, :channels].flatten(0, 1).contiguous()
    dropped.append(f"final_layer.linear: channels {channels} to {2 * channels - 1} (variance)")
    return True


def _reverse_time(transformer: dict[str, torch.Tensor], of_velocities: bool = True) -> None:
    """
    Turns a model of u = 1 - t with velocity dx/du into one of t with dx/dt = -dx/du, exactly. A clean sample has no direction.

    The time embedding is [cos(w t), sin(w t)], and cos(w (1 - t)) = cos(w) cos(w t) + sin(w) sin(w t), sin(w (1 - t)) =
    sin(w) cos(w t) - cos(w) sin(w t): so the columns of the next layer are rotated by the angles w.
    """
    name = "time_class_embed.timestep_embedder.linear_1.weight"
    cosine, sine = transformer[name].double().chunk(2, dim=1)  # (D, 128) each
    half = cosine.shape[1]
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    rotated = [cosine * w.cos() + sine * w.sin(), cosine * w.sin() - sine * w.cos()]
    transformer[name] = torch.cat(rotated, dim=1).float()
    for name in {"proj_out.weight", "proj_out.bias"} & set(transformer) if of_velocities else ():
        transformer[name] = -transformer[name]


def _check_tables(tensors: Mapping[str, torch.Tensor], converted: Converted) -> None:
    """Raises unless the dropped tables equal those that the model computes: a learned one would be lost."""
    config = {**converted.config, "num_layers": 0}
    model = ERWTransformer2DModel(**config)
    learned = config.get("pos_embed_type") == "learned"
    tables = {} if learned else {"pos_embed": model.pos_embed.pos_embed}
    if model.class_token_embed is not None and not learned:  # outside the grid: zeros
        tables["pos_embed"] = torch.nn.functional.pad(tables["pos_embed"], (0, 0, 1, 0))
    if model.rope is not None:
        tables |= {"feat_rope.freqs_cos": model.rope.cos, "feat_rope.freqs_sin": model.rope.sin}
    for name, table in tables.items():
        if name not in tensors:
            continue
        theirs = tensors[name].float().reshape(-1)
        # Half a unit in the last place of the narrowest dtype that the values went through, whatever they are stored in.
        rounded = [dtype for dtype in _DTYPES if torch.equal(theirs.to(dtype).float(), theirs)]
        tolerance = max([1e-4, *(torch.finfo(dtype).eps / 2 for dtype in rounded)])
        if theirs.shape != table.reshape(-1).shape or not torch.allclose(theirs, table.reshape(-1), 0, tolerance):
            raise ValueError(f"{name!r} differs from the fixed table of this family: it would be lost")
