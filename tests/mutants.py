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
"""Spoils one line of the core at a time and asks whether the tests notice: a flipped sign, a wrong index, a thing not restored.

    python tests/mutants.py

Each mutant lives in a fork that imports the spoilt source in place of the file, so the working tree stays as it is, and meets
the quickest tests first. Exit status 1 if fewer than 90 % are noticed.
"""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm


REPOSITORY = Path(__file__).parent.parent
TIME_LIMIT = 600  # seconds for the tests of a mutant
WANTED = 0.9

# Imported once, before the first fork; none of them imports erw_hf.
PRELOAD = (
    "accelerate", "datasets", "diffusers.models.modeling_utils", "diffusers.pipelines.pipeline_utils", "matplotlib.pyplot",
    "pytest", "sklearn.datasets", "torch", "torchdata.stateful_dataloader", "transformers",
)  # fmt: skip

# Which tests should notice: arguments of pytest. None of them compares the files with the copies in pipelines/.
FLOW = ("tests/test_flow.py",)
ALIGNMENT = ("tests/test_alignment.py", "tests/test_warmup.py")
WARMUP = ("tests/test_warmup.py",)
CLASS_TOKEN = ("tests/test_class_token.py", "-k", "objective or teacher or hand_over or warmup_sees or gradients")
SAMPLE_PREDICTION = ("tests/test_prediction_type.py", "-k", "closed_forms or the_model or the_loss or times_of")
SCHEDULER = ("tests/test_scheduler.py",)
EMA = ("tests/trainer/test_ema.py", "-k", "not chosen_after_training")
CHECKPOINTS = ("tests/trainer/test_checkpoints.py",)
RESUMING = ("tests/trainer/test_training.py", "-k", "resumed_run_is_bitwise")
SAMPLES = ("tests/data/test_data.py", "-k", "draws or sampler or every_sample_once")
STREAMING = ("tests/data/test_streaming.py", "-k", "not training and not two_processes")


@dataclass(frozen=True)
class Mutant:
    """`before`, which `module` holds exactly once, becomes `after`; `tests` should fail."""

    module: str
    before: str
    after: str
    tests: tuple[str, ...]


MUTANTS = [
    # flow
    Mutant("flow", "d_alpha * x0 + d_sigma * noise", "d_alpha * x0 - d_sigma * noise", FLOW),
    Mutant("flow", "-math.pi / 2 * sigma, math.pi / 2 * alpha", "-math.pi / 2 * alpha, math.pi / 2 * sigma", FLOW),
    Mutant("flow", "path_coefficients(t.reshape(", "path_coefficients(t[:1].reshape(", FLOW),
    Mutant("flow", "/ (1 + (shift - 1) * t)", "/ (1 + shift * t)", FLOW),
    Mutant("flow", "t.clamp(min=SAMPLE_LOSS_TIME)).square()", "t.clamp(min=SAMPLE_LOSS_TIME))", SAMPLE_PREDICTION),
    Mutant(
        "transformer_erw",
        "(x_t.float() - sample.float()) / t",
        "(x_t.float() - sample.float()) * t",
        SAMPLE_PREDICTION,
    ),
    # alignment
    Mutant("alignment", "target.float(), dim=-1)).mean(dim=1)", "target.float(), dim=1)).mean(dim=1)", ALIGNMENT),
    Mutant("alignment", "initial * 2 ** (-step / half_life)\n", "initial * 2.718 ** (-step / half_life)\n", ALIGNMENT),
    Mutant("alignment", "if step < stop_step", "if step <= stop_step", ALIGNMENT),
    Mutant("objective", "depths = (self.depth,)", "depths = (self.depth - 1,)", ALIGNMENT),
    Mutant("objective", "force_drop_ids=drop", "force_drop_ids=0 * drop", ALIGNMENT),
    Mutant(
        "objective",
        "[output.class_hidden_states[0].unsqueeze(1), inputs[0]]",
        "[inputs[0], output.class_hidden_states[0].unsqueeze(1)]",
        CLASS_TOKEN,
    ),
    # the two phases and the hand-over
    Mutant(
        "objective",
        "interpolate(batch.x0, batch.noise, batch.t, self.path_type)",
        "interpolate(batch.x0, batch.noise, batch.t)",
        WARMUP,
    ),
    Mutant("objective", 'terms["alignment"] = Term(weight,', 'terms["alignment"] = Term(-weight,', WARMUP),
    Mutant("objective", "Term(-self.contrastive_weight,", "Term(self.contrastive_weight,", WARMUP),
    Mutant("objective", "torch.stack(losses).mean()", "losses[-1]", WARMUP),
    Mutant("objective", "[class_token.unsqueeze(1), tokens[0]]", "[tokens[0], class_token.unsqueeze(1)]", CLASS_TOKEN),
    Mutant(
        "alignment", "(length - num_tokens, 0)).long()", "(length - num_tokens, 0)).logical_not().long()", ALIGNMENT
    ),
    Mutant("warmup", "model.load_state_dict(tensors, strict=False)", "pass", WARMUP),
    Mutant("warmup", "missing = sorted(embedders - set(tensors))", "missing = []", WARMUP),
    Mutant(
        "warmup", '"transformer.proj_out.", "transformer.class_token_out.")', '"transformer.proj_out.")', CLASS_TOKEN
    ),
    # the samplers
    Mutant("scheduling_erw", "drift = (2 - t) * velocity + sample", "drift = (2 - t) * velocity - sample", SCHEDULER),
    Mutant(
        "scheduling_erw",
        "self.config.sigma_last, num_inference_steps, dtype=torch.float64)",
        "self.config.sigma_last, num_inference_steps + 1, dtype=torch.float64)[:-1]",
        SCHEDULER,
    ),
    Mutant(
        "scheduling_erw",
        "* noise\n\n        self._step_index = index + 1",
        "* noise\n\n        self._step_index = index",
        SCHEDULER,
    ),
    Mutant("scheduling_erw", "* sample - math.sin(", "* sample + math.sin(", SCHEDULER),
    Mutant("scheduling_erw", "int(matches[-1])", "int(matches[0])", SCHEDULER),
    Mutant("scheduling_erw", "(first_velocity + velocity) / 2 * dt", "first_velocity * dt", SCHEDULER),
    Mutant("scheduling_erw", "        self._predictor = None\n        sigmas =", "        sigmas =", SCHEDULER),
    # what is kept and restored on resuming: averages, checkpoints, samples, streams
    Mutant("trainer.ema", "(1 - 1 / step)", "(1 - 1 / (step + 1))", EMA),
    Mutant("trainer.ema", 'self.step_count = state["step_count"]', "pass", EMA),
    Mutant(
        "trainer.ema",
        "for average in self.averages:\n            saved",
        "for average in self.averages[:1]:\n            saved",
        EMA,
    ),
    Mutant("trainer.phase", 'self.lr_scheduler.load_state_dict(state["lr_scheduler"])', "pass", RESUMING),
    Mutant("trainer.phase", 'self.ema.load_state_dict(state["ema"])', "pass", RESUMING),
    Mutant("trainer.checkpoints", "return sorted(found, key=step_of)", "return sorted(found)", CHECKPOINTS),
    Mutant("trainer.checkpoints", "[: -max(total_limit, 1)]", "[: 1 - max(total_limit, 1)]", CHECKPOINTS),
    Mutant("trainer.checkpoints", "if path not in good[-1:]", "if True", CHECKPOINTS),
    Mutant(
        "trainer.checkpoints", "torch.load(checkpoint / _data_file(accelerator),", "torch.load(any_file,", CHECKPOINTS
    ),
    Mutant("data.samples", "range(self.start_step, self.end_step)", "range(self.end_step - self.start_step)", SAMPLES),
    Mutant("data.samples", "step * self.accumulation_steps + micro_step)", "step * self.accumulation_steps)", SAMPLES),
    Mutant("data.samples", "default_rng([self.seed, epoch])", "default_rng([self.seed])", SAMPLES),
    Mutant("data.streaming", '0 if state is None else state["row"]', "0", STREAMING),
    Mutant("data.streaming", '"offset": offset + 1', '"offset": offset', STREAMING),
    Mutant("data.streaming", "self._row % self.stride == self.first", "self._row % self.stride == 0", STREAMING),
    Mutant("data.streaming", "dataset.set_epoch(epoch)", "dataset.set_epoch(0)", STREAMING),
]


def source_of(module: str) -> Path:
    return REPOSITORY / "src" / "erw_hf" / f"{module.replace('.', '/')}.py"


class SpoiltLoader(importlib.machinery.SourceFileLoader):
    """Loads a module from a text in place of its file, bytecode cache and all."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str):
        return compile(self.text, self.path, "exec")


class SpoiltFinder:
    def __init__(self, mutant: Mutant) -> None:
        self.name, self.path = f"erw_hf.{mutant.module}", source_of(mutant.module)
        self.text = self.path.read_text().replace(mutant.before, mutant.after)

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            loader = SpoiltLoader(name, str(self.path), self.text)
            return importlib.util.spec_from_file_location(name, self.path, loader=loader)


class QuickestFirst:
    """A plugin of pytest: notes how long each test took, in a file, and runs those first that were quick before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = json.loads(path.read_text()) if path.exists() else {}
        self.known = dict(self.seconds)

    def pytest_collection_modifyitems(self, items: list) -> None:
        items.sort(key=lambda item: self.known.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        if not self.known:
            self.path.write_text(json.dumps(self.seconds))


def run_tests(tests: tuple[str, ...], mutant: Mutant | None, folder: Path) -> tuple[int, str]:
    """The status of pytest in a process of its own (-14: the time was up), and the first test that failed."""
    log = folder / "log"
    child = os.fork()
    if child == 0:
        import pytest

        os.setsid()  # with what the tests start
        signal.alarm(TIME_LIMIT)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if mutant is not None:
            sys.meta_path.insert(0, SpoiltFinder(mutant))
        flags = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp"]
        seconds = folder / f"{hashlib.sha256(repr(tests).encode()).hexdigest()}.json"
        status = pytest.main([*tests, *flags], plugins=[QuickestFirst(seconds)])
        sys.stdout.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    failed = [line.split()[1] for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return status, failed[0].removeprefix("tests/") if failed else ""


def main() -> None:
    for mutant in MUTANTS:
        found = source_of(mutant.module).read_text().count(mutant.before)
        if found != 1:
            sys.exit(f"{source_of(mutant.module)} holds {mutant.before!r} {found} times, not once: mend the table")
    os.chdir(REPOSITORY)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork after a parallel region may hang
    sys.path.insert(0, str(REPOSITORY / "src"))
    sys.dont_write_bytecode = True
    for name in PRELOAD:
        importlib.import_module(name)
    started, killed = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tests in tqdm(dict.fromkeys(mutant.tests for mutant in MUTANTS), desc="tests without a mutant"):
            status, failed = run_tests(tests, None, folder)
            if status != 0:
                sys.exit(f"pytest {' '.join(tests)} fails without any mutant (status {status}): {failed}")
        for mutant in tqdm(MUTANTS, desc="mutants"):
            status, failed = run_tests(mutant.tests, mutant, folder)
            if status not in (0, 1, -signal.SIGALRM):
                sys.exit(f"{mutant.module}: {mutant.after!r} broke the tests themselves (status {status}): {failed}")
            killed += status != 0
            verdict = {0: "SURVIVED", 1: "killed"}.get(status, "timed out")
            before = " ".join(mutant.before.split())
            after = " ".join(mutant.after.split())
            tqdm.write(f"{verdict:9} {mutant.module}: {before} -> {after}  {failed}")
    share = killed / len(MUTANTS)
    print(f"{killed} of {len(MUTANTS)} mutants killed ({share:.0%}) in {time.monotonic() - started:.0f} s")
    sys.exit(0 if share >= WANTED else 1)


if __name__ == "__main__":
    main()
