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
"""Command that converts checkpoints of SiT, REPA, REG, ERW and LightningDiT to models of this library.

python -m erw_hf.hub.convert --checkpoint last.pt --output_dir out

`erw_hf.conversion` does the work, tensor by tensor.
"""

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from erw_hf.conversion import Converted, build_model, convert_checkpoint, read_checkpoint
from erw_hf.names import resolve_flags
from erw_hf.transformer_erw import ERWTransformer2DModel


__all__ = ["convert_checkpoint", "main"]


def main(arguments: list[str] | None = None) -> None:
    """The command line. For a checkpoint that cannot be converted or written, it ends with a message and writes
    nothing."""
    parser = argparse.ArgumentParser(prog="python -m erw_hf.hub.convert", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help=".pt or .safetensors file")
    parser.add_argument("--output_dir", required=True, help="folder for the model and projectors.safetensors")
    parser.add_argument(
        "--architecture",
        type=_json_dict,
        default={},
        help="JSON of what is inferred wrongly, for instance '{\"num_attention_heads\": 8}'",
    )
    args = parser.parse_args(arguments)
    resolve_flags(parser, args, ["checkpoint", "output_dir"])
    try:
        if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
            raise ValueError(f"--output_dir {args.output_dir} is a file: name a folder")
        source = Path(args.checkpoint).resolve()
        if source.parent == Path(args.output_dir).resolve() and source.name.startswith("diffusion_pytorch_model"):
            raise ValueError(f"--output_dir {args.output_dir} would replace the checkpoint: choose another folder")
        converted = read_checkpoint(args.checkpoint, args.architecture)
        model = build_model(converted)
        _write(model, converted, Path(args.output_dir))
    except (ValueError, OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            Path(args.output_dir).rmdir()  # if empty
        parser.exit(1, f"error: {error}\n")
    print(f"wrote {args.output_dir}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    print(*converted.facts, sep="\n")
    print("dropped on purpose:", ", ".join(converted.dropped) or "nothing")


def _json_dict(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _write(model: ERWTransformer2DModel, converted: Converted, output_dir: Path) -> None:
    """Writes all files or none: an earlier conversion stays until the new one is complete, then it is removed."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=output_dir) as folder:
        model.save_pretrained(folder)
        if converted.projectors:
            save_file(converted.projectors, Path(folder) / "projectors.safetensors")
        for old in (*output_dir.glob("diffusion_pytorch_model*"), output_dir / "projectors.safetensors"):
            old.unlink(missing_ok=True)
        for path in Path(folder).iterdir():
            path.replace(output_dir / path.name)


if __name__ == "__main__":
    main()
