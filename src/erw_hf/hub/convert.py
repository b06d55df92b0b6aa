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
"""Checkpoints of SiT, REPA, REG, ERW and LightningDiT as models of this library.

python -m erw_hf.hub.convert --checkpoint last.pt --output_dir out

How they are read, tensor by tensor, is in `erw_hf.published`.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from erw_hf.published import Converted, read_checkpoint
from erw_hf.transformer_erw import ERWTransformer2DModel


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
    return _build(read_checkpoint(path_or_state_dict, architecture))


def _build(converted: Converted) -> ERWTransformer2DModel:
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


def main(arguments: list[str] | None = None) -> None:
    """The command line.

    Args:
        arguments (`list[str]`, *optional*): Arguments. Defaults to `sys.argv[1:]`.

    Raises:
        SystemExit: with a message, for a checkpoint that cannot be converted; nothing is written then.
    """
    parser = argparse.ArgumentParser(prog="python -m erw_hf.hub.convert", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help=".pt or .safetensors file")
    parser.add_argument("--output_dir", required=True, help="folder for the model and projectors.safetensors")
    parser.add_argument(
        "--architecture", type=json.loads, default={}, help="JSON, for instance '{\"num_attention_heads\": 8}'"
    )
    args = parser.parse_args(arguments)
    try:
        converted = read_checkpoint(args.checkpoint, args.architecture)
        model = _build(converted)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    model.save_pretrained(args.output_dir)
    if converted.projectors:
        save_file(converted.projectors, Path(args.output_dir) / "projectors.safetensors")
    print(f"wrote {args.output_dir}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    print("dropped on purpose:", ", ".join(converted.dropped) or "nothing")


if __name__ == "__main__":
    main()
