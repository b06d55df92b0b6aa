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
"""The weights that a run starts from: an earlier run's warmup (`--warmup_from`) or its whole pipeline (`--init_from`)."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from erw_hf.conversion import read_checkpoint
from erw_hf.data.folder import nfc
from erw_hf.encoders import resample_positions
from erw_hf.transformer_erw import ERWTransformer2DModel
from erw_hf.warmup import build_warmup_transformer


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
    The state dict of a warmed-up [`AlignedTransformer`], for [`~warmup.hand_over`].

    Args:
        path_or_repo_id (`str`): A warmup that a run saved, in a folder or on the Hub, or a published `.pt` file of ERW.
        model_config (`Mapping[str, Any]`): Arguments of the model that will start from it.

    Raises:
        ValueError: if it is not a warmup, or belongs to another model.
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
    The weights of a trained pipeline, to fine-tune on other data, other classes or another image size.

    Args:
        path_or_repo_id (`str`): A pipeline's folder, a run's, or a Hub repo.
        model_config (`Mapping[str, Any]`): Arguments of the model that will start from it.
        id2label (`Mapping[int, str]`, *optional*): Names of the new data's classes.

    Returns:
        `dict[str, torch.Tensor]`: State dict of the [`ERWTransformer2DModel`]. A class whose name the pipeline knows keeps its
        embedding. If either side lacks names, ids count as names, and classes are the same only if their number is. Any
        other class starts with the null class's embedding. A learned table of positions is resampled.

    Raises:
        ValueError: if it is not a pipeline, or belongs to another model.
    """
    folder = Path(path_or_repo_id)
    if not folder.exists():
        folder = Path(snapshot_download(path_or_repo_id, allow_patterns=["model_index.json", "transformer/*"]))
    folder = folder / "pipeline" if (folder / "pipeline" / "model_index.json").is_file() else folder
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"init_from={path_or_repo_id!r} is not a pipeline: name the `pipeline` folder of a run, or its repo"
        )
    config, state = _load_transformer(folder / "transformer")
    _check_same_model(
        config, model_config, "pipeline", may_differ=("sample_size", "num_classes", "class_dropout_prob")
    )
    theirs = json.loads((folder / "model_index.json").read_text()).get("id2label") or {}
    theirs = {class_id: nfc(label) for class_id, label in theirs.items()}  # as ours are read
    ours = {str(class_id): nfc(label) for class_id, label in (id2label or {}).items()}
    count, null_class = model_config["num_classes"], config["num_classes"]
    if not (theirs and ours):
        numbers = {str(class_id): str(class_id) for class_id in range(count)}
        theirs, ours = (numbers, numbers) if count == null_class else ({}, {})
    if theirs == ours:  # repeated names, such as ImageNet's "crane", keep their ids
        theirs = ours = {class_id: class_id for class_id in ours}
    known = {label: int(class_id) for class_id, label in theirs.items()}
    rows = [known.get(ours.get(str(class_id)), null_class) for class_id in range(count)]
    state[CLASS_TABLE] = state[CLASS_TABLE][[*rows, null_class]]
    if POSITIONS in state:
        state[POSITIONS] = resample_positions(
            state[POSITIONS], model_config["sample_size"] // model_config["patch_size"]
        )
    return state


def _load_transformer(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    model, info = ERWTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    if info["missing_keys"]:  # from_pretrained would only warn and leave them random
        raise ValueError(f"{folder} lacks {info['missing_keys']}")
    return dict(model.config), model.state_dict()


def _check_same_model(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], kind: str, may_differ: Collection[str]
) -> None:
    """Tensors of the same shapes can still belong to another model: heads, rotary embeddings, norms."""
    for name, value in ours.items():
        if name not in may_differ and theirs.get(name, value) != value:
            raise ValueError(f"the {kind} was made with {name}={theirs[name]!r}, the config has {value!r}")
