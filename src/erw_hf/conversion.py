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
"""Published SiT, REPA, REG, ERW and LightningDiT checkpoints, read into the names of [`ERWTransformer2DModel`].

Every tensor of a checkpoint is used or named as dropped on purpose; anything else raises. Pickles are opened with
`weights_only=True` alone, so that a hostile file executes nothing.
"""

import argparse
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from erw_hf.sizes import published_heads
from erw_hf.transformer_erw import ERWTransformer2DModel


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
    """What a checkpoint holds.

    Args:
        config (`dict`): Configuration of the [`ERWTransformer2DModel`].
        transformer (`dict[str, torch.Tensor]`): Its state dict; without a final layer if it is a warmup.
        projectors (`dict[str, torch.Tensor]`): State of the projectors, `projectors.<encoder>.layers.<i>.<name>`.
        dropped (`list[str]`): Tensors left out on purpose: fixed tables that the model computes itself, and for
            SiT the variance channels.
        is_warmup (`bool`): Whether it is a warmup, which is no whole model.
    """

    config: dict[str, Any]
    transformer: dict[str, torch.Tensor]
    projectors: dict[str, torch.Tensor]
    dropped: list[str]
    is_warmup: bool


def convert_checkpoint(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], architecture: Mapping[str, Any] | None = None
) -> ERWTransformer2DModel:
    """
    Loads a published checkpoint.

    The architecture is inferred from the tensors. SiT's and LightningDiT's own files run time the other way (t = 1 is
    data) and predict the opposite velocity: the conversion absorbs both exactly, in the time embedding's first linear
    layer and the last one. A file counts as theirs if it predicts SiT's variance channels, or has SwiGLU or RMSNorm
    blocks and no projectors; `architecture={"time_reversed": True}` or `False` says it outright.

    Args:
        path_or_state_dict (`str`, `os.PathLike` or `Mapping`):
            A `.pt` or `.safetensors` file, or what such a file holds: a state dict, or a checkpoint dict with one under
            `ema` (preferred), `model` or `state_dict`. Entries that are no tensors are ignored.
        architecture (`Mapping`, *optional*):
            Configuration values that the tensors do not tell (`num_attention_heads` for an unpublished width), or to
            be checked against them.

    Returns:
        [`ERWTransformer2DModel`]: The model, float32, in evaluation mode.

    Raises:
        ValueError: for a file that is damaged, refused or of another model, and for a warmup without later blocks.
    """
    return build_model(read_checkpoint(path_or_state_dict, architecture))


def build_model(converted: Converted) -> ERWTransformer2DModel:
    """
    Args:
        converted ([`Converted`]): What was read.

    Returns:
        [`ERWTransformer2DModel`]: The model, float32, in evaluation mode.

    Raises:
        ValueError: for a warmup, and for tensors that do not fit.
    """
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
        raise ValueError(f"the checkpoint does not fit {converted.config}: missing {missing}, unexpected {unexpected}")
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
    else:
        loaded = _load(Path(path_or_state_dict))
    tensors = _state_dict_of(loaded)
    architecture = dict(architecture or {})
    time_reversed = architecture.pop("time_reversed", None)
    config = _infer_config(tensors, architecture)
    return _convert(tensors, config, time_reversed)


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Published pickles hold their command line as a Namespace, which is nothing but a bag of values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, which torch writes itself
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises weights_only=False, which would execute what the file says.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is refused: it is no checkpoint, or holds objects other than tensors and plain values, which "
            f"could execute code{f' (it asks for {found[1]})' if found else ''}. Nothing was executed"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    return loaded


def _state_dict_of(loaded: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    for name in ("ema", "model", "state_dict"):
        if isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    # What DistributedDataParallel and torch.compile put before a name.
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in tensors.items()}
    for name in ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "blocks.0.attn.qkv.weight"):
        if name not in tensors:
            raise ValueError(f"this is no SiT, REPA, REG, ERW or LightningDiT checkpoint: it has no tensor {name!r}")
    return tensors


def _infer_config(tensors: Mapping[str, torch.Tensor], architecture: Mapping[str, Any]) -> dict[str, Any]:
    dim, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    num_layers = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name)))
    swiglu = "blocks.0.mlp.w12.weight" in tensors
    inner = tensors["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
    config = {
        "in_channels": in_channels,
        "patch_size": patch_size,
        "num_layers": num_layers,
        "num_classes": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "activation_fn": "swiglu" if swiglu else "gelu-approximate",
        "norm_type": "rms_norm" if "blocks.0.norm1.weight" in tensors else "layer_norm",
        "use_rope": any(name.startswith("feat_rope.") for name in tensors),
        "qk_norm": None,
        "mlp_ratio": _mlp_ratio(inner, dim, swiglu),
    }
    if "cls_projectors2.weight" in tensors:  # REG
        config["class_token_dim"] = tensors["cls_projectors2.weight"].shape[1]
    if "blocks.0.attn.q_norm.weight" in tensors:
        config["qk_norm"] = "layer_norm" if "blocks.0.attn.q_norm.bias" in tensors else "rms_norm"
        heads = dim // tensors["blocks.0.attn.q_norm.weight"].shape[0]
    else:
        heads = architecture.get("num_attention_heads", published_heads(dim))
        if heads is None:
            raise ValueError(
                f'the width {dim} is of no published size: pass architecture={{"num_attention_heads": ...}}'
            )
        if dim % heads != 0:
            raise ValueError(f"num_attention_heads={heads} does not divide the checkpoint's width {dim}")
    config["num_attention_heads"], config["attention_head_dim"] = heads, dim // heads
    if "pos_embed" in tensors:
        config["sample_size"] = math.isqrt(tensors["pos_embed"].shape[1]) * patch_size
    elif "sample_size" not in architecture:
        raise ValueError('the checkpoint has no position table: pass architecture={"sample_size": ...}')
    for name, value in architecture.items():
        if name in config and config[name] != value:
            raise ValueError(f"architecture says {name}={value!r}, the checkpoint's tensors say {config[name]!r}")
    return {**architecture, **config}


def _mlp_ratio(inner: int, dim: int, swiglu: bool) -> float:
    if not swiglu:
        return inner / dim
    # The model rounds 2/3 of the width down, so the ratio is not unique: 4 if it fits, as published.
    return 4.0 if int(dim * 4.0 * 2 / 3) == inner else (inner + 0.5) * 1.5 / dim


def _convert(tensors: Mapping[str, torch.Tensor], config: dict[str, Any], time_reversed: bool | None) -> Converted:
    is_warmup = "final_layer.linear.weight" not in tensors
    transformer: dict[str, torch.Tensor] = {}
    projectors: dict[str, torch.Tensor] = {}
    dropped: list[str] = []
    for name, tensor in tensors.items():
        tensor = tensor.float()
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        projector = re.fullmatch(r"projectors\.(\d+)\.(\d+)", module)
        if name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
            dropped.append(name)
        elif module in _RENAMED:
            transformer[f"{_RENAMED[module]}.{kind}"] = tensor
        elif projector:
            projectors[f"projectors.{projector[1]}.layers.{projector[2]}.{kind}"] = tensor
        elif block and block[2] in _BLOCK_RENAMED:
            transformer[f"transformer_blocks.{block[1]}.{_BLOCK_RENAMED[block[2]]}.{kind}"] = tensor
        elif block and block[2] == "attn.qkv":
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                transformer[f"transformer_blocks.{block[1]}.attn.to_{part}.{kind}"] = rows.contiguous()
        elif block and block[2] == "mlp.w12":
            # Theirs is silu(first half) * second half; diffusers' SwiGLU puts the gated half last.
            transformer[f"transformer_blocks.{block[1]}.ff.net.0.proj.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
        else:
            raise ValueError(f"unknown tensor {name!r} {tuple(tensor.shape)}: this is no checkpoint of this family")

    learns_sigma = False
    if not is_warmup:
        learns_sigma = _keep_velocity_channels(transformer, config, dropped)
    if time_reversed is None:
        is_lightning_dit = config["activation_fn"] == "swiglu" or config["norm_type"] == "rms_norm"
        time_reversed = not projectors and not is_warmup and (learns_sigma or is_lightning_dit)
    if time_reversed:
        _reverse_time(transformer)
    converted = Converted(config, transformer, projectors, dropped, is_warmup)
    _check_tables(tensors, converted)
    return converted


def _keep_velocity_channels(transformer: dict[str, torch.Tensor], config: dict[str, Any], dropped: list[str]) -> bool:
    """SiT's final layer has as many channels again, left from DiT's variance: they are no part of the velocity."""
    patches, channels = config["patch_size"] ** 2, config["in_channels"]
    rows = transformer["proj_out.weight"].shape[0]
    if rows == patches * channels:
        return False
    if rows != 2 * patches * channels:
        raise ValueError(f"the final layer has {rows} outputs, neither {patches * channels} nor twice as many")
    for name in ("proj_out.weight", "proj_out.bias"):
        tensor = transformer[name]
        kept = tensor.unflatten(0, (patches, 2 * channels))[:, :channels]
        transformer[name] = kept.flatten(0, 1).contiguous()
    dropped.append(f"final_layer.linear: channels {channels} to {2 * channels - 1} (variance)")
    return True


def _reverse_time(transformer: dict[str, torch.Tensor]) -> None:
    """
    Makes a model of u = 1 - t with velocity dx/du one of t with dx/dt = -dx/du, exactly.

    The time embedding is [cos(w t), sin(w t)], and cos(w (1 - t)) = cos(w) cos(w t) + sin(w) sin(w t), sin(w (1 - t)) =
    sin(w) cos(w t) - cos(w) sin(w t): so the columns of the layer behind it turn by the angles w.
    """
    name = "time_class_embed.timestep_embedder.linear_1.weight"
    cosine, sine = transformer[name].double().chunk(2, dim=1)  # (D, 128) each
    half = cosine.shape[1]
    w = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    rotated = [cosine * w.cos() + sine * w.sin(), cosine * w.sin() - sine * w.cos()]
    transformer[name] = torch.cat(rotated, dim=1).float()
    for name in ("proj_out.weight", "proj_out.bias"):
        transformer[name] = -transformer[name]


def _check_tables(tensors: Mapping[str, torch.Tensor], converted: Converted) -> None:
    """The fixed tables that are dropped must be the ones that the model computes: a learned one would be lost."""
    config = {**converted.config, "num_layers": 0}
    model = ERWTransformer2DModel(**config)
    tables = {"pos_embed": model.pos_embed.pos_embed}
    if model.class_token_embed is not None:  # which has no place in the grid: zeros
        tables["pos_embed"] = torch.nn.functional.pad(tables["pos_embed"], (0, 0, 1, 0))
    if model.rope is not None:
        tables |= {"feat_rope.freqs_cos": model.rope.cos, "feat_rope.freqs_sin": model.rope.sin}
    for name, table in tables.items():
        if name not in tensors:
            continue
        theirs = tensors[name].float().reshape(-1)
        if theirs.shape != table.reshape(-1).shape or not torch.allclose(theirs, table.reshape(-1), atol=1e-4):
            raise ValueError(f"{name!r} is another table than the fixed one of this family: it would be lost")
