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
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


REPOSITORY = Path(__file__).parent.parent

# What the fork server starts with, whatever the test sets that needs it first.
BEFORE_TESTS = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

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


class Forked:
    """A process of `fork_server.py`, with what tests need of `subprocess.Popen`; its output is in files."""

    _server: subprocess.Popen | None = None

    def __init__(
        self,
        arguments: Iterable[object],
        environment: dict[str, str],
        folder: Path = REPOSITORY,
        log: Path | None = None,
    ) -> None:
        self._files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # which end with this object
        self.output, self.errors = [Path(log or file.name) for file in self._files]
        self.returncode: int | None = None
        self.pid = self._ask(
            arguments=[str(argument) for argument in arguments], environment=environment, folder=str(folder),
            output=str(self.output), errors=str(self.errors),
        )  # fmt: skip

    @classmethod
    def _ask(cls, **request: object) -> int | None:
        if cls._server is None:  # the first test that needs it waits for its imports
            command = [sys.executable, REPOSITORY / "tests" / "fork_server.py"]
            cls._server = subprocess.Popen(command, env=BEFORE_TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        cls._server.stdin.write(json.dumps(request).encode() + b"\n")
        cls._server.stdin.flush()
        return json.loads(cls._server.stdout.readline())

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ask(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float = HANGS) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} still runs; it said {self.stderr[-4000:]}")
            time.sleep(0.005)
        return self.returncode

    @property
    def stdout(self) -> str:
        return self.output.read_text()

    @property
    def stderr(self) -> str:
        return self.errors.read_text()


def run_forked(*arguments: object, environment: Mapping[str, str] = {}, folder: Path = REPOSITORY) -> Forked:
    """What `python *arguments` does, from imports that are done, with variables beside this process' own; waits for its end."""
    process = Forked(arguments, {**os.environ, "OMP_NUM_THREADS": "1", **environment}, folder)
    try:
        process.wait()
    finally:
        kill_trees([process])
    return process


@contextlib.contextmanager
def forked_ranks(processes: int, *arguments: object, environment: Mapping[str, str] = {}) -> Iterator[list[Forked]]:
    """The processes that a launcher would start on this host; what still runs at the end is killed with its workers."""
    own = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    ranks = []
    if processes > 1:  # as torch's launcher, which gives them a store to meet in
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        own |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    try:
        for rank in range(processes):
            number = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            ranks.append(Forked(arguments, {**own, **number}))
        yield ranks
    finally:
        kill_trees(ranks)


def run_ranks(processes: int, *arguments: object, environment: Mapping[str, str] = {}) -> list[Forked]:
    """Runs a script in several processes at once, from imports that are done, and waits for all."""
    with forked_ranks(processes, *arguments, environment=environment) as ranks:
        for rank in ranks:  # one that fails closes its connections, which ends the others
            rank.wait()
    return ranks


def check_ended(ranks: Iterable[Forked]) -> None:
    for number, rank in enumerate(ranks):
        assert rank.returncode == 0, (
            f"process {number} ended with {rank.returncode}:\n{rank.stdout[-2000:]}\n{rank.stderr[-6000:]}"
        )


TRAINING = ("training/train_erw.py", *PRESET)


def launch_training(*flags: str, processes: int = 1) -> None:
    """Runs the training script in processes of its own."""
    check_ended(run_ranks(processes, *TRAINING, *flags))


def launch_command(
    flags: Iterable[str], processes: int, script: Iterable[str] = TRAINING
) -> tuple[list[str], dict[str, str]]:
    """accelerate's way to N CPU processes is --multi_gpu without a GPU."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--main_process_port", "0"]
    return [*command, *script, *map(str, flags)], environment


# The training script, which waits two steps on for what is to come: a fast one would have ended by then.
HELD = """
import runpy, time
from erw_hf.trainer.step_log import StepLog

add = StepLog.add

def hold(log, *arguments):
    stopping = add(log, *arguments)
    for _ in range({seconds} if log.progress.step == {step} + 2 else 0):
        time.sleep(1)
    return stopping

StepLog.add = hold
runpy.run_path("training/train_erw.py", run_name="__main__")
"""


def kill_training_at(step: int, *flags: str, processes: int = 1) -> None:
    """Starts the training script and ends it with SIGKILL, processes and workers, once it has written a step."""
    held = HELD.format(seconds=HANGS, step=step)
    with forked_ranks(processes, "-c", held, *PRESET, *flags) as ranks:
        _wait_for_step(step, flags, ranks)


def terminate_training_at(
    step: int, *flags: str, processes: int = 1, signum: int = signal.SIGTERM, workers: bool = False
) -> list[int]:
    """Starts the training script, signals its processes at a step, as a launcher does (with their loaders' workers, as a terminal
    does), and returns how they exited."""
    with forked_ranks(processes, *TRAINING, *flags) as ranks:
        _wait_for_step(step, flags, ranks)
        children = [child for rank in ranks for child in psutil.Process(rank.pid).children(recursive=True)]
        assert not workers or len(children) >= 2
        for pid in [*(child.pid for child in children if workers), *(rank.pid for rank in ranks)]:
            os.kill(pid, signum)
        return [rank.wait() for rank in ranks]


def signal_launcher_at(step: int, signum: int, *flags: str, processes: int = 1) -> int:
    """Starts training as a user does, signals its launcher at a step, waits until no process is left, and returns its status."""
    (_, *command), environment = launch_command(flags, processes)
    launcher = Forked(command, environment)  # the processes that it starts import everything themselves
    tree = []
    try:
        _wait_for_step(step, flags, [launcher])
        tree = psutil.Process(launcher.pid).children(recursive=True)
        os.kill(launcher.pid, signum)
        launcher.wait()
        _, alive = psutil.wait_procs(tree, timeout=HANGS)
        assert not alive, f"{len(alive)} processes outlived their launcher"
        return launcher.returncode
    finally:
        kill_trees([launcher])
        for orphan in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()


def _wait_for_step(step: int, flags: Iterable[str], processes: Iterable[Forked | subprocess.Popen]) -> None:
    """Until a run that has just been started has written a step."""
    output_dir = next(Path(flag.split("=", 1)[1]) for flag in flags if str(flag).startswith("--output_dir="))
    metrics = output_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), *processes)


def wait_until(happened: Callable[[], object], *processes: Forked | subprocess.Popen) -> None:
    """Waits for what processes that run are to bring about."""
    deadline = time.monotonic() + HANGS
    while not happened():
        assert all(process.poll() is None for process in processes) or happened(), [
            f"ended with {process.returncode}: {process.stderr}"[-4000:] for process in processes
        ]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def kill_trees(processes: Iterable[Forked | subprocess.Popen]) -> None:
    """Ends processes and what they started with SIGKILL, all at once."""
    # torch's launcher gives each training process a session of its own, so killing the group would miss them.
    running = [process for process in processes if process.poll() is None]
    trees = [psutil.Process(process.pid) for process in running]
    trees += [child for tree in trees for child in tree.children(recursive=True)]
    for member in trees:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
            member.kill()
    for process in running:
        process.wait()
    psutil.wait_procs(trees)


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
