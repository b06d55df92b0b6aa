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
"""What the tests share beside fixtures. Not in conftest.py: another folder has a module of that name."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


REPOSITORY = Path(__file__).parent.parent

HANGS = 1800  # seconds after which a test gives up on what never ends; far more than any machine needs

TINY_MODEL = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_classes": 10,
}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """adaLN-zero leaves a fresh model predicting zeros, which would hide almost any error."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


PRESET = ["--config", "training/configs/digits.yaml"]


def run_script(name: str, *flags: str) -> None:
    """Runs a script of training/ in this process, which saves the seconds that importing torch takes."""
    from accelerate.state import AcceleratorState, GradientState

    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "training" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.chdir(REPOSITORY)
        patch.setitem(sys.modules, name, script)
        spec.loader.exec_module(script)
        AcceleratorState._reset_state(
            reset_partial_state=True
        )  # what a test of this process left may be of another precision
        try:
            script.main()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def train(*flags: str) -> None:
    """Runs the training script with the digits preset in this process."""
    run_script("train_erw", *PRESET, *flags)


def launch_command(
    flags: Iterable[str], processes: int, script: Iterable[str] = ("training/train_erw.py", *PRESET)
) -> tuple[list[str], dict[str, str]]:
    """accelerate's way to N CPU processes is --multi_gpu without a GPU."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--main_process_port", "0"]
    return [*command, *script, *map(str, flags)], environment


def launch_training(*flags: str, processes: int = 1) -> None:
    """Runs the training script as a user does."""
    command, environment = launch_command(flags, processes)
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=HANGS)
    if result.returncode != 0:
        raise AssertionError(f"training failed:\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}")


def kill_training_at(step: int, *flags: str, processes: int = 1) -> None:
    """Starts the training script and ends it with SIGKILL, launcher, workers and all, once it has written a step."""
    with _training_until(step, flags, processes):
        pass


def terminate_training_at(step: int, *flags: str, processes: int = 1) -> list[int]:
    """Starts the training script, sends SIGTERM to its training processes at a step, and returns how they exited."""
    with _training_until(step, flags, processes) as launcher:
        children = psutil.Process(launcher.pid).children()
        if processes == 1:
            children = children[:1]
        # The launcher reaps them, and its own status is 0 only if theirs all are.
        for child in children:
            child.terminate()
        launcher.wait(timeout=HANGS)
        return [launcher.returncode] * len(children)


def signal_launcher_at(step: int, signum: int, *flags: str, processes: int = 1) -> int:
    """Starts the training script, signals its launcher at a step, waits until no process is left, and returns its status."""
    with _training_until(step, flags, processes) as launcher:
        tree = psutil.Process(launcher.pid).children(recursive=True)
        try:
            launcher.send_signal(signum)
            launcher.wait()
            _, alive = psutil.wait_procs(tree, timeout=HANGS)
            assert not alive, f"{len(alive)} processes outlived their launcher"
        finally:
            for orphan in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    orphan.kill()
        return launcher.returncode


@contextlib.contextmanager
def _training_until(step: int, flags: tuple[str, ...], processes: int) -> Iterator[subprocess.Popen]:
    command, environment = launch_command(flags, processes)
    output_dir = next(Path(flag.split("=", 1)[1]) for flag in flags if str(flag).startswith("--output_dir="))
    metrics = output_dir / "metrics.jsonl"
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    # A resumed run first drops the lines after its checkpoint: what an earlier process wrote does not count.
    before = metrics.read_text() if metrics.exists() else ""
    try:
        deadline = time.monotonic() + HANGS
        while not (metrics.exists() and (text := metrics.read_text()) != before and f'"step": {step},' in text):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"training never reached step {step}")
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process)


def kill_tree(process: subprocess.Popen) -> None:
    """Ends a launcher, its processes and their workers with SIGKILL."""
    # torch's launcher gives each training process a session of its own, so killing the group would miss them.
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
            member.kill()
    process.wait()
    psutil.wait_procs(tree)


SHARD_ROWS = 101


def write_shards(folder, rows=SHARD_ROWS, shards=4, bad=()):
    """Parquet shards of unequal length; the grey of image i says which it is."""
    folder.mkdir(exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(names=list("abc"))})
    bounds = np.linspace(0, rows, shards + 1).astype(int)
    bounds[1:-1] += np.arange(1, shards) % 3
    for k in range(shards):
        images, labels = [], []
        for i in range(bounds[k], bounds[k + 1]):
            image = PILImage.fromarray(np.full((8, 8), i, dtype=np.uint8))
            images.append({"bytes": b"no image", "path": f"bad{i}.png"} if i in bad else image)
            labels.append(i % 3)
        Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(
            folder / f"train-{k}.parquet"
        )
    return str(folder)


def short_pauses(folder: Path, divisor: int) -> dict[str, str]:
    """The environment of processes that wait so many times less between their attempts."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import time\nsleep = time.sleep\ntime.sleep = lambda s: sleep(s / {divisor})\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


# Of FDr6, tiny
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}
REPRESENTATION_ARCHITECTURES = {
    "convnext": ("convnextv2_base", {"dims": [4, 4, 4, 16], "depths": [1] * 4}),
    "dinov2_cls": ("vit_large_patch14_dinov2", VIT | {"img_size": 70}),
    "mae_cls": ("vit_large_patch16_224", VIT | {"img_size": 64}),
    "siglip_cls": ("vit_so400m_patch16_siglip_256", VIT | {"img_size": 64}),
    "clip_cls": ("vit_large_patch14_clip_224", VIT | {"img_size": 70}),
}
