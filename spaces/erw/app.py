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
"""Gradio demo of exported ERW pipelines: choose a class, see pictures, compare checkpoints, watch a picture form.

Environment variables, which only the owner of the demo sets:
    ERW_MODEL: Hub id or folder of an exported pipeline; by default the emoji and the digits of the erw-hf repository.
    ERW_MODELS: More of them, separated by commas or lines, to choose from and to compare.

A pipeline is loaded by running the code in its repo, so erw_hf need not be installed. Visitors choose among the models
loaded at the start and cannot load others.
"""

import functools
import html
import importlib.util
import itertools
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
import types
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


try:
    from spaces import GPU  # must come before torch: ZeroGPU lends a GPU to each call of a function marked with it
except ImportError:
    GPU = None

import gradio as gr
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from gradio.processing_utils import encode_pil_to_bytes, hash_bytes
from PIL import Image


HERE = Path(__file__).resolve().parent
SHIPPED = [HERE / "../../pipelines" / name for name in ("erw-emoji", "erw-digits")]
MAX_IMAGES, MAX_SEED, MAX_STEPS, MAX_REMEMBERED = 16, 2**31 - 1, 250, 48
FRAMES = 7  # pictures on the way; with the final one they fill two rows
OPENS_WITH = "face-smiling"  # instead of the first class, where a model has it
SAMPLERS = {"sde": "SDE, Euler-Maruyama", "euler": "ODE, Euler", "heun": "ODE, Heun"}
# What a slider allows and the API accepts: lowest, highest, step, default, what the visitor reads.
RANGES = {
    "num_images": (1, MAX_IMAGES, 1, 8, "Images"),
    "seed": (0, MAX_SEED, 1, 0, "First seed"),
    "guidance_scale": (1.0, 8.0, 0.1, 1.8, "Guidance scale"),
    "guidance_low": (0.0, 1.0, 0.05, 0.0, "Guidance from t"),
    "guidance_high": (0.0, 1.0, 0.05, 0.7, "Guidance up to t"),
    "num_inference_steps": (1, MAX_STEPS, 1, 50, "Steps"),
}
NO_CLASS = "no class"  # the only choice of an unconditional model
LINKED = ["label", *RANGES, "sampler", "model"]  # what a link holds, in the order of the controls

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cuda first: ZeroGPU emulates it
if DEVICE == "cpu" and torch.accelerator.is_available():
    DEVICE = torch.accelerator.current_accelerator().type


class Frame(NamedTuple):
    """After `call` of `calls` model calls: x_t at time `t`, and the x_0 that the model predicts from it."""

    call: int
    calls: int
    t: float
    noisy: list[Image.Image] | None = None
    clean: list[Image.Image] | None = None


def load_models() -> dict[str, DiffusionPipeline]:
    """Loads the models that the owner serves, by short name, the default one first."""
    first = os.environ.get("ERW_MODEL", "").strip()
    served = [first] if first else [str(folder) for folder in SHIPPED if folder.is_dir()]
    if not served:
        raise SystemExit("set ERW_MODEL to the Hub id or the folder of an exported ERW pipeline")
    more = re.split(r"[,\n]", os.environ.get("ERW_MODELS", ""))
    models = {}
    for source in dict.fromkeys(map(whole_path, [*served, *filter(None, map(str.strip, more))])):
        path = Path(source)  # a run's folder is named by the run: outputs/quickstart/pipeline is "quickstart"
        name = path.parent.name if path.name == "pipeline" else path.name
        models[source if name in models else name] = load_model(source)
    return models


def whole_path(source: str) -> str:
    """A folder by its whole path, since "." has no name; a Hub id as it is."""
    folder = os.path.abspath(os.path.expanduser(source))
    return folder if os.path.isdir(folder) else source


def load_model(source: str) -> DiffusionPipeline:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    try:
        pipe = DiffusionPipeline.from_pretrained(source, custom_pipeline=source, trust_remote_code=True, dtype=dtype)
        if not hasattr(pipe, "get_label_ids"):
            raise ValueError(f"it is a {type(pipe).__name__}")
    except Exception as error:  # for the owner, in the Space's log
        reason = " ".join(str(error).split())[:300]
        raise SystemExit(f"{source!r} (ERW_MODEL or ERW_MODELS) is not an exported ERW pipeline: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    print(f"{source}: on {DEVICE}, {str(dtype).removeprefix('torch.')}", flush=True)
    return pipe.to(DEVICE)


def class_choices(pipe: DiffusionPipeline) -> list[tuple[str, str]]:
    """(text in the searchable list, value) of every class, in the order of the ids."""
    names = pipe.config.id2label or {}
    choices = []
    for class_id in range(pipe.transformer.config.num_classes):
        name = unicodedata.normalize("NFC", names.get(str(class_id), str(class_id))).strip()
        value = name if pipe.labels.get(name) == class_id else str(class_id)  # ImageNet has two cranes
        if pipe.labels.get(value, class_id) != class_id:  # the name of another class
            value = f"{name} ({class_id})"
        choices.append((name if name == str(class_id) else f"{name} ({class_id})", value))
    return choices or [(NO_CLASS, NO_CLASS)]


def first_class(model: str) -> str:
    values = [value for _, value in CHOICES[model]]
    return OPENS_WITH if OPENS_WITH in values else values[0]


def samplers_of(pipe: DiffusionPipeline) -> list[str]:
    """Samplers for a model, its default first. SDE and Heun travel in the model's repo, if its scheduler is one of them."""
    shipped = sys.modules[type(pipe.scheduler).__module__]
    if not hasattr(shipped, "FlowMatchHeunScheduler"):
        return ["euler"]
    # By name: each model that is loaded defines the classes of this module anew.
    default = "heun" if type(pipe.scheduler).__name__ == "FlowMatchHeunScheduler" else "sde"
    return sorted(SAMPLERS, key=lambda name: name != default)


MODELS = load_models()
MODEL = next(iter(MODELS))
CHOICES = {name: class_choices(pipe) for name, pipe in MODELS.items()}
SAMPLER = samplers_of(MODELS[MODEL])[0]


def refuse(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


def checked_number(name: str, value) -> int | float:
    low, high, step, _, title = RANGES[name]
    try:
        number = float("not a number" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise refuse(f"{title} must be a number, got {str(value)[:40]!r}") from None
    if not low <= number <= high:
        raise refuse(f"{title} must lie between {low} and {high}, got {str(value)[:40]}")
    if step == 1 and number != int(number):
        raise refuse(f"{title} must be a whole number, got {str(value)[:40]}")
    return int(number) if step == 1 else number


def class_id(settings: dict) -> int:
    return [value for _, value in CHOICES[settings["model"]]].index(settings["label"])


def checked_class(model: str, label) -> str:
    """The value of a class in the list of choices, from its name or its id."""
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise refuse(f"Class must be a name or an id, got {str(label)[:40]!r}")
    pipe, text = MODELS[model], str(label).strip()
    if text in [value for _, value in CHOICES[model]]:  # of any length
        return text
    text = text[:100]
    if CHOICES[model] == [(NO_CLASS, NO_CLASS)]:
        if text not in ("", "0", NO_CLASS):
            raise refuse(f"{model} has no classes: choose {NO_CLASS!r}")
        return NO_CLASS
    if text not in pipe.labels and text.isascii() and text.isdigit():
        if int(text) >= len(CHOICES[model]):
            raise refuse(f"{model} has the classes 0 to {len(CHOICES[model]) - 1}, not {text[:40]}")
        return CHOICES[model][int(text)][1]
    try:
        return CHOICES[model][pipe.get_label_ids(text)[0]][1]
    except ValueError as error:
        raise refuse(str(error)) from error


def checked(label, *numbers_sampler_model) -> dict:
    """The settings by name, checked; raises a `gr.Error` that says what to do."""
    *numbers, sampler, model = numbers_sampler_model
    for title, value, known in (("Model", model, MODELS), ("Sampler", sampler, SAMPLERS)):
        if not isinstance(value, str) or value not in known:
            raise refuse(f"{title} must be one of {', '.join(known)}, got {str(value)[:40]!r}")
    if sampler not in samplers_of(MODELS[model]):
        raise refuse(f"{model} has no {SAMPLERS[sampler]} sampler: choose {SAMPLERS[samplers_of(MODELS[model])[0]]}")
    values = {name: checked_number(name, value) for name, value in zip(RANGES, numbers, strict=True)}
    if values["guidance_low"] > values["guidance_high"]:
        raise refuse("Guidance from t must not be greater than Guidance up to t")
    return {"label": checked_class(model, label), **values, "sampler": sampler, "model": model}


def new_scheduler(pipe: DiffusionPipeline, sampler: str):
    """A new scheduler for each call, since it counts the steps."""
    config = pipe.scheduler.config
    if sampler == "euler":
        if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
            return type(pipe.scheduler).from_config(config)
        shift = config.get("shift", config.get("flow_shift", 1.0))
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=shift)
    if sampler not in samplers_of(pipe):
        raise refuse(f"This model has no {SAMPLERS[sampler]} sampler: choose {SAMPLERS['euler']}")
    shipped = sys.modules[type(pipe.scheduler).__module__]  # the file in the model's repo defines both
    if sampler == "sde" and type(pipe.scheduler).__name__ == "FlowMatchEulerMaruyamaScheduler":
        return type(pipe.scheduler).from_config(config)
    arguments = {"num_train_timesteps": config.num_train_timesteps, "path_type": config.get("path_type", "linear")}
    if sampler == "heun":
        return shipped.FlowMatchHeunScheduler(**arguments)
    return shipped.FlowMatchEulerMaruyamaScheduler(**arguments, sigma_last=config.get("sigma_last", 0.04))


def clean_prediction(path_type: str, velocity: torch.Tensor, latents: torch.Tensor, t: float) -> torch.Tensor:
    """The x_0 that a velocity points at: x_t = alpha x_0 + sigma e and v = d_alpha x_0 + d_sigma e, solved for x_0."""
    if path_type == "linear":
        return latents - t * velocity
    return math.cos(t * math.pi / 2) * latents - math.sin(t * math.pi / 2) * velocity / (math.pi / 2)


@torch.no_grad()
def decoded(pipe: DiffusionPipeline, latents: torch.Tensor) -> list[Image.Image]:
    images = pipe.decode_latents(latents).float()
    if not torch.isfinite(images).all():  # 8 bits would show it as black
        raise ValueError("the model returned NaN or infinity: its weights are broken or its precision is too low")
    return pipe.image_processor.postprocess(images, output_type="pil")


def watch(pipe: DiffusionPipeline, path_type: str, frames: queue.Queue, stopped: threading.Event) -> None:
    """Makes the scheduler's step put frames into a queue, some with images, and raise once `stopped` is set."""
    made = itertools.count()
    step = type(pipe.scheduler).step

    def images_of(latents):
        if latents.ndim == 2:  # a row of latents and class token
            latents, _ = pipe.split_state(latents)
        return decoded(pipe, latents)

    @functools.wraps(step)  # the pipeline inspects its arguments
    def watched(scheduler, velocity, timestep, latents, **kwargs):
        if stopped.is_set():
            raise InterruptedError
        call, calls = next(made), len(scheduler.timesteps)
        t = float(timestep) / scheduler.config.num_train_timesteps
        images = ()
        if call in {round(i * (calls - 1) / (FRAMES - 1)) for i in range(FRAMES)}:
            images = images_of(latents), images_of(clean_prediction(path_type, velocity, latents, t))
        frames.put(Frame(call, calls, t, *images))
        return step(scheduler, velocity, timestep, latents, **kwargs)

    # Bound, because the pipeline steps a copy of the scheduler.
    pipe.scheduler.step = types.MethodType(watched, pipe.scheduler)


@(GPU or (lambda function: function))
def sample(settings: dict) -> Iterator[Frame]:
    """Yields one frame per model call, some with pictures; the last one, at t = 0, holds the images.

    The pipeline runs in a thread, so that frames arrive while it works. Stop closes this generator and so ends the
    pipeline within one step. Each call has a new pipeline object around the shared weights, so calls share no state.
    """
    shared, count = MODELS[settings["model"]], settings["num_images"]
    scheduler = new_scheduler(shared, settings["sampler"])
    pipe = type(shared)(**{**shared.components, "scheduler": scheduler}, id2label=shared.config.id2label)
    pipe.set_progress_bar_config(disable=True)
    frames, stopped = queue.Queue(), threading.Event()
    # The model's path: diffusers' Euler steps knows none.
    watch(pipe, shared.scheduler.config.get("path_type", "linear"), frames, stopped)

    def work():
        try:
            latents = pipe(
                class_labels=[class_id(settings)] * count,
                num_inference_steps=settings["num_inference_steps"],
                guidance_scale=settings["guidance_scale"],
                guidance_interval=(settings["guidance_low"], settings["guidance_high"]),
                generator=[torch.Generator().manual_seed(nth_seed(settings, i)) for i in range(count)],
                output_type="latent",
            ).images
            images = decoded(pipe, latents)
            frames.put(Frame(pipe.num_timesteps, pipe.num_timesteps, 0.0, images, images))
        except Exception as error:  # raised below, in the thread that answers the visitor
            frames.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        t = 1.0
        while t > 0:
            frame = frames.get()
            if isinstance(frame, ValueError):
                raise refuse(f"No picture: {frame}")
            if isinstance(frame, Exception):
                raise frame
            yield frame
            t = frame.t
    finally:
        stopped.set()


def pictures(settings: dict, progress: gr.Progress, part=0, parts=1, pause: float = 0.2) -> Iterator[Frame]:
    """The frames with pictures, at least `pause` seconds apart; the progress bar covers part `part` of `parts`."""
    shown = time.monotonic()
    for frame in sample(settings):
        call, calls = part * frame.calls + frame.call, parts * frame.calls
        progress((call, calls), desc=f"Step {call} of {calls}", unit="steps")
        if frame.clean and (frame.t == 0 or time.monotonic() - shown >= pause):
            yield frame
            shown = time.monotonic()


def nth_seed(settings: dict, index: int) -> int:
    """The seed of the image at `index`; 0 follows the highest seed."""
    return (settings["seed"] + index) % (MAX_SEED + 1)


def caption(settings: dict, index: int = 0) -> str:
    return f"{settings['label'].split(',')[0]}, seed {nth_seed(settings, index)}"


def stored(image: Image.Image, name: str) -> str:
    """Path of an image in gradio's cache. gradio itself would rewrite a file while someone downloads it."""
    data = encode_pil_to_bytes(image, "png")
    path = Path(gallery.GRADIO_CACHE) / hash_bytes(data) / f"{name}.png"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{threading.get_ident()}")
        unfinished.write_bytes(data)
        unfinished.replace(path)
    return str(path)


def saved(images: list, settings: dict) -> list[tuple[str, str, dict]]:
    """(file, caption, settings that draw this image alone) for each image. The PNG also holds the settings, in its text `erw`."""
    entries = []
    for i, image in enumerate(images):
        own = {**settings, "seed": nth_seed(settings, i), "num_images": 1}
        image.info["erw"] = json.dumps(own)
        name = re.sub(r"\W+", "-", f"{own['model']}-{caption(own)}").lower()
        name = name.encode()[:200].decode(errors="ignore")  # file systems take 255 bytes
        entries.append((stored(image, name), caption(own), own))
    return entries


# The events below get raw values (`preprocess=False`), since gradio's own checks answer with Python errors.
# Their argument names form the API, and MCP clients read their docstrings.


def generate(
    label, num_images, seed, guidance_scale, guidance_low, guidance_high, num_inference_steps, sampler, model,
    progress=gr.Progress()
):  # fmt: skip
    """Draws several images of a class, one per seed from `seed` on. The other arguments are those of `draw`.

    Args:
        num_images: Number of images, 1 to 16.
    """
    settings = checked(
        label, num_images, seed, guidance_scale, guidance_low, guidance_high, num_inference_steps, sampler, model
    )
    for frame in pictures(settings, progress):
        entries = saved(frame.clean, settings)
        yield [entry[:2] for entry in entries], entries if frame.t == 0 else None


def draw(label, seed, guidance_scale, guidance_low, guidance_high, num_inference_steps, sampler, model):
    """Draws one image of a class.

    Args:
        label: Name of a class, or its id.
        seed: Seed of the image: the same seed and settings draw the same image.
        guidance_scale: Classifier-free guidance, 1 for none.
        guidance_low: Flow time from which guidance applies, 0 (picture) to 1 (noise).
        guidance_high: Flow time up to which guidance applies.
        num_inference_steps: Sampling steps, 1 to 250.
        sampler: sde, euler or heun.
        model: Name of one of the models served.
    """
    settings = checked(
        label, 1, seed, guidance_scale, guidance_low, guidance_high, num_inference_steps, sampler, model
    )
    *_, last = sample(settings)
    return saved(last.clean, settings)[0][0]


def compare(
    label, num_images, seed, guidance_scale, guidance_low, guidance_high, num_inference_steps, sampler, model,
    second_model, progress=gr.Progress()
):  # fmt: skip
    """Draws the same class and seeds with two models. Arguments as for `generate`.

    Args:
        second_model: Name of the model to compare with.
    """
    values = label, num_images, seed, guidance_scale, guidance_low, guidance_high, num_inference_steps, sampler
    both, made = [checked(*values, model), checked(*values, second_model)], [[], []]
    for i, settings in enumerate(both):
        for frame in pictures(settings, progress, i, 2):
            made[i] = saved(frame.clean, settings)
            yield *([entry[:2] for entry in side] for side in made), made[0] + made[1] if i and frame.t == 0 else None


def form(
    label, seed, guidance_scale, guidance_low, guidance_high, num_inference_steps, sampler, model,
    progress=gr.Progress()
):  # fmt: skip
    """Shows how one image forms: x_t, and the picture that the model predicts from it, from t = 1 (noise) to t = 0.

    Arguments as for `draw`.
    """
    settings = checked(
        label, 1, seed, guidance_scale, guidance_low, guidance_high, num_inference_steps, sampler, model
    )
    noisy, clean = [], []
    for frame in pictures(settings, progress, pause=0):
        for row, (image,), name in ((noisy, frame.noisy, "x_t"), (clean, frame.clean, "x_0")):
            row.append((stored(image, f"{name}-at-{frame.t:.2f}"), f"t = {frame.t:.2f}"))
        yield noisy, clean


def classes(model: str = MODEL) -> dict[str, int]:
    """Lists the classes of a model with their ids.

    Args:
        model: Name of one of the models served.
    """
    if not isinstance(model, str) or model not in MODELS:
        raise refuse(f"Model must be one of {', '.join(MODELS)}")
    return {value: i for i, (_, value) in enumerate(CHOICES[model])}


def remember(entries, remembered):
    remembered = [*(entries or []), *remembered][:MAX_REMEMBERED]
    return remembered, [entry[:2] for entry in remembered]


def controls_of(settings: dict) -> dict:
    """Updates that put settings into the controls, with the choices of their model, in the order of `LINKED`."""
    model = settings["model"]
    label = gr.Dropdown(CHOICES[model], value=settings["label"])
    return {**settings, "label": label, "sampler": gr.Radio(radio(model), value=settings["sampler"])}


def copy_back(remembered, event: gr.SelectData):
    settings = remembered[event.index][2]
    gr.Info(f"Settings of {html.escape(caption(settings))} restored.", duration=3)
    return *(value for name, value in controls_of(settings).items() if name != "num_images"), False


def read_link(request: gr.Request):
    """The settings in the page's address, and whether there are none."""
    known = request.query_params.get("model") in MODELS
    model = request.query_params["model"] if known else MODEL
    defaults = {"label": first_class(model), **{name: row[3] for name, row in RANGES.items()}}
    defaults |= {"sampler": samplers_of(MODELS[model])[0], "model": model}
    defaults["guidance_scale"] = guidance_of(model)
    linked = {name: value for name, value in request.query_params.items() if name in LINKED}
    try:
        settings = checked(*({**defaults, **linked}[name] for name in LINKED))
    except gr.Error as error:
        gr.Warning(f"The settings in this link do not work, so the defaults are shown. {html.escape(error.message)}")
        settings, linked = defaults, {}
    return *controls_of(settings).values(), not linked


SIDE = MODELS[MODEL].transformer.config.sample_size * MODELS[MODEL].vae_scale_factor
LOOK = ["pictures", "pixels"] if SIDE <= 64 else ["pictures"]  # style.css
GALLERY = {"columns": 4, "object_fit": "contain", "format": "png", "interactive": False, "elem_classes": LOOK}
BUTTONS = {"buttons": ["download", "download_all", "fullscreen"]}  # without "share", which contacts another host


def radio(model: str) -> list[tuple[str, str]]:
    return [(SAMPLERS[name], name) for name in samplers_of(MODELS[model])]


def guidance_of(model: str) -> float:
    """The default scale. Without a trained null class guidance spoils the pictures."""
    return 1.0 if MODELS[model].transformer.config.class_dropout_prob == 0 else RANGES["guidance_scale"][3]


def of_model(model: str, label, sampler: str, scale: float):
    """The controls whose choices depend on the model; a choice stays if the new model has it."""
    try:
        label = checked_class(model, label)
    except gr.Error:
        label = first_class(model)
    known = samplers_of(MODELS[model])
    sampler = sampler if sampler in known else known[0]
    scale = 1.0 if guidance_of(model) == 1 else scale
    return gr.Dropdown(CHOICES[model], value=label), gr.Radio(radio(model), value=sampler), scale


def slider(name: str) -> gr.Slider:
    low, high, step, default, title = RANGES[name]
    return gr.Slider(low, high, default, step=step, label=title)


with gr.Blocks(title="ERW: class to picture", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
    gr.Markdown(
        "# Draw with ERW\nChoose a class and press **Generate**. A diffusion transformer turns noise (t = 1) into "
        "pictures (t = 0). [ERW](https://arxiv.org/abs/2504.10188) is one way to train such a model.",
        elem_id="title",
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=300, elem_id="settings"):
            num_images = slider("num_images")
            with gr.Row():
                seed = gr.Number(
                    0, precision=0, minimum=0, maximum=MAX_SEED, label=RANGES["seed"][4], min_width=140, elem_id="seed"
                )
                new_seed = gr.Checkbox(True, label="New seed each run", min_width=140, elem_id="new-seed")
            model = gr.Dropdown(list(MODELS), value=MODEL, label="Model", visible=len(MODELS) > 1, elem_id="model")
            with gr.Accordion("Sampling and guidance", open=False):
                sampler = gr.Radio(radio(MODEL), value=SAMPLER, label="Sampler")
                steps = slider("num_inference_steps")
                scale, low, high = map(slider, ["guidance_scale", "guidance_low", "guidance_high"])
        with gr.Column(scale=3, min_width=320):
            label = gr.Dropdown(
                CHOICES[MODEL], value=first_class(MODEL), label="Class", info="Search by name or id",
                allow_custom_value=True, elem_id="label",
            )  # fmt: skip
            shuffle = gr.Button("Random class", size="sm", elem_id="random")
            with gr.Tab("Draw"):
                with gr.Row():
                    run = gr.Button(
                        "Generate", variant="primary", min_width=140, elem_id="generate", elem_classes="go"
                    )
                    stop = gr.Button("Stop", variant="stop", min_width=100, elem_id="stop")
                gallery = gr.Gallery(label="Pictures", elem_id="pictures", **GALLERY, **BUTTONS)
            with gr.Tab("Compare", elem_id="compare-tab"):
                others = list(MODELS)[1:] or list(MODELS)
                second = gr.Dropdown(
                    list(MODELS), value=others[0], label="Second model", elem_id="second",
                    info="Draws the same class and seeds." if others != [MODEL] else "This demo has one model; its owner can add more (ERW_MODELS).",
                )  # fmt: skip
                with gr.Row():
                    run_compare = gr.Button(
                        "Compare", variant="primary", min_width=140, elem_id="compare", elem_classes="go"
                    )
                    stop_compare = gr.Button("Stop", variant="stop", min_width=100)
                with gr.Row():
                    left = gr.Gallery(
                        label="Model", elem_id="left", min_width=260, **BUTTONS, **{**GALLERY, "columns": 2}
                    )
                    right = gr.Gallery(
                        label="Second model", elem_id="right", min_width=260, **BUTTONS, **{**GALLERY, "columns": 2}
                    )
            with gr.Tab("Watch", elem_id="form-tab"):
                with gr.Row():
                    run_form = gr.Button(
                        "Watch it form", variant="primary", min_width=140, elem_id="form", elem_classes="go"
                    )
                    stop_form = gr.Button("Stop", variant="stop", min_width=100)
                noisy = gr.Gallery(label="x_t: the noisy image", elem_id="noisy", **GALLERY, **BUTTONS)
                clean = gr.Gallery(label="x_0: what the model predicts from it", elem_id="clean", **GALLERY, **BUTTONS)
            status = gr.HTML(elem_id="status")
            link = gr.Button("Copy link to these settings", size="sm", elem_id="link")
    history = gr.Gallery(
        label="History (click to reuse)", elem_id="history", allow_preview=False,
        buttons=[], **{**GALLERY, "columns": 8, "elem_classes": [*LOOK, "remembered"]},
    )  # fmt: skip
    made, remembered = gr.State(), gr.State([])
    controls = [label, num_images, seed, scale, low, high, steps, sampler, model]
    one_image = [control for control in controls if control is not num_images]

    model_event = {"preprocess": False, "concurrency_id": "model", "show_progress_on": status}
    quick = {"api_visibility": "private", "queue": False}  # gr.Info and gr.Warning need the queue
    for button, stopper, function, inputs, outputs in (
        (run, stop, generate, controls, [gallery, made]),
        (run_compare, stop_compare, compare, [*controls, second], [left, right, made]),
        (run_form, stop_form, form, one_image, [noisy, clean]),
    ):
        seeded = button.click(
            None, [new_seed, *controls], [seed, status], js="(draw, ...all) => erw.seed(draw, all)", **quick
        )
        event = seeded.then(function, inputs, outputs, api_name=function.__name__, **model_event)
        stopper.click(lambda: "Stopped.", None, status, cancels=event, show_progress="hidden", **quick)
        if made in outputs:
            event.success(remember, [made, remembered], [remembered, history], **quick)
    one = gr.Image(visible=False, format="png")
    gr.Button(visible=False).click(draw, one_image, one, api_name="draw", **model_event)
    gr.api(classes, queue=False)

    shuffle.click(lambda model: random.choice(CHOICES[model])[1], model, label, **quick)
    model.input(of_model, [model, label, sampler, scale], [label, sampler, scale], preprocess=False, **quick)
    history.select(copy_back, remembered, [*one_image, new_seed], api_visibility="private")
    link.click(None, controls, js="(...values) => erw.copy(values)", **quick)
    opened = demo.load(read_link, None, [*controls, new_seed], show_progress="hidden", api_visibility="private")
    opened.then(None, js="() => erw.open()", **quick)

demo.queue(max_size=128, default_concurrency_limit=1)
THEME = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono="monospace")
LAUNCH = {"theme": THEME.set(checkbox_border_color="*neutral_400"), "ssr_mode": False}
LAUNCH |= {"css_paths": HERE / "style.css", "head_paths": HERE / "page.html", "footer_links": ["api", "settings"]}
LAUNCH |= {"mcp_server": importlib.util.find_spec("mcp") is not None}  # installed on Spaces

if __name__ == "__main__":
    demo.launch(**LAUNCH)
