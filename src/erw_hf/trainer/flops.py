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
"""What a step costs, counted by torch's own FLOP counter on the meta device: nothing is computed or allocated."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from erw_hf.encoders import RepresentationEncoder
from erw_hf.objective import AlignedTransformer


# Dense bf16 FLOP/s by what a device's name contains, from the makers' data sheets (without sparsity).
PEAK_FLOPS = {
    "H100 PCIe": 756e12,  # of names that contain another the longer one comes first
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float | None:
    """
    What MFU is a share of.

    Args:
        device (`torch.device`): Where a run computes.

    Returns:
        `float`, *optional*: Dense bf16 FLOP/s of one GPU, whatever the precision of the run; `None` for a device that
        [`PEAK_FLOPS`] does not know, and for CPUs.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def count_step_flops(model: AlignedTransformer, encoders: Sequence[RepresentationEncoder]) -> int:
    """
    Floating-point operations of training on one image: forward and backward of the model and its projectors, forward of
    the encoders. One multiply-add counts as two. Element-wise operations are not counted, as is usual.

    Args:
        model ([`AlignedTransformer`]): The model of a phase; in warmup mode only the blocks that run are counted.
        encoders (`Sequence[RepresentationEncoder]`): The encoders that the step runs; may be empty.

    Returns:
        `int`: FLOPs for each image of a step. An optimizer step is not counted: it does not grow with the batch.
    """
    transformer: Any = model.transformer
    config = transformer.config
    # What gradient checkpointing computes again is no work of the model's, and would run outside `functional_call`.
    checkpointing, transformer.gradient_checkpointing = transformer.gradient_checkpointing, False
    with FlopCounterMode(display=False) as counter:
        x = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
        t = torch.empty(1, device="meta")
        labels = torch.zeros(1, dtype=torch.long, device="meta")
        class_token = None
        if config.class_token_dim is not None:
            class_token = torch.empty(1, config.class_token_dim, device="meta")
        velocity, projected, class_velocity = functional_call(model, _on_meta(model), (x, t, labels, t, class_token))
        outputs = [output for output in (velocity, *projected, class_velocity) if output is not None]
        torch.autograd.backward([output.sum() for output in outputs])
        for encoder in encoders:
            images = torch.empty(1, 3, encoder.image_size, encoder.image_size, device="meta")
            functional_call(encoder, _on_meta(encoder), (images,))
    transformer.gradient_checkpointing = checkpointing
    return counter.get_total_flops()


def _on_meta(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
