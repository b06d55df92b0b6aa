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

How they are read, tensor by tensor, is in `erw_hf.conversion`.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

from erw_hf.conversion import build_model, convert_checkpoint, read_checkpoint


__all__ = ["convert_checkpoint", "main"]


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
        model = build_model(converted)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    model.save_pretrained(args.output_dir)
    if converted.projectors:
        save_file(converted.projectors, Path(args.output_dir) / "projectors.safetensors")
    print(f"wrote {args.output_dir}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    print("dropped on purpose:", ", ".join(converted.dropped) or "nothing")


if __name__ == "__main__":
    main()
