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

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from erw_hf.data.latents import encode_moments, image_channels
from erw_hf.encoders import RepresentationEncoder, on_meta
from erw_hf.objective import AlignedTransformer


class Card(NamedTuple):
    """A GPU, from its maker's data sheet: dense FLOP/s in bf16 without sparsity (in fp16 for GPUs older than bf16),
    and memory in GB of 10^9 bytes, of the smallest where it comes in several sizes."""

    flops: float
    memory: int


# By words of the device's name; where several fit, the longest counts.
CARDS = {
    "B300": Card(2250e12, 270),
    "GB200": Card(2500e12, 186),
    "B200": Card(2250e12, 180),
    "GH200": Card(989e12, 96),
    "H200 NVL": Card(835e12, 141),
    "H200": Card(989e12, 141),
    "H100 NVL": Card(835e12, 94),
    "H100 PCIe": Card(756e12, 80),
    "H100": Card(989e12, 80),
    "H800 PCIe": Card(756e12, 80),
    "H800": Card(989e12, 80),
    "H20": Card(148e12, 96),
    "A100": Card(312e12, 40),
    "A800": Card(312e12, 40),
    "A40": Card(150e12, 48),
    "A30": Card(165e12, 24),
    "A10G": Card(70e12, 24),
    "A10": Card(125e12, 24),
    "L40S": Card(362e12, 48),
    "L40": Card(181e12, 48),
    "L4": Card(121e12, 24),
    "V100": Card(125e12, 16),
    "T4": Card(65e12, 16),
    "RTX PRO 6000": Card(504e12, 96),
    "RTX 6000 Ada": Card(364e12, 48),
    "RTX A6000": Card(155e12, 48),
    "RTX 5090": Card(210e12, 32),
    "RTX 4090": Card(165e12, 24),
    "RTX 3090": Card(71e12, 24),
    "MI325X": Card(1307e12, 256),
    "MI300X": Card(1307e12, 192),
}


def card_of(name: str) -> Card | None:
    """The GPU that a driver calls, for example, `"NVIDIA A100-SXM4-80GB"`; `None` if [`CARDS`] lacks it, for a part of
    one (MIG), and for a laptop's, which has another chip under the same name."""
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", name):
        return None
    found = [card for card in CARDS if re.search(rf"\b{card}\b", name)]
    return CARDS[max(found, key=len)] if found else None


def card_named(name: str) -> str:
    """
    Args:
        name (`str`): A GPU as people write it: `"rtx4090"`, `"NVIDIA A100"`.

    Returns:
        `str`: Its name in [`CARDS`].

    Raises:
        ValueError: for one that is not there, with those that are.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]|nvidia|geforce", "", text.lower())

    found = {plain(card): card for card in CARDS}
    card = found.get(plain(name)) or found.get(f"rtx{plain(name)}")
    if card is None:
        raise ValueError(f"gpu={name!r} is not in the table of cards: {', '.join(CARDS)}; or cpu")
    return card


def peak_flops(device: torch.device) -> float | None:
    """What MFU is a share of: dense bf16 FLOP/s of one GPU, whatever the precision of the run. `None` for CPUs and
    GPUs that [`card_of`] does not know."""
    if device.type != "cuda":
        return None
    card = card_of(torch.cuda.get_device_name(device))
    return None if card is None else card.flops


def count_step_flops(model: AlignedTransformer, encoders: Sequence[RepresentationEncoder]) -> int:
    """FLOPs of training on one image: forward and backward of the model and its projectors, forward of the encoders
    that the step runs. In warmup mode only the blocks that run count. One multiply-add counts as two; element-wise
    operations and the optimizer are not counted, as is usual."""
    transformer: Any = model.transformer
    config = transformer.config
    # Recomputation by gradient checkpointing does not count, and it would run outside `functional_call`.
    checkpointing, transformer.gradient_checkpointing = transformer.gradient_checkpointing, False
    with FlopCounterMode(display=False) as counter:
        x = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
        t = torch.empty(1, device="meta")
        labels = torch.zeros(1, dtype=torch.long, device="meta")
        class_token = None
        if config.class_token_dim is not None:
            class_token = torch.empty(1, config.class_token_dim, device="meta")
        velocity, projected, class_velocity = functional_call(model, on_meta(model), (x, t, labels, t, class_token))
        outputs = [output for output in (velocity, *projected, class_velocity) if output is not None]
        torch.autograd.backward([output.sum() for output in outputs])
    transformer.gradient_checkpointing = checkpointing
    return counter.get_total_flops() + sum(map(count_encoder_flops, encoders))


def count_encoder_flops(encoder: RepresentationEncoder) -> int:
    """FLOPs of the encoder's tokens of one image, counted as in [`count_step_flops`]."""
    with FlopCounterMode(display=False) as counter:
        images = torch.empty(1, 3, encoder.image_size, encoder.image_size, device="meta")
        functional_call(encoder, on_meta(encoder), (images,))
    return counter.get_total_flops()


def count_vae_flops(vae: ModelMixin | None, image_size: int) -> int:
    """FLOPs of encoding one image of `image_size` pixels, counted as in [`count_step_flops`]; 0 without an
    autoencoder. Its weights are not read."""
    if vae is None:
        return 0
    with torch.device("meta"):
        plain = type(vae).from_config(vae.config)  # whose encoder is not compiled
        images = torch.zeros(1, image_channels(vae), image_size, image_size, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter:
            encode_moments(images, plain)
    return counter.get_total_flops()
