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
"""The demo, served for real and asked through its API. `tests/browser` has what a visitor sees."""

import importlib.metadata
import importlib.util
import json
import os
import queue
import random
import re
import runpy
import shutil
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from helpers import REPOSITORY, TINY_MODEL, randomize
from PIL import Image

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler


SPACE, DIGITS = REPOSITORY / "spaces" / "erw", REPOSITORY / "pipelines" / "erw-digits"
FAST = {"num_inference_steps": 3}


def load_app():
    spec = importlib.util.spec_from_file_location("app", SPACE / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    twin = tmp_path_factory.mktemp("models") / "twin"
    shutil.copytree(DIGITS, twin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERW_MODELS", str(twin))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        patch.setenv("ERW_MODEL", str(DIGITS))
        app = load_app()
        _, app.url, _ = app.demo.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
        yield app
        app.demo.close()


@pytest.fixture(scope="module")
def client(app):
    from gradio_client import Client

    # A busy machine answers late: httpx gives up after 5 seconds by itself.
    return Client(app.url, verbose=False, httpx_kwargs={"timeout": 1800})


@pytest.fixture(scope="module")
def pipe():
    return ERWPipeline.from_pretrained(DIGITS)


def directly(pipe, label, seeds, num_inference_steps=3, **kwargs):
    """What the demo has to answer: the pipeline's own images."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    labels = [int(label)] * len(seeds)
    images = pipe(class_labels=labels, num_inference_steps=num_inference_steps, generator=generators, **kwargs).images
    return [image.tobytes() for image in images]


def pixels(path):
    return Image.open(path).tobytes()


def test_a_class_is_drawn_with_a_seed_an_image(client, pipe):
    answer = client.predict("7", 2, 5, 1.8, 0.0, 0.7, 4, api_name="/generate")
    assert [image["caption"] for image in answer] == ["7, seed 5", "7, seed 6"]
    assert [pixels(image["image"]) for image in answer] == directly(pipe, 7, [5, 6], 4)
    settings = json.loads(Image.open(answer[1]["image"]).text["erw"])  # a picture says how it was made
    assert (settings["label"], settings["seed"], settings["num_inference_steps"]) == ("7", 6, 4)
    again = client.predict("7", 1, 6, 1.8, 0.0, 0.7, 4, api_name="/generate")
    assert pixels(again[0]["image"]) == pixels(answer[1]["image"])  # the seed makes the picture, not the batch


def test_the_samplers_and_the_guidance_are_those_asked_for(client, pipe):
    for sampler, scheduler in (("euler", FlowMatchEulerDiscreteScheduler()), ("heun", FlowMatchHeunScheduler())):
        ode = ERWPipeline(**{**pipe.components, "scheduler": scheduler}, id2label=pipe.config.id2label)
        guidance = {"guidance_scale": 3.0, "guidance_interval": (0.2, 0.9)}
        drawn = client.predict("3", 1, 3.0, 0.2, 0.9, 3, sampler, "erw-digits", api_name="/draw")
        assert [pixels(drawn)] == directly(ode, 3, [1], **guidance), sampler


def test_two_models_draw_the_same_seeds(client, pipe):
    left, right = client.predict(label="4", num_images=2, seed=3, second_model="twin", **FAST, api_name="/compare")
    assert [pixels(image["image"]) for image in left] == directly(pipe, 4, [3, 4])
    assert [pixels(image["image"]) for image in right] == directly(pipe, 4, [3, 4])


def test_an_image_forms_from_its_noise(client, pipe):
    noisy, clean = client.predict(label="2", seed=9, num_inference_steps=12, api_name="/form")
    assert len(noisy) == len(clean) == 8
    assert (noisy[0]["caption"], noisy[-1]["caption"]) == ("t = 1.00", "t = 0.00")
    noise = torch.randn((1, 1, 32, 32), generator=torch.Generator().manual_seed(9))
    assert pixels(noisy[0]["image"]) == pipe.image_processor.postprocess(noise, output_type="pil")[0].tobytes()
    assert [pixels(noisy[-1]["image"])] == [pixels(clean[-1]["image"])] == directly(pipe, 2, [9], 12)


def test_a_model_with_a_class_token_forms_too(app):
    model = ERWTransformer2DModel(**TINY_MODEL, class_token_dim=6).eval()
    pipe = ERWPipeline(model, None, FlowMatchEulerMaruyamaScheduler())
    pipe.set_progress_bar_config(disable=True)
    frames = queue.Queue()
    app.watch(pipe, "linear", frames, threading.Event())
    pipe(1, num_inference_steps=3, generator=torch.Generator().manual_seed(9))
    noise = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(9))
    expected = pipe.image_processor.postprocess(noise, output_type="pil")[0]
    assert frames.get().noisy[0].tobytes() == expected.tobytes()


def test_the_clean_prediction_is_that_of_the_shipped_schedulers(app):
    velocity, latents = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    shipped = sys.modules[type(app.MODELS["erw-digits"].scheduler).__module__]
    for path_type in ("linear", "cosine"):
        scheduler = shipped.FlowMatchEulerMaruyamaScheduler(path_type=path_type)
        scheduler.set_timesteps(7)
        for time_ in scheduler.timesteps:
            expected = scheduler.step(velocity, time_, latents).pred_original_sample
            t = float(time_) / 1000
            assert torch.allclose(app.clean_prediction(path_type, velocity, latents, t), expected, atol=1e-5)


def test_two_classes_of_one_name_are_told_apart_by_id(app):
    model = ERWTransformer2DModel(**{**TINY_MODEL, "num_classes": 3})
    names = {0: "crane", 1: "bolete", 2: "crane"}
    choices = app.class_choices(ERWPipeline(model, None, FlowMatchEulerMaruyamaScheduler(), id2label=names))
    assert choices == [("crane (0)", "0"), ("bolete (1)", "bolete"), ("crane (2)", "2")]


def test_an_unnamed_class_is_not_taken_for_one_of_that_name(app):
    model = ERWTransformer2DModel(**{**TINY_MODEL, "num_classes": 2})
    choices = app.class_choices(ERWPipeline(model, None, FlowMatchEulerMaruyamaScheduler(), id2label={0: "1"}))
    assert choices == [("1 (0)", "1"), ("1", "1 (1)")]


@pytest.mark.parametrize("name", ["dragonfly, " + "needle " * 20 + "hawk", "x" * 300, "字" * 200, "<b>/\\?'\"😀"])
def test_classes_of_any_name_are_drawn_and_saved(app, monkeypatch, name):
    model = ERWTransformer2DModel(**{**TINY_MODEL, "num_classes": 2})
    pipe = ERWPipeline(model, None, FlowMatchEulerMaruyamaScheduler(), id2label={0: "dog", 1: name})
    monkeypatch.setitem(app.MODELS, "long", pipe)
    monkeypatch.setitem(app.CHOICES, "long", app.class_choices(pipe))
    settings = app.checked(app.CHOICES["long"][1][1], 1, 0, 1.0, 0.0, 1.0, 1, "sde", "long")
    assert app.class_id(settings) == 1
    assert Path(app.saved([Image.new("L", (8, 8))], settings)[0][0]).is_file()


def test_models_are_named_by_their_folder_and_loaded_once(app, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "load_model", lambda source: source)
    monkeypatch.setenv("ERW_MODEL", ".")
    monkeypatch.setenv("ERW_MODELS", f",{tmp_path}/,owner/model,, owner/model,")
    assert app.load_models() == {tmp_path.name: str(tmp_path), "model": "owner/model"}


def test_classes_are_listed(client, pipe):
    assert client.predict(api_name="/classes") == pipe.labels


def test_fifty_at_once_none_lost_none_wrong_memory_flat(app, pipe):
    from gradio_client import Client

    client = Client(
        app.url, verbose=False, download_files=False, httpx_kwargs={"timeout": 1800}
    )  # the files lie on this machine
    asked = [(i % 10, 1000 + i // 2) for i in range(50)]

    def everything():
        jobs = [client.submit(label=str(c), seed=s, num_images=2, **FAST, api_name="/generate") for c, s in asked]
        return [job.result(timeout=1800) for job in jobs]

    everything()
    everything()  # what is made on demand is there by now
    process = psutil.Process()
    before, threads = process.memory_info().rss, process.num_threads()
    for (label, seed), answer in zip(asked, everything(), strict=True):
        assert [image["caption"] for image in answer] == [f"{label}, seed {seed}", f"{label}, seed {seed + 1}"]
        assert [pixels(image["image"]["path"]) for image in answer] == directly(pipe, label, [seed, seed + 1])
    assert process.memory_info().rss - before < 60e6
    assert process.num_threads() < threads + 25  # pools may still fill up; a thread left behind a request would be 50


def nonsense(count: int, seed: int = 0):
    """Arguments of /generate of which one is wrong: a type, a range, a name, a path."""
    generator = random.Random(seed)
    anything = [
        None,
        True,
        [],
        {},
        [1, 2],
        {"path": "/etc/passwd"},
        "",
        "seven",
        "\u202e\u0000",
        "🦆" * 500,
        "nan",
        "-1",
    ]
    anything += ["../../etc/passwd", "/etc/passwd", "C:\\boot.ini", "file:///etc/hosts", "9" * 5000, -1, 10**30, 1e300]
    anything += ["<img src=x onerror=alert(1)>", "'; DROP TABLE classes; --", 2.5, -0.5, 1e9, "1e999", "٣٣٣"]
    names = ["label", "num_images", "seed", "guidance_scale", "guidance_low", "guidance_high", "num_inference_steps"]
    for _ in range(count):
        name = generator.choice([*names, "sampler", "model"])
        yield name, generator.choice(anything)


def test_two_hundred_wrong_inputs_are_clear_errors(client, pipe):
    words = {
        "label": "Class|unknown class|erw-digits has the classes", "num_images": "Images", "seed": "First seed", "model": "Model",
        "guidance_scale": "Guidance scale", "guidance_low": "Guidance from", "guidance_high": "Guidance up to",
        "num_inference_steps": "Steps", "sampler": "Sampler",
    }  # fmt: skip
    right = [("guidance_scale", 2.5), ("seed", 1e9), ("seed", "٣٣٣")]  # 333, in digits that Python reads
    cases = [case for case in nonsense(220) if case not in right][:200]
    assert len(cases) == 200

    def ask(case):
        name, value = case
        arguments = {"label": "7", "num_images": 1, **FAST, name: value}
        for _ in range(3):  # a busy machine may drop a connection, which says nothing of the answer
            try:
                return client.predict(**arguments, api_name="/generate")
            except (httpx.TransportError, CancelledError):
                continue
            except Exception as error:
                return str(error) or repr(error)
        raise AssertionError(f"no connection for {case}")

    with ThreadPoolExecutor(8) as pool:
        for (name, value), answer in zip(cases, pool.map(ask, cases), strict=True):
            assert isinstance(answer, str), (name, value)
            assert re.match(words[name], answer), (name, value, answer)
            assert len(answer) < 300 and "Traceback" not in answer
    assert client.predict(label="7", num_images=1, **FAST, api_name="/generate")


def test_a_stopped_run_ends_and_leaves_the_machine_free(client, app):
    calls = []
    hook = app.MODELS["erw-digits"].transformer.register_forward_hook(lambda *_: calls.append(1))
    job = client.submit(label="7", num_images=16, num_inference_steps=250, api_name="/generate")
    deadline = time.monotonic() + 1800
    while not job.outputs() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert job.outputs() and not job.done(), "the run was over before it could be stopped"
    job.cancel()
    client.predict(label="7", num_images=1, **FAST, api_name="/generate")
    hook.remove()
    assert len(calls) < 200, "the stopped run went on"


def test_the_mcp_server_draws_an_image(app):
    import asyncio

    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def ask():
        async with streamablehttp_client(f"{app.url}gradio_api/mcp/") as (reader, writer, _):
            async with ClientSession(reader, writer) as session:
                await session.initialize()
                tools = {tool.name: tool for tool in (await session.list_tools()).tools}
                answer = await session.call_tool("draw", {"label": "7", "seed": 5, **FAST})
                return tools, answer

    tools, answer = asyncio.run(ask())
    assert "Draws one image of a class" in tools["draw"].description
    assert "the same seed and settings" in tools["draw"].inputSchema["properties"]["seed"]["description"]
    assert [content.type for content in answer.content][0] == "image"


def requirements_only(folder: Path) -> None:
    """Links the files of what requirements.txt and the sdk ask for, and what that needs in turn, into a folder."""
    wanted = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    wanted, seen = [*wanted, "gradio"], set()
    while wanted:
        name = re.match(r"[\w.-]+", wanted.pop())[0].lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        wanted += [need for need in distribution.requires or [] if "extra ==" not in need]
        for file in distribution.files or []:
            link = folder / file.parts[0]
            if file.parts[0] != ".." and not link.exists():
                link.symlink_to(Path(distribution.locate_file(file.parts[0])).resolve())


def test_the_folder_alone_runs_with_its_requirements(tmp_path):
    shutil.copytree(SPACE, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(DIGITS, tmp_path / "model")
    (tmp_path / "packages").mkdir()
    requirements_only(tmp_path / "packages")
    check = (
        "import runpy, importlib.util as u\n"
        "assert not any(map(u.find_spec, ('erw_hf', 'datasets', 'transformers', 'sklearn')))\n"
        "app = runpy.run_path('app.py')\n"
        "settings = app['checked']('7', 1, 5, 1.8, 0.0, 0.7, 3, 'heun', 'model')\n"
        "*_, frame = app['sample'](settings)\n"
        "app['demo'].launch(prevent_thread_lock=True, **app['LAUNCH'])\n"
        "print('drawn', frame.clean[0].size)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "packages"), "HF_HOME": str(tmp_path / "home")}
    environment |= {"ERW_MODEL": str(tmp_path / "model"), "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    environment.pop("ERW_MODELS", None)
    command = [sys.executable, "-S", "-c", check]
    run = subprocess.run(
        command, cwd=tmp_path / "space", env=environment, capture_output=True, text=True, timeout=1800
    )
    assert "drawn (32, 32)" in run.stdout, run.stderr[-3000:]


def save_tiny(folder, scheduler, vae=None, **config):
    transformer = randomize(ERWTransformer2DModel(**{**TINY_MODEL, **config})).eval()
    ERWPipeline(transformer, vae, scheduler).save_pretrained(folder)
    return folder


def test_an_unconditional_and_a_latent_pipeline_draw_at_the_first_click(tmp_path, vae_path, monkeypatch, capsys):
    """The first one with a scheduler of diffusers, whose repo has no SDE, and a folder's name with a line break."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    unconditional = save_tiny(tmp_path / "unconditional", scheduler, num_classes=0)
    vae = AutoencoderKL.from_pretrained(vae_path)
    channels = vae.config.latent_channels
    latent = save_tiny(tmp_path / "latent", FlowMatchEulerMaruyamaScheduler(), vae, in_channels=channels)
    monkeypatch.setenv("ERW_MODEL", f" {unconditional}\n")
    monkeypatch.setenv("ERW_MODELS", f"\n{latent} ,\n")
    app = load_app()
    assert f"{latent}: on {app.DEVICE}, float32\n" in capsys.readouterr().out
    assert app.CHOICES["unconditional"] == [("no class", "no class")] and app.classes() == {"no class": 0}
    first = SimpleNamespace(query_params={})
    label, *numbers, sampler, model, _ = app.read_link(first)
    assert (label.value, sampler.value, model) == ("no class", "euler", "unconditional")
    assert [value for _, value in sampler.choices] == ["euler"]
    numbers[:2], numbers[5] = [2, 5], 3
    for name, label, sampler in (
        ("unconditional", "no class", "euler"),
        ("latent", "7", "sde"),
        ("latent", "7", "heun"),
    ):
        settings = app.checked(label, *numbers, sampler, name)
        *_, frame = app.sample(settings)
        pipe = ERWPipeline.from_pretrained(tmp_path / name)
        if sampler == "heun":
            pipe.scheduler = FlowMatchHeunScheduler()
        expected = directly(pipe, 0 if name == "unconditional" else 7, [5, 6])
        assert [image.tobytes() for image in frame.clean] == expected, (name, sampler)
    label, radio, scale = app.of_model("unconditional", "7", "sde", 1.8)
    assert (label.value, radio.value, scale) == ("no class", "euler", 1.8)
    with pytest.raises(app.gr.Error, match="unconditional has no SDE.* sampler: choose ODE, Euler"):  # before any work
        app.checked("no class", *numbers, "sde", "unconditional")
    untrained = ERWPipeline.from_pretrained(DIGITS)
    untrained.transformer.register_to_config(class_dropout_prob=0.0)
    monkeypatch.setitem(app.MODELS, "untrained", untrained)
    monkeypatch.setitem(app.CHOICES, "untrained", app.class_choices(untrained))
    assert app.of_model("untrained", "7", "sde", 1.8)[2] == 1.0  # guidance would spoil the pictures
    with pytest.raises(app.gr.Error, match="has no SDE"):
        list(app.sample({**settings, "model": "unconditional", "label": "no class", "sampler": "sde"}))
    with pytest.raises(app.gr.Error, match="unconditional has no classes: choose 'no class'"):
        app.checked("7", *numbers, "euler", "unconditional")


def test_a_model_opens_with_the_sampler_that_it_was_saved_with(app):
    pipe = ERWPipeline.from_pretrained(DIGITS)
    assert app.samplers_of(pipe) == ["sde", "euler", "heun"]
    pipe.scheduler = FlowMatchHeunScheduler()
    assert app.samplers_of(pipe) == ["heun", "sde", "euler"]


def test_samplers_are_those_of_each_model_where_several_are_served(app, tmp_path):
    """Each that is loaded defines the classes of the schedulers' module anew."""
    models = {}
    for scheduler in (FlowMatchHeunScheduler(), FlowMatchEulerMaruyamaScheduler(last_step="tweedie")):
        pipe, folder = ERWPipeline.from_pretrained(DIGITS), tmp_path / type(scheduler).__name__
        pipe.scheduler = scheduler
        pipe.save_pretrained(folder)
        models[folder.name] = folder
    models = {name: app.load_model(str(folder)) for name, folder in models.items()}
    app.load_model(str(DIGITS))
    assert app.samplers_of(models["FlowMatchHeunScheduler"])[0] == "heun"
    sde = models["FlowMatchEulerMaruyamaScheduler"]
    assert app.samplers_of(sde)[0] == "sde" and app.new_scheduler(sde, "sde").config.last_step == "tweedie"


def test_a_sampler_keeps_what_the_pipeline_was_saved_with(app):
    pipe = ERWPipeline.from_pretrained(DIGITS)
    pipe.scheduler = type(pipe.scheduler)(last_step="tweedie", sigma_last=0.02)
    assert app.new_scheduler(pipe, "sde").config.last_step == "tweedie"
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ):
        pipe.scheduler = scheduler
        assert app.new_scheduler(pipe, "euler").config.shift == 3


def test_the_demo_opens_with_a_class_that_shows_what_the_model_can_do(app, monkeypatch):
    assert app.first_class(app.MODEL) == app.CHOICES[app.MODEL][0][1]
    emoji = ERWPipeline.from_pretrained(app.SHIPPED[0])
    monkeypatch.setitem(app.CHOICES, "emoji", app.class_choices(emoji))
    assert app.first_class("emoji") == app.OPENS_WITH


def test_a_model_of_the_cosine_path_is_shown_as_it_forms(app, monkeypatch):
    """diffusers' Euler steps knows no path; what the model points at is that of its own."""
    shared = ERWPipeline.from_pretrained(DIGITS)
    shared.scheduler = FlowMatchEulerMaruyamaScheduler(path_type="cosine")
    monkeypatch.setitem(app.MODELS, "cosine", shared)
    monkeypatch.setitem(app.CHOICES, "cosine", app.class_choices(shared))
    paths = []
    monkeypatch.setattr(app, "clean_prediction", lambda path_type, velocity, x, t: paths.append(path_type) or x)
    settings = app.checked("7", 1, 5, 1.0, 0.0, 1.0, 3, "euler", "cosine")
    list(app.sample(settings))
    assert set(paths) == {"cosine"}


def test_a_model_without_a_trained_null_class_opens_without_guidance(app, monkeypatch):
    shared = ERWPipeline.from_pretrained(DIGITS)
    shared.transformer.register_to_config(class_dropout_prob=0.0)
    monkeypatch.setitem(app.MODELS, "erw-digits", shared)
    query = SimpleNamespace(query_params={"model": "erw-digits"})
    assert app.read_link(query)[3] == 1.0


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_broken_model_is_one_line_and_no_black_picture(app, part, vae_path, monkeypatch):
    vae = AutoencoderKL.from_pretrained(vae_path)
    transformer = ERWTransformer2DModel(**{**TINY_MODEL, "in_channels": vae.config.latent_channels}).eval()
    broken = transformer.proj_out if part == "transformer" else vae.decoder.conv_out
    torch.nn.init.constant_(broken.bias, torch.nan)
    pipe = ERWPipeline(transformer, vae, FlowMatchEulerMaruyamaScheduler())
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setitem(app.MODELS, "broken", pipe)
    monkeypatch.setitem(app.CHOICES, "broken", app.class_choices(pipe))
    settings = app.checked("7", 1, 5, 1.8, 0.0, 0.7, 8, "sde", "broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(app.gr.Error, match="^'No picture: .*NaN or infinity[^\\n]*$"):
            list(app.sample(settings))


def test_pictures_beyond_the_highest_seed_have_seeds_that_the_field_takes(app):
    settings = app.checked("7", 3, app.MAX_SEED, 1.8, 0.0, 0.7, 2, "sde", "erw-digits")
    *_, frame = app.sample(settings)
    entries = app.saved(frame.clean, settings)
    assert [own["seed"] for _, _, own in entries] == [app.MAX_SEED, 0, 1]
    own = entries[1][2]
    *_, alone = app.sample(app.checked(*(own[name] for name in app.LINKED)))
    assert alone.clean[0].tobytes() == frame.clean[1].tobytes()
    assert (app.seed.minimum, app.seed.maximum) == (0, app.MAX_SEED)


@pytest.mark.parametrize(
    "source", ["nobody/nothing", "an id of words", "one/two/three", "{folder}/empty", "{folder}/file"]
)
def test_a_model_that_is_none_is_named_in_one_line(source, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    source = source.format(folder=tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for variable in ("ERW_MODEL", "ERW_MODELS"):
        monkeypatch.setenv("ERW_MODEL", str(DIGITS))
        monkeypatch.setenv(variable, f"{source}\n")
        with pytest.raises(SystemExit, match=f"^'{source}' .* is not an exported ERW pipeline: [^\n]+$"):
            load_app()


def test_of_the_shipped_models_the_emoji_come_first(monkeypatch):
    for variable in ("ERW_MODEL", "ERW_MODELS"):
        monkeypatch.delenv(variable, raising=False)
    assert list(load_app().MODELS) == ["erw-emoji", "erw-digits"]


def test_without_a_model_the_folder_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("ERW_MODEL", " \n")
    with pytest.raises(SystemExit, match="set ERW_MODEL"):
        runpy.run_path(str(shutil.copy(SPACE / "app.py", tmp_path)))


def test_the_front_matter_is_that_of_a_space():
    from huggingface_hub import SpaceCard

    data = SpaceCard.load(SPACE / "README.md").data
    assert (data.sdk, data.app_file) == ("gradio", "app.py")
    assert f"gradio=={data.sdk_version}" in (REPOSITORY / "constraints.txt").read_text()
    assert len(data.short_description) <= 60 and data.title and data.emoji and data.license and data.tags
    assert "gradio" not in re.sub("#.*", "", (SPACE / "requirements.txt").read_text())  # sdk_version decides
