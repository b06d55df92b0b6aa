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
"""Does the warmup pay? SiT, REPA, ERW and their controls under one budget of FLOPs, warmup and encoder counted.

    python benchmarks/convergence.py --arms sit repa repa_decay repa_woken erw erw_lambda0 --seeds 3
    python benchmarks/convergence.py --choosing 2 --arms sit_lr2e-3 repa_lr2e-3 erw_lr2e-3     # to choose by, never reported
    python benchmarks/convergence.py --data emoji --arms sit repa erw_noised start start_repa --seeds 1
    python benchmarks/convergence.py --report_only

Every run is `training/train_erw.py` with the flags of an arm (`recipes/arms.yaml`) on one base configuration
(`recipes/<data>.yaml`), measured by the project's own evaluation. Runs of one seed see the same images and noise in the
same step. A killed command goes on when it is given again; finished runs are skipped. Each finished run becomes one line of
`results/convergence-<data>.jsonl`, from which `results/convergence-<data>.md` and its plots are made.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import convergence_report
import torch
import yaml
from accelerate.utils import set_seed
from convergence_report import FIRST_CHOOSING_SEED, is_choosing
from transformers import AutoConfig, AutoModel

from erw_hf import ERWTransformer2DModel, RepresentationEncoder
from erw_hf.data.source import load_source
from erw_hf.provenance import file_hash
from erw_hf.trainer.config import TrainingConfig, parse_config
from erw_hf.trainer.flops import count_step_flops
from erw_hf.trainer.run_record import read_metrics
from erw_hf.trainer.setup import build_full_model, build_teacher, build_warmup_model
from erw_hf.warmup import build_warmup_transformer


REPOSITORY = Path(__file__).resolve().parent.parent
THINNED_TO = 100  # lines of metrics.jsonl that a record keeps
NOT_FLAGS = ("start", "blocks", "gate", "best_of", "budget")  # of an arm; all other keys are flags of train_erw.py
FROM_A_WARMUP = ("asleep", "modulation")
CONTROLS = ("random", "permuted", "gates")  # encoders of an arm that are made from the base's


# torch's random state, its FLOP counter's hooks and the building of models are one for all threads.
BUILDING = threading.Lock()
RECORDING = threading.Lock()


class OutOfTime(Exception):
    """The slice of time is over; the run resumes in the next one."""


@dataclass
class Study:
    """What all runs of a command share."""

    recipes: Path
    data: str
    runs: Path
    results: Path
    budget: float
    table: dict  # of read_table
    stop_at: float = float("inf")  # on time.monotonic's clock
    device: str = "cpu"

    @property
    def base(self) -> Path:
        return self.recipes / f"{self.data}.yaml"

    @property
    def records(self) -> Path:
        return convergence_report.records_path(self.results, self.data)

    def budget_of(self, arm: dict) -> float:
        """FLOPs of a run of the arm."""
        return self.budget * arm.get("budget", 1)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    recipes = ("digits", "digits-s2", "emoji")
    parser.add_argument("--data", default="digits", choices=recipes, help="the recipe to run")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--arms", nargs="+", default=[], help="names of the recipe's arms")
    parser.add_argument("--seeds", type=int, default=0, help="run the reported seeds 0 to N - 1")
    parser.add_argument(
        "--choosing",
        type=int,
        default=0,
        help=f"run N choosing seeds from {FIRST_CHOOSING_SEED} on, measured only at their end",
    )
    parser.add_argument("--budget", type=float, help="FLOPs of a run; the recipe's by default")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--max_minutes", type=float, help="stop after this time; the same command continues")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "outputs" / "convergence", help="the runs' folders")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--recipes", type=Path, default=Path(__file__).parent / "recipes")
    parser.add_argument(
        "--report_only", action="store_true", help="only make page and plots from the recorded results"
    )
    args = parser.parse_args(arguments)
    if not args.report_only and not (args.arms and (args.seeds or args.choosing)):
        parser.error("name --arms, and --seeds or --choosing; or --report_only")
    return args


def main(arguments: list[str] | None = None) -> bool:
    """Returns whether all is finished."""
    args = parse_arguments(arguments)
    table = read_table(args.recipes, args.data)
    study = Study(
        args.recipes.resolve(),
        args.data,
        (args.runs / args.data).resolve(),
        args.results.resolve(),
        float(args.budget or table["budget"]),
        table,
        device=args.device,
    )
    finished = True
    if not args.report_only:
        check_recipe(study)
        if args.max_minutes is not None:
            study.stop_at = time.monotonic() + 60 * args.max_minutes
        finished = run_all(study, args)
    convergence_report.write_report(args.results, args.data, table, encoder_cost(study))
    return finished


def read_table(recipes: Path, data: str) -> dict:
    """`arms.yaml` as it is for the data, whose keys stand beside the shared ones, and with the warmups in steps."""
    table = yaml.safe_load((recipes / "arms.yaml").read_text())
    table |= table.pop("data")[data]
    for name, arm in table["arms"].items():
        if "warmup" in arm:
            steps = int(arm.pop("warmup") * table["warmup_steps"])
            table["arms"][name] = {"warmup_steps": steps, **arm}
    return table


def check_recipe(study: Study) -> None:
    config = read_config(study, {})
    for name in ("dataset_name", "encoder", "evaluation_reference", "evaluation_extractor"):
        value = getattr(config, name)
        if os.path.isabs(value) and not os.path.exists(value):
            raise ValueError(f"{name} {value} is not there: make it as the head of {study.base} says")


def run_all(study: Study, args: argparse.Namespace) -> bool:
    seeds = [*range(FIRST_CHOOSING_SEED, FIRST_CHOOSING_SEED + args.choosing), *range(args.seeds)]
    arms = {name: resolve_arm(study, name) for name in args.arms}  # whatever is wrong, before the first run
    study.results.mkdir(parents=True, exist_ok=True)

    def stop(signum: int, frame: object) -> None:
        study.stop_at = 0

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(args.jobs) as pool:
        # Seeds before arms: what is stopped early has fewer seeds of every arm, not fewer arms.
        jobs = [pool.submit(run_arm, study, name, arms[name], seed) for seed in seeds for name in args.arms]
        left, failed = 0, []
        for job in jobs:
            try:
                job.result()
            except OutOfTime:
                left += 1
            except Exception as error:  # of one run; the others go on
                print(error, flush=True)
                failed.append(error)
    if failed:
        raise failed[0]
    if left:
        print(f"{left} of {len(jobs)} runs are unfinished: the same command goes on with them", flush=True)
    return left == 0


def resolve_arm(study: Study, name: str) -> dict:
    """What an arm changes of the base; of `best_of`, what the winner on the choosing seeds does."""
    arms = study.table["arms"]
    if name not in arms:
        raise ValueError(f"no arm {name!r} in arms.yaml; it has {', '.join(arms)}")
    arm = dict(arms[name])
    if "best_of" in arm:
        records = convergence_report.load_records(study.records)
        winner = convergence_report.choose(records, arm["best_of"])
        return {**resolve_arm(study, winner), "chosen": winner}
    return arm


def run_arm(study: Study, name: str, arm: dict, seed: int) -> None:
    """One run, from wherever it was left to its record."""
    arm = dict(arm)
    chosen = arm.pop("chosen", None)
    for record in convergence_report.load_records(study.records):
        if (record["arm"], record["seed"]) == (name, seed):
            then = effective(record["base"], record["arm_settings"], record["budget"])
            now = effective(read_base(study), arm, study.budget_of(arm))
            differing = [key for key in {**now, **then} if now.get(key) != then.get(key)]
            if differing:
                raise ValueError(
                    f"{study.records} holds {name}, seed {seed}, made with another {differing[0]}: choose another --results and "
                    f"--runs, or delete that line and {study.runs}/{name}-seed{seed}, with its .json"
                )
            return
    folder = study.runs / f"{name}-seed{seed}"
    begun, settings = Path(f"{folder}.json"), effective(read_base(study), arm, study.budget_of(arm))
    if begun.exists() and json.loads(begun.read_text()) != settings:
        raise ValueError(
            f"{folder} was begun with other settings: choose another --runs, or delete {folder} and {begun}"
        )
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(settings))
    flags, before = prepare(study, arm, seed, folder)
    script = ["training/train_erw.py", "--config", relative(study.base), *flags]
    run_script(study, [*script, f"--output_dir={folder}", "--resume_from_checkpoint=latest"], f"{folder}.log")
    probes = [] if is_choosing(seed) else run_probes(study, folder)
    if seed == 0:  # the pictures of one seed tell enough
        picture = convergence_report.picture_path(study.results, study.data, name)
        picture.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "grid.png", picture)
    add_record(
        study.records,
        {
            "arm": name,
            "arm_settings": arm,
            **({"chosen": chosen} if chosen else {}),
            "seed": seed,
            "data": study.data,
            "base": read_base(study),
            "budget": study.budget_of(arm),
            "command": f"python benchmarks/convergence.py --data {study.data} --arms {chosen or name} --budget {study.budget:g} "
            + (f"--choosing {seed - FIRST_CHOOSING_SEED + 1}" if is_choosing(seed) else f"--seeds {seed + 1}")
            + " --device cuda" * (study.device == "cuda"),
            "training_command": "OMP_NUM_THREADS=1 "
            + "ACCELERATE_USE_CPU=true " * (study.device == "cpu")
            + "python "
            + " ".join(script)
            .replace(f"{study.runs}/", f"outputs/convergence/{study.data}/")
            .replace(f"{REPOSITORY}/", ""),
            **measurements(folder, before),
            "probes": probes,
            **provenance(study, flags),
            **{k: v for k, v in json.loads((folder / "environment.json").read_text()).items() if k != "local"},
        },
    )
    for checkpoint in folder.rglob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    print(f"{name}, seed {seed}: a line of {study.records}", flush=True)


def effective(base: dict, arm: dict, budget: float) -> dict:
    """What makes two runs of one seed the same run; the CPU's precision and the encoder's weights are on record beside it."""
    settings = {"ema_ramp": False, **base}  # records older than the ramp do not name it
    del settings["mixed_precision"], settings["encoder"]
    return {**settings, **arm, "budget": budget}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to the records of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def add_record(path: Path, record: dict) -> None:
    """Appends a line; a kill leaves the file with or without it. Other commands may write to the same file."""
    with RECORDING, held(path.parent):
        before = path.read_text() if path.exists() else ""
        temporary = path.with_suffix(".writing")
        temporary.write_text(before + json.dumps(record) + "\n")
        os.replace(temporary, path)


def provenance(study: Study, flags: list[str]) -> dict:
    """The commit that a run was made with, and the weights that it was taught and measured by."""

    def git(*words: str) -> str:
        result = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
        return result.stdout.strip()

    config = parse_config(["--config", str(study.base), *flags])
    weights = {"encoder": config.encoder, "evaluation_extractor": config.evaluation_extractor}
    taught = config.encoder is not None and (config.alignment_weight > 0 or config.start_from_encoder > 0)
    training = Path(config.encoder or "") / "training.json"  # of train_tiny_encoder.py
    return {
        **({"teacher": read_teacher(training)} if taught and training.is_file() else {}),
        "commit": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "src", "training") else ""),
        "weights": {
            name: file_hash(Path(folder) / "model.safetensors")
            for name, folder in weights.items()
            if folder is not None and (Path(folder) / "model.safetensors").is_file()
        },
    }


def read_teacher(training: Path) -> dict:
    """What an encoder knows and what that took."""
    record = json.loads(training.read_text())
    return {
        "name": training.parent.name,
        **{key: record[key] for key in ("held_out_accuracy", "flops", "images_seen")},
    }


def run_probes(study: Study, folder: Path) -> list[dict]:
    """By the encoder that was trained, whatever the arm was aligned with."""
    config = read_config(study, {})
    probe = [
        "training/probe.py", f"--model={folder}/pipeline", f"--dataset_name={config.dataset_name}",
        f"--test_split={study.table['probe_split']}", f"--encoder={config.encoder}", "--times", "0", "0.5",
        f"--num_images={study.table['probe_images']}", f"--output_dir={folder}/probe",
    ]  # fmt: skip
    run_script(study, probe, f"{folder}.log")
    return json.loads((folder / "probe" / "probe.json").read_text())["probes"]


def prepare(study: Study, arm: dict, seed: int, folder: Path) -> tuple[list[str], list[Path]]:
    """Flags of the run, and the folders of what was trained before it, whose cost counts too."""
    settings = {key: value for key, value in arm.items() if key not in NOT_FLAGS}
    settings["seed"] = seed
    before = []
    if settings.get("encoder") in CONTROLS:
        settings["encoder"] = str(control_encoder(study, settings["encoder"], seed))
    for name in {"dataset_name", "encoder", "vae"} & set(settings):
        settings[name] = str(REPOSITORY / settings[name])
    config = read_config(study, settings)
    # Steps from the budget before the start is made: a warmup that the start is made of is paid from it
    config.max_train_steps, every = plan(config, study.budget_of(arm), study.table["evaluations"])
    start = arm.get("start")
    if start in FROM_A_WARMUP:
        warmup = folder / "warmup-run"
        flags = to_flags({**settings, "max_train_steps": config.warmup_steps, "evaluation_steps": 0})
        run_script(
            study,
            ["training/train_erw.py", "--config", relative(study.base), *flags, f"--output_dir={warmup}",
             "--resume_from_checkpoint=latest"],
            f"{folder}.log",
        )  # fmt: skip
        before = [warmup]
        config.max_train_steps -= config.warmup_steps
        every = config.max_train_steps // study.table["evaluations"]
        config.max_train_steps = every * study.table["evaluations"]
        settings["warmup_steps"] = 0
    if start is not None:
        settings["warmup_from"] = str(make_start(config, arm, folder))
        # A projector that was trained goes with the weights that it was trained on.
        settings["hand_over_projector"] = start == "asleep"
    if is_choosing(seed):  # only its end counts
        every = config.max_train_steps
    settings |= {"max_train_steps": config.max_train_steps, "evaluation_steps": every}
    return to_flags(settings), before


def plan(config: TrainingConfig, budget: float, evaluations: int) -> tuple[int, int]:
    """
    How many steps the budget pays for, and how many lie between two evaluations. The last evaluation is at the last step,
    so up to `evaluations` - 1 steps of the budget are left over.
    """
    warmup, full = step_flops(config)
    steps = config.warmup_steps + int((budget - config.warmup_steps * warmup) // full)
    if steps < config.warmup_steps + evaluations:
        raise ValueError(
            f"a budget of {budget:g} FLOPs ends before full training: a warmup step takes {warmup:g}, a full one {full:g}"
        )
    every = steps // evaluations
    return every * evaluations, every


def step_flops(config: TrainingConfig) -> tuple[int, int]:
    """FLOPs of a warmup step and of a full step, as train_erw.py counts them."""
    num_classes = load_source(**config.source_arguments()).num_classes
    encoders = [RepresentationEncoder.from_pretrained(name, config.token_grid) for name in config.encoders]
    batch = config.step_batch_size(processes=1)
    with BUILDING, torch.device("meta"):
        full = build_full_model(config, num_classes, encoders)
        teacher = build_teacher(config, encoders, cached=False)
        full_flops = count_step_flops(full, teacher.encoders_for(aligned=bool(full.projectors))) * batch
        if config.warmup_steps == 0:
            return 0, full_flops
        return count_step_flops(build_warmup_model(config, num_classes, encoders), encoders) * batch, full_flops


def control_encoder(study: Study, kind: str, seed: int) -> Path:
    """
    The encoder's architecture, with weights that know nothing and are drawn with the run's seed: `random` ones, those but
    its LayerScale `gates`, or its own with the rows of each matrix `permuted`.
    """
    trained = Path(read_config(study, {}).encoder)
    folder = study.runs / f"{kind}-{trained.name}-seed{seed}"
    if not (folder / "config.json").exists():
        # Two arms may want it at once.
        work = folder.with_name(f"{folder.name}.{threading.get_ident()}")
        with BUILDING, torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModel.from_config(AutoConfig.from_pretrained(trained))
            theirs = {} if kind == "random" else AutoModel.from_pretrained(trained, dtype=torch.float32).state_dict()
            if kind == "gates":
                theirs = {name: tensor for name, tensor in theirs.items() if "layer_scale" in name}
            elif kind == "permuted":
                theirs = {n: t[torch.randperm(len(t))] if t.ndim > 1 else t for n, t in theirs.items()}
            model.load_state_dict(theirs, strict=False)
            model.save_pretrained(work)
        shutil.copyfile(trained / "preprocessor_config.json", work / "preprocessor_config.json")
        try:
            work.rename(folder)
        except OSError:
            shutil.rmtree(work)
    return folder


def make_start(config: TrainingConfig, arm: dict, folder: Path) -> Path:
    """Writes the weights that a run starts from, in the layout of a warmup, as `--warmup_from` takes it."""
    num_classes = load_source(**config.source_arguments()).num_classes
    blocks = arm.get("blocks", config.warmup_depth)
    model_config = config.model_config(num_classes)
    with BUILDING, torch.random.fork_rng():
        # As train_erw.py before it builds the full model: these are the weights that it would have
        set_seed(config.seed)
        fresh = ERWTransformer2DModel(**model_config).state_dict()
        transformer = build_warmup_transformer(model_config, blocks)
    transformer.load_state_dict({name: fresh[name] for name in transformer.state_dict()})
    target = Path(str(folder) + "-start")
    target.mkdir(parents=True, exist_ok=True)
    if arm["start"] == "woken":
        for block in transformer.transformer_blocks:
            _, _, gate_msa, _, _, gate_mlp = block.modulation.bias.data.chunk(6)
            gate_msa.fill_(arm["gate"])
            gate_mlp.fill_(arm["gate"])
    else:
        source = folder / "warmup-run" / "warmup"
        warmed = ERWTransformer2DModel.from_pretrained(source / "transformer").state_dict()
        if arm["start"] == "modulation":
            kept = {k: v for k, v in warmed.items() if ".modulation." in k or "time_class_embed." in k}
        else:  # asleep
            kept = {
                k: torch.zeros_like(v) if "transformer_blocks" in k and ".modulation." in k else v
                for k, v in warmed.items()
            }
            shutil.copyfile(source / "projectors.safetensors", target / "projectors.safetensors")
        transformer.load_state_dict(kept, strict=False)
    transformer.save_pretrained(target / "transformer")
    return target


def read_base(study: Study) -> dict:
    return yaml.safe_load(study.base.read_text())


def read_config(study: Study, settings: dict) -> TrainingConfig:
    return parse_config(["--config", str(study.base), *to_flags(settings)])


def to_flags(settings: dict) -> list[str]:
    return [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


def relative(path: Path) -> str:
    return os.path.relpath(path, REPOSITORY)


def run_script(study: Study, command: list[str], log: str) -> None:
    """A script of training/ in a process of one thread, until it ends or the time is over."""
    if time.monotonic() > study.stop_at:
        raise OutOfTime
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | (
        {"ACCELERATE_USE_CPU": "true"} if study.device == "cpu" else {}
    )
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        stopping = False
        while process.poll() is None:
            time.sleep(0.2)
            if time.monotonic() > study.stop_at and not stopping:
                process.terminate()  # train_erw.py saves a checkpoint then
                stopping = True
    if stopping:
        raise OutOfTime
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed, see {log}:\n{Path(log).read_text()[-2000:]}")


def measurements(folder: Path, before: list[Path]) -> dict:
    """What the run wrote, with the steps, FLOPs and seconds of what was trained before it added."""
    steps = flops = 0
    seconds = 0.0
    by_step, lines = {}, []
    for run in [*before, folder]:
        first_step, first_flops, images = steps, flops, 0
        for line in read_metrics(run / "metrics.jsonl"):
            seconds += (line["images_seen"] - images) / line["images_per_second"]
            images = line["images_seen"]
            steps, flops = first_step + line["step"], first_flops + line["flops"]
            by_step[line["step"]] = {"step": steps, "flops": flops, "seconds": round(seconds, 2)}
            shown = ("phase", "loss", "velocity", "alignment", "lambda", "grad_norm")
            lines.append(by_step[line["step"]] | {name: line[name] for name in shown if line.get(name) is not None})
    points = [
        by_step[line["step"]] | {name: line[name] for name in ("fid", "accuracy") if name in line}
        for line in read_metrics(folder / "evaluations.jsonl")
        if "fid" in line
    ]
    if not points or points[-1]["step"] != steps:
        raise RuntimeError(f"{folder} lacks the measurement of its last step: see its log")
    every = max(1, len(lines) // THINNED_TO)
    return {"points": points, "metrics": lines[::every]}


def encoder_cost(study: Study) -> dict | None:
    """
    What the encoder itself took to train: in no run's budget, since one encoder serves all, but to be stated. `None` where
    the records say it, of each teacher.
    """
    if "encoder_training" not in study.table:
        return None
    config = read_config(study, {})
    encoder = RepresentationEncoder.from_pretrained(config.encoder, config.token_grid)
    training = study.table["encoder_training"]
    with torch.device("meta"):
        model = build_warmup_model(config, 1, [encoder])
    forward = count_step_flops(model, [encoder]) - count_step_flops(model, [])
    flops = 3 * forward * training["steps"] * training["images_per_step"]  # a backward is two forwards
    return {**training, "flops": flops, "name": Path(config.encoder).name}


if __name__ == "__main__":
    sys.exit(0 if main() else 3)
