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
"""The `lora` folder of a run: its adapter, as `ERWPipeline.load_lora_weights` reads it."""

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData
from safetensors.torch import save_file

from erw_hf.files import folder_written_whole
from erw_hf.hub.public import is_hub_id
from erw_hf.names import names_hub_file
from erw_hf.pipeline_erw import CLASS_EMBEDDINGS, ERWPipeline
from erw_hf.trainer.initialization import CLASS_TABLE
from erw_hf.trainer.phase import Phase


def save_lora(phase: Phase, id2label: Mapping[int, str] | None, base_model: str | None, folder: Path) -> None:
    """Writes the adapter of a run with `lora_rank`, with its averaged weights, the embeddings and names of the new
    classes, and a card."""
    assert phase.ema is not None
    averages = {name: tensor.cpu().contiguous() for name, tensor in phase.ema.weights().items()}
    layers = {name.replace(".default.", "."): tensor for name, tensor in averages.items() if ".lora_" in name}
    new = phase.inputs.accelerator.unwrap_model(phase.model).new_classes.flatten().nonzero().flatten().tolist()
    names = [id2label[class_id] for class_id in new] if id2label else None
    base = base_model or ""
    on_hub = is_hub_id(base) or names_hub_file(base)
    data = ModelCardData(
        base_model="/".join(base.split("/")[:2]) if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["lora", "adapter", "class-conditional"],
    )
    named = base if on_hub else Path(base).name
    classes = f" New classes: {', '.join(names)}." if names else ""
    loads, this = (base if is_hub_id(base) else "BASE"), phase.inputs.config.hub_model_id or "THIS"
    meant = [f"`BASE` is a pipeline of `{named}`"] * (loads == "BASE") + ["`THIS` is this folder"] * (this == "THIS")
    draw = f"\nimages = pipe(class_labels={names[:1]!r}).images" if names else ""
    text = (
        f"# A LoRA adapter\n\nRank {phase.inputs.config.lora_rank}, of `{named}`.{classes}\n\n```py\n"
        f'from erw_hf import ERWPipeline\n\npipe = ERWPipeline.from_pretrained("{loads}")\n'
        f'pipe.load_lora_weights("{this}"){draw}\n```\n' + (f"\n{', '.join(meant)}.\n" if meant else "")
    )
    with folder_written_whole(folder) as written:
        ERWPipeline.save_lora_weights(
            written,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=phase.transformer.peft_config["default"].to_dict(),
        )
        if new:
            metadata = {} if names is None else {"names": json.dumps(names)}
            save_file({"class_embeddings": averages[CLASS_TABLE][new]}, written / CLASS_EMBEDDINGS, metadata=metadata)
        (written / "README.md").write_text(f"---\n{data}\n---\n\n{text}", encoding="utf-8")
