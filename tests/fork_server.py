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
"""A process that has imported what scripts import and forks for each that is to run: milliseconds, where imports take ten seconds.

    python tests/fork_server.py  # helpers.Forked talks to it

It reads requests as lines of JSON from stdin and answers with a line on stdout: the process id of a script that it started, or
the exit status of one (null while it runs). It has one thread, and nothing of this repository: what is under test is imported
by the script itself. It ends with its stdin.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path


PR_SET_PDEATHSIG = 1
HEAVY = (
    "accelerate datasets diffusers jinja2 matplotlib.pyplot peft scipy.stats sklearn.datasets tensorboard torch._dynamo "
    "torch.distributed.fsdp torch.utils.tensorboard torchdata.stateful_dataloader torchvision transformers"
).split()
# Classes of packages that import their parts when these are asked for.
LAZY = {
    "diffusers": "AutoencoderKL DiffusionPipeline FlowMatchEulerDiscreteScheduler",
    "transformers": "AutoModel AutoImageProcessor BitImageProcessorPil Dinov2Config Dinov2Model",
}


def main() -> dict:
    """Serves; returns in each forked process, with its request."""
    for name in HEAVY:
        importlib.import_module(name)
    for name, parts in LAZY.items():
        for part in parts.split():
            getattr(importlib.import_module(name), part)
    threads = {
        path.read_text().strip()
        for path in Path("/proc/self/task").glob("*/comm")
        if path.parent.name != str(os.getpid())
    }
    assert threads <= {"jemalloc_bg_thd"}, (
        f"{threads} would not survive a fork"
    )  # pyarrow's own allocator is made for it
    gc.freeze()
    while line := os.read(0, 1 << 20):
        while not line.endswith(b"\n"):
            line += os.read(0, 1 << 20)
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        os.write(1, json.dumps(answer).encode() + b"\n")
    sys.exit()


def become(arguments: list[str], environment: dict[str, str], folder: str, output: str, errors: str) -> None:
    """Makes this process what `python *arguments` would have started as."""
    os.setsid()
    # As from a terminal, whatever started the tests: nohup, or a shell in the background, ignores these.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if sys.platform == "linux":  # it ends with this server, and so with the tests, however they end
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for fd, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY), (2, errors, os.O_WRONLY)):
        os.dup2(os.open(path, flags | os.O_APPEND), fd)
    os.chdir(folder)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    first = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    script = arguments[0]
    sys.argv = ["-c", *arguments[2:]] if script == "-c" else arguments[1:] if script == "-m" else arguments
    own = os.path.dirname(os.path.abspath(script)) if script.endswith(".py") else folder
    sys.path[:] = [own, *first, *(path for path in sys.path[1:] if path not in inherited)]
    for path in first:  # as the site module would have done
        if os.path.exists(f"{path}/sitecustomize.py"):
            runpy.run_path(f"{path}/sitecustomize.py")
    reread_hub_variables()


def reread_hub_variables() -> None:
    """The Hub's clients and what builds on them read their variables when they are imported."""
    import datasets.config
    import huggingface_hub.constants
    from diffusers.utils import constants, dynamic_modules_utils
    from huggingface_hub import hf_api

    for module in (huggingface_hub.constants, datasets.config, constants):
        importlib.reload(module)
    hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
    dynamic_modules_utils.HF_MODULES_CACHE = constants.HF_MODULES_CACHE


if __name__ == "__main__":
    request = main()
    become(**request)
    arguments = request["arguments"]
    if arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")
