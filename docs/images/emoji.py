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
"""Draws docs/images/emoji.png, few_steps.png and, with the adapter of the tutorial, lora.png. No picture is picked.

python docs/images/emoji.py outputs/mammals/lora
"""

import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw, ImageFont

from erw_hf import ERWPipeline, FlowMatchHeunScheduler


HERE = Path(__file__).parent
CLASSES = [
    "face-smiling", "face-affection", "face-concerned", "cat-face", "animal-mammal", "animal-bird", "plant-flower", "food-fruit",
    "food-sweet", "clothing", "transport-ground", "place-building", "musical-instrument", "heart",
]  # fmt: skip
SIDE, TOP = 64, 34  # of a picture and of the titles, in pixels


def draw(pipe: ERWPipeline, labels: list[str], first_seed: int, num_inference_steps: int = 50) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(first_seed + i) for i in range(len(labels))]
    return pipe(class_labels=labels, generator=generators, num_inference_steps=num_inference_steps).images


def sheet(path: Path, rows: list[tuple[str, list[Image.Image]]], titles: list[str], margin: int) -> None:
    """Saves named rows of pictures below titles, which are spread over the columns."""
    columns, top = len(rows[0][1]), TOP if titles else 0
    canvas = Image.new("RGB", (margin + columns * (SIDE + 4), top + len(rows) * (SIDE + 4)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for i, title in enumerate(titles):
        place = (margin + (i + 0.5) * columns / len(titles) * (SIDE + 4), TOP / 2)
        pen.text(place, title, "black", font, anchor="mm", align="center")
    for y, (name, images) in enumerate(rows):
        pen.text((4, top + (y + 0.5) * (SIDE + 4)), name, "black", font, anchor="lm")
        for x, image in enumerate(images):
            canvas.paste(image, (margin + x * (SIDE + 4), top + y * (SIDE + 4)))
    canvas.save(path, optimize=True)


pipe = ERWPipeline.from_pretrained(HERE / "../../pipelines/erw-emoji")
sde, pipe.scheduler = pipe.scheduler, FlowMatchHeunScheduler()
rows = [("", draw(pipe, CLASSES, row * len(CLASSES), 25)) for row in range(4)]
sheet(HERE / "emoji.png", rows, [name.replace("-", "\n", 1) for name in CLASSES], margin=0)

rows = []
for name, scheduler in (
    ("Euler (diffusers)", FlowMatchEulerDiscreteScheduler()), ("Heun", FlowMatchHeunScheduler()), ("SDE", sde),
):  # fmt: skip
    pipe.scheduler = scheduler
    row = [image for steps in (10, 25, 50) for image in draw(pipe, CLASSES[:9:2], 0, steps)]
    rows.append((name, row))
sheet(HERE / "few_steps.png", rows, ["10 steps", "25 steps", "50 steps"], margin=110)

if len(sys.argv) > 1:
    pipe.scheduler = FlowMatchHeunScheduler()
    generic = draw(pipe, ["animal-mammal"] * 14, 0, 25)
    pipe.load_lora_weights(sys.argv[1])
    adapted = draw(pipe, ["mammals"] * 14, 0, 25)
    sheet(HERE / "lora.png", [("", generic), ("", adapted)], [], margin=0)
