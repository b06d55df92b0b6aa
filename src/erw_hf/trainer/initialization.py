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
"""The weights that a run starts from: an earlier run's warmup (`--warmup_from`) or a whole model (`--init_from`)."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from erw_hf.conversion import build_model, read_checkpoint
from erw_hf.data.folder import nfc
from erw_hf.data.retrying import hub_or_cache
from erw_hf.encoders import resample_positions
from erw_hf.transformer_erw import ERWTransformer2DModel
from erw_hf.warmup import build_warmup_transformer


SIT_PORT = "SiTTransformer2DModel"  # of the diffusers-layout ports
CLASS_TABLE = "time_class_embed.class_embedder.weight"
POSITIONS = "pos_embed.pos_embed"  # where they are learned


def save_warmup(
    state: Mapping[str, torch.Tensor], model_config: Mapping[str, Any], warmup_depth: int, folder: Path
) -> None:
    """
    Writes a finished warmup for `--warmup_from`. `state` is that of the warmed-up [`AlignedTransformer`],
    `model_config` the full model's.
    """
    transformer = build_warmup_transformer(model_config, warmup_depth)
    first = "transformer."
    transformer.load_state_dict({k.removeprefix(first): v for k, v in state.items() if k.startswith(first)})
    transformer.save_pretrained(folder / "transformer")
    # The same names as in converted checkpoints; the number is the encoder's.
    projectors = {name: tensor.contiguous() for name, tensor in state.items() if name.startswith("projectors.")}
    save_file(projectors, folder / "projectors.safetensors")


def find_warmup(path_or_repo_id: str) -> Path:
    """The folder of a warmup: the named folder or Hub repo, or `warmup` in it."""
    folder = Path(path_or_repo_id)
    if not folder.exists():
        folder = Path(snapshot_download(path_or_repo_id, allow_patterns=["warmup/*", "model_index.json"]))
        if not (folder / "warmup").is_dir() and not (folder / "model_index.json").exists():
            folder = Path(
                snapshot_download(path_or_repo_id, allow_patterns=["transformer/*", "*.safetensors", "*.json"])
            )
    return folder / "warmup" if (folder / "warmup" / "transformer").is_dir() else folder


def load_warmup(path_or_repo_id: str, model_config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """
    The state dict of a warmed-up [`AlignedTransformer`], for [`~warmup.hand_over`]: what a run saved, in a folder or
    on the Hub, or a published `.pt` file of ERW.

    Raises:
        ValueError: if it is not a warmup, or does not fit the model of `model_config`.
    """
    path = Path(path_or_repo_id)
    if path.is_file():
        converted = read_checkpoint(path)
        if not converted.is_warmup:
            raise ValueError(f"{path} is a whole model, not a warmup: convert it with `python -m erw_hf.hub.convert`")
        warmup_config, transformer, projectors = converted.config, converted.transformer, converted.projectors
    else:
        folder = find_warmup(path_or_repo_id)
        if not (folder / "transformer").is_dir() or (folder / "model_index.json").exists():
            raise ValueError(
                f"warmup_from={path_or_repo_id!r} is not a saved warmup: name the `warmup` folder of a run"
            )
        warmup_config, transformer = _load_transformer(folder / "transformer")
        file = folder / "projectors.safetensors"
        projectors = load_file(file) if file.is_file() else {}
    # A warmup predicts nothing, so it serves both predictions.
    may_differ = ("num_layers", "class_dropout_prob", "prediction_type")
    _check_same_model(warmup_config, model_config, "warmup", may_differ)
    state = {f"transformer.{name}": tensor for name, tensor in transformer.items()}
    return state | projectors


def load_initial(
    path_or_repo_id: str, model_config: Mapping[str, Any], id2label: Mapping[int, str] | None
) -> dict[str, torch.Tensor]:
    """
    The weights of a trained model, to fine-tune on other data, other classes or another image size.

    Args:
        path_or_repo_id (`str`):
            A pipeline's folder, a run's, or a Hub repo; a published `.pt` or `.safetensors` file; or SiT in diffusers' layout,
            as the community publishes it. A folder or file in a Hub repo is named `owner/repo/folder` or `owner/repo/file.pt`.
        model_config (`Mapping[str, Any]`): Arguments of the model that will start from it.
        id2label (`Mapping[int, str]`, *optional*): Names of the new data's classes.

    Returns:
        `dict[str, torch.Tensor]`: State dict of the [`ERWTransformer2DModel`]. A class whose name the pipeline knows keeps its
        embedding. If either side lacks names, ids count as names, and classes are the same only if their number is. Any
        other class starts with the null class's embedding. A learned table of positions is resampled.

    Raises:
        ValueError: if it is none of these, or belongs to another model.
    """
    config, state, theirs = _read_model(path_or_repo_id)
    _check_same_model(config, model_config, "model", may_differ=("sample_size", "num_classes", "class_dropout_prob"))
    count, null_class = model_config["num_classes"], config["num_classes"]
    theirs = {class_id: nfc(label) for class_id, label in theirs.items()}  # as ours are read
    ours = {str(class_id): nfc(label) for class_id, label in (id2label or {}).items()}
    if not (theirs and ours):
        numbers = {str(class_id): str(class_id) for class_id in range(count)}
        theirs, ours = (numbers, numbers) if count == null_class else ({}, {})
    if theirs == ours:  # repeated names, such as ImageNet's "crane", keep their ids
        theirs = ours = {class_id: class_id for class_id in ours}
    known = {label: int(class_id) for class_id, label in theirs.items()}
    rows = [known.get(ours.get(str(class_id), ""), null_class) for class_id in range(count)]
    state[CLASS_TABLE] = state[CLASS_TABLE][[*rows, null_class]]
    if POSITIONS in state:
        state[POSITIONS] = resample_positions(
            state[POSITIONS], model_config["sample_size"] // model_config["patch_size"]
        )
    return state


def new_class_ids(state: Mapping[str, torch.Tensor]) -> list[int]:
    """The classes of [`load_initial`]'s weights that start as the null class."""
    table = state[CLASS_TABLE]
    return (table[:-1] == table[-1]).all(dim=1).nonzero().flatten().tolist()


def pipeline_folder(path: Path) -> Path:
    """A pipeline's folder, of that itself or of its run."""
    return path / "pipeline" if (path / "pipeline" / "model_index.json").is_file() else path


def _read_model(path_or_repo_id: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """Configuration, weights and class names of what `--init_from` names. No code of a repo is run."""
    path = Path(path_or_repo_id)
    if not path.exists():
        with hub_or_cache(path_or_repo_id, "init_from"):
            path = _download(path_or_repo_id)
    if path.is_file():
        return *_as_ours(build_model(read_checkpoint(path))), {}
    folder = pipeline_folder(path)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"init_from={path_or_repo_id!r} is not a pipeline: name the `pipeline` folder of a run, its repo, or a published "
            ".pt or .safetensors file"
        )
    names = json.loads((folder / "model_index.json").read_text()).get("id2label") or {}
    config_file = folder / "transformer" / "config.json"
    kind = json.loads(config_file.read_text()).get("_class_name") if config_file.is_file() else None
    if kind == SIT_PORT:
        return *_as_ours(_load_port(folder / "transformer")), names
    if kind not in (None, ERWTransformer2DModel.__name__):
        raise ValueError(
            f"init_from={path_or_repo_id!r} holds a {kind}: only {ERWTransformer2DModel.__name__} and {SIT_PORT} can be "
            "fine-tuned here"
        )
    return *_load_transformer(folder / "transformer"), names


def _download(repo_id: str) -> Path:
    """The files of a pipeline in a Hub repo, or in a folder of it: `owner/repo/folder`; or one file: `owner/repo/file.pt`."""
    repo, subfolder = "/".join(repo_id.split("/")[:2]), "/".join(repo_id.split("/")[2:])
    if subfolder.endswith((".pt", ".pth", ".ckpt", ".safetensors")):
        return Path(hf_hub_download(repo, subfolder))
    files = ("model_index.json", "transformer/*.json", "transformer/*.safetensors")
    patterns = [f"{subfolder}/{name}" if subfolder else name for name in files]
    return Path(snapshot_download(repo, allow_patterns=patterns)) / subfolder


def _load_port(folder: Path) -> ERWTransformer2DModel:
    """SiT in diffusers' layout: its tensors have the names of SiT's own files, and its config says the number of heads."""
    config = json.loads((folder / "config.json").read_text())
    files = sorted(
        path for path in folder.glob("*.safetensors") if re.fullmatch(r"\w+(-\d+-of-\d+)?", path.stem)
    )  # no variants such as fp16
    if not files:
        raise ValueError(f"{folder} has no .safetensors file; pickled weights are not read")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read, it may be truncated: {error}") from error
    keys = {"num_heads": "num_attention_heads", "input_size": "sample_size", "patch_size": "patch_size"}
    architecture = {ours: config[theirs] for theirs, ours in keys.items() if theirs in config}
    return build_model(read_checkpoint(state, {**architecture, "time_reversed": True}))  # as in SiT, t = 1 is data


def _as_ours(model: ERWTransformer2DModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return dict(model.config), model.state_dict()


def _load_transformer(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    model, info = ERWTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    # from_pretrained would only warn, leave random what is missing, and drop what is not expected.
    if info["missing_keys"]:
        raise ValueError(f"{folder} lacks {info['missing_keys']}")
    if others := [name for name in info["unexpected_keys"] if ".to_qkv." not in name]:  # a copy, of fused projections
        raise ValueError(
            f"{folder} holds {len(others)} tensors that the model of its config lacks, such as {others[0]}"
        )
    return _as_ours(model)


def _check_same_model(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], kind: str, may_differ: Collection[str]
) -> None:
    """Tensors of the same shapes can still belong to another model: heads, rotary embeddings, norms."""
    for name, value in ours.items():
        if name not in may_differ and theirs.get(name, value) != value:
            raise ValueError(f"the {kind} was made with {name}={theirs[name]!r}, the config has {value!r}")
