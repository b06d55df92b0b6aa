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
"""Gradio demo of an ERW pipeline: choose a class, see pictures. Default: the digits that this repository trained.

Set ERW_MODEL to a Hub id or a folder to serve another exported pipeline.
"""

import os
import random
from pathlib import Path

import gradio as gr
import torch

from erw_hf import ERWPipeline


DEFAULT_MODEL = Path(__file__).parents[2] / "pipelines" / "erw-digits"
MAX_IMAGES = 16

pipe = ERWPipeline.from_pretrained(os.environ.get("ERW_MODEL", DEFAULT_MODEL))
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
CHOICES = sorted(pipe.labels, key=pipe.labels.get) or [str(i) for i in range(pipe.transformer.config.num_classes)]


def generate(
    label: str,
    num_images: int = 8,
    seed: int = 0,
    guidance_scale: float = 1.8,
    guidance_low: float = 0.0,
    guidance_high: float = 0.7,
    num_inference_steps: int = 50,
    progress=gr.Progress(),
) -> list[tuple]:
    """Draws images of a class.

    Args:
        label: Name of a class, or its id.
        num_images: Number of images, up to 16.
        seed: Seed of the first image; each further one has the next seed.
        guidance_scale: Classifier-free guidance, 1 for none.
        guidance_low: Flow time from which guidance applies.
        guidance_high: Flow time up to which guidance applies.
        num_inference_steps: Sampling steps.
    """
    num_images, seed = min(int(num_images), MAX_IMAGES), int(seed)
    try:
        labels = label if label in pipe.labels else int(label)
    except ValueError:
        labels = label  # the pipeline says which names are near
    try:
        images = pipe(
            class_labels=[labels] * num_images,
            num_inference_steps=int(num_inference_steps),
            guidance_scale=guidance_scale,
            guidance_interval=(guidance_low, guidance_high),
            generator=[torch.Generator().manual_seed(seed + i) for i in range(num_images)],
            callback_on_step_end=lambda pipe, step, t, kwargs: (progress((step + 1, pipe.num_timesteps)), {})[1],
        ).images
    except ValueError as error:
        raise gr.Error(str(error)) from error
    side = max(images[0].width, 128)
    return [(image.resize((side, side), 0), f"{label}, seed {seed + i}") for i, image in enumerate(images)]


with gr.Blocks(title="ERW") as demo:
    gr.Markdown("# ERW: pictures from a warmed-up diffusion transformer")
    with gr.Row():
        with gr.Column(scale=1):
            label = gr.Dropdown(CHOICES, value=CHOICES[0], label="Class", allow_custom_value=True)
            shuffle = gr.Button("Random class", size="sm")
            num_images = gr.Slider(1, MAX_IMAGES, 8, step=1, label="Images")
            seed = gr.Number(0, label="Seed of the first image", precision=0)
            with gr.Accordion("Sampling", open=False):
                scale = gr.Slider(1.0, 5.0, 1.8, step=0.1, label="Guidance scale")
                low = gr.Slider(0.0, 1.0, 0.0, step=0.05, label="Guidance from t")
                high = gr.Slider(0.0, 1.0, 0.7, step=0.05, label="Guidance up to t")
                steps = gr.Slider(2, 250, 50, step=1, label="Steps")
            with gr.Row():
                run = gr.Button("Generate", variant="primary")
                stop = gr.Button("Stop")
        gallery = gr.Gallery(label="Images", columns=4, format="png", scale=2)
    shuffle.click(lambda: random.choice(CHOICES), outputs=label, api_visibility="private")
    event = run.click(
        generate, [label, num_images, seed, scale, low, high, steps], gallery, api_name="generate", concurrency_limit=1
    )
    stop.click(None, cancels=event, api_visibility="private")


if __name__ == "__main__":
    demo.queue(max_size=64).launch(ssr_mode=False)
