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
"""Pushing runs, warmups and latent caches to the Hub.

    python -m erw_hf.hub.push outputs/mine --hub_model_id user/mine

pushes what a run folder holds, or finishes an interrupted push. It does the same for the `warmup` folder of a run and for a
latent cache (a dataset). A run or a warmup is pushed in one commit, so a concurrent download gets the old state or the new one.
A cache has hundreds of gigabytes: its settings come first, then its files in as many commits as the client makes.

Nothing that is pushed names a path of this machine: of local datasets, encoders and autoencoders only the folder's name remains.

The trainer also pushes through this command, in a separate process, so that a push neither delays nor stops the training. Its
queue is the folder `hub` of the run: `hub/step-N` is a snapshot that waits or is being pushed, and it is removed once it is on
the Hub. Only the newest snapshot counts.
"""

import argparse
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from erw_hf.files import sync_tree
from erw_hf.hub.cards import CLASS_EMBEDDINGS, dataset_card, draws, evaluation_files, run_card
from erw_hf.hub.public import public_value
from erw_hf.hub.upload import HUB_ERRORS, leave_silent_servers, prepare_repo, retry, upload
from erw_hf.names import names_hub_file, resolve_flags
from erw_hf.trainer.config import OWN_KEYS
from erw_hf.trainer.run_record import keep_until, read_metrics


logger = logging.getLogger(__name__)

# Files of a run's record, removed from the Hub if this snapshot lacks them: they would belong to other weights.
RECORD_FILES = (
    "config.yaml", "environment.json", "warmup_from.json", "evaluation.json", ".eval_results/erw.yaml", "grid.png",
    "evaluations.jsonl", "quality_curve.png", "probes.png", CLASS_EMBEDDINGS,
)  # fmt: skip


class BackgroundPush:
    """Pushes snapshots while a run continues, by `python -m erw_hf.hub.push` in a separate process. Snapshots after
    `resume_step` belong to a run that was given up."""

    def __init__(self, run_dir: str | os.PathLike[str], resume_step: int) -> None:
        self.run_dir = Path(run_dir)
        self._process: subprocess.Popen[bytes] | None = None
        self._staged = False  # whether the last snapshot was taken
        # Whether a push was running at the last snapshot; it may have ended without seeing that snapshot.
        self._came_late = False
        for path in _queue(self.run_dir):
            if _step(path) > resume_step:
                shutil.rmtree(path)

    @property
    def command(self) -> str:
        """The command that finishes the push by hand."""
        return f"python -m erw_hf.hub.push {self.run_dir}"

    def submit(self, step: int, write_pipeline: Callable[[Path], None] | None, checkpoint: Path | None) -> None:
        """Takes a snapshot and starts its push. It replaces a snapshot that still waits. `write_pipeline` writes into
        a folder; `None` if there is no pipeline yet."""
        self._staged = False
        try:
            stage(self.run_dir, step, write_pipeline, checkpoint)
            self._came_late = self._process is not None and self._process.poll() is None
            if not self._came_late:
                self._process = self._start()
            self._staged = True
        except Exception as error:  # a full disk: OSError, or safetensors' own error
            logger.warning(f"no snapshot of step {step} to push: {error}")
            shutil.rmtree(self.run_dir / "hub" / ".writing", ignore_errors=True)

    def wait(self) -> bool:
        """Waits until the last snapshot is pushed or has failed; returns whether everything is on the Hub."""
        if self._process is not None:
            self._process.wait()
        if self._came_late and _queue(self.run_dir):
            self._start().wait()
        return self._staged and not _queue(self.run_dir)

    def _start(self) -> subprocess.Popen[bytes]:
        with (self.run_dir / "push.log").open("a") as log:
            command = [sys.executable, "-m", "erw_hf.hub.push", str(self.run_dir)]
            environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def stage(run_dir: Path, step: int, write_pipeline: Callable[[Path], None] | None, checkpoint: Path | None) -> Path:
    """Puts a snapshot into a run's queue, complete or not at all. Files that never change are hard links."""
    final, temporary = run_dir / "hub" / f"step-{step}", run_dir / "hub" / ".writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if write_pipeline is not None:
        write_pipeline(temporary)
    if checkpoint is not None:
        link_folder(checkpoint, temporary / "last-checkpoint")
    if (run_dir / "warmup" / "warmup.json").is_file():
        link_folder(run_dir / "warmup", temporary / "warmup")
    if final.exists():
        shutil.rmtree(final)
    sync_tree(temporary)
    os.replace(temporary, final)
    return final


def link_folder(source: Path, target: Path) -> None:
    """A copy of a folder that takes no disk space if the file system has hard links."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


def _step(snapshot: Path) -> int:
    return int(snapshot.name.split("-")[1])


def _queue(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "hub").glob("step-*"), key=_step)


def push_run(run_dir: Path, repo_id: str | None = None, private: bool = False) -> None:
    """Pushes the snapshot that waits in a run's queue or, without one, the finished run; by default to the config's
    `hub_model_id`, otherwise the folder's name. Raises ValueError if there is nothing to push, or it cannot be
    pushed."""
    (run_dir / "hub").mkdir(exist_ok=True)
    with (run_dir / "hub" / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another push of {run_dir} to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        _push_run(run_dir, repo_id, private)


def _push_run(run_dir: Path, repo_id: str | None, private: bool) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    if not _queue(run_dir):
        from erw_hf.trainer.checkpoints import list_checkpoints  # it imports torch

        pipeline, checkpoints = (
            run_dir / ("lora" if config.get("lora_rank") else "pipeline"),
            list_checkpoints(run_dir),
        )
        records = read_metrics(run_dir / "metrics.jsonl")  # for a branch, from its first step on
        is_over = bool(records) and records[-1]["step"] == config["max_train_steps"]
        # A finished run that is continued still has its old pipeline.
        is_trained = is_over and draws(pipeline)
        if not is_trained and not (run_dir / "warmup" / "warmup.json").is_file():
            raise ValueError(f"{run_dir} has neither a pipeline nor a warmup yet: finish the training first")
        with_checkpoint = config.get("hub_strategy") == "checkpoint" and bool(checkpoints)
        stage(
            run_dir,
            config["max_train_steps" if is_trained else "warmup_steps"],
            partial(link_folder, pipeline) if is_trained else None,
            checkpoints[-1] if with_checkpoint else None,
        )
    repo_id = prepare_repo(
        repo_id or config.get("hub_model_id") or run_dir.resolve().name, private or config.get("hub_private", False)
    )
    while waiting := _queue(run_dir):
        snapshot = waiting[-1]  # only the newest
        complete_snapshot(run_dir, snapshot, repo_id)
        address = upload(snapshot, repo_id, f"Step {_step(snapshot)}", replaced=RECORD_FILES)
        print(f"pushed step {_step(snapshot)}: {address}", flush=True)
        for done in waiting:
            shutil.rmtree(done)


def complete_snapshot(run_dir: Path, snapshot: Path, repo_id: str) -> None:
    """
    Adds what takes time or still changes: the record up to the snapshot's step, pictures, and the card for `repo_id`.
    """
    from erw_hf.trainer.plots import plot_losses

    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    environment = run_dir / "environment.json"
    local = json.loads(environment.read_text())["local"] if environment.is_file() else []
    kept = {name: public_value(value, local) for name, value in config.items() if name not in OWN_KEYS}
    init_from = str(config.get("init_from") or "")
    if environment.is_file() and init_from not in local and names_hub_file(init_from):
        kept["init_from"] = init_from  # a folder or file in a Hub repo, whose name looks like a path
    (snapshot / "config.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
    records: dict[str, Path | None] = {name: run_dir / name for name in ("environment.json", "warmup_from.json")}
    records["evaluation.json"] = _evaluation_of(
        run_dir, snapshot, (run_dir / "evaluation.json", run_dir / "evaluation" / "evaluation.json")
    )
    for name, path in records.items():
        if path is not None and path.is_file():
            (snapshot / name).write_text(json.dumps(public_value(json.loads(path.read_text()), local), indent=2))
    shutil.copyfile(run_dir / "metrics.jsonl", snapshot / "metrics.jsonl")
    keep_until(snapshot / "metrics.jsonl", _step(snapshot))
    plot_losses(snapshot / "metrics.jsonl", snapshot / "loss_curve.png")
    if (run_dir / "evaluations.jsonl").is_file():
        _add_curves(run_dir / "evaluations.jsonl", snapshot)
    grids = [path for path in (*run_dir.glob("samples/step-*.png"), run_dir / "grid.png") if path.is_file()]
    if grids and draws(snapshot):
        shutil.copyfile(max(grids, key=lambda path: path.stat().st_mtime_ns), snapshot / "grid.png")
    for name, text in evaluation_files(snapshot).items():
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).write_text(text)
    (snapshot / "README.md").unlink(missing_ok=True)  # the pipeline's, as a link
    run_card(snapshot, repo_id).save(snapshot / "README.md")


def _add_curves(source: Path, snapshot: Path) -> None:
    """The run's own measurements up to the snapshot's step, and their pictures."""
    from erw_hf.trainer.plots import plot_probes, plot_quality

    records = [record for record in read_metrics(source) if record["step"] <= _step(snapshot)]
    if not records:
        return
    (snapshot / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if any(record.get(name) is not None for record in records for name in ("fid", "accuracy")):
        plot_quality(records, snapshot / "quality_curve.png")
    probes = [(f"step {record['step']}", result) for record in records for result in record.get("probes", [])]
    if probes:
        plot_probes(probes, snapshot / "probes.png")


def _evaluation_of(run_dir: Path, snapshot: Path, records: Iterable[Path]) -> Path | None:
    """The newest record that measured these very weights: after resuming, a run's earlier record no longer fits."""
    found = None
    records = sorted((path for path in records if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    # Of an adapter what was measured is the pipeline that it is merged in, written beside it.
    pipeline = snapshot if (snapshot / "model_index.json").is_file() else run_dir / "pipeline"
    if records and draws(snapshot) and (pipeline / "model_index.json").is_file():
        # Seconds of a core that training has a better use for
        from erw_hf.provenance import weights_hash
        from erw_hf.transformer_erw import ERWTransformer2DModel

        transformer = ERWTransformer2DModel.from_pretrained(pipeline, subfolder="transformer")
        sha256 = weights_hash(transformer)
        for path in records:
            model = json.loads(path.read_text()).get("model")
            if model is not None and model["sha256"] == sha256:
                found = path
            else:
                print(f"{path} is not pushed: it measured other weights than those of {snapshot.name}", flush=True)
    return found


def push_warmup(folder: Path, repo_id: str, private: bool = False) -> None:
    """Pushes a run's `warmup` folder, which already has its card, as a repo of its own."""
    repo_id = prepare_repo(repo_id, private)
    print(f"pushed: {upload(folder, repo_id, 'ERW warmup')}")


def push_cache(folder: Path, repo_id: str, private: bool = False) -> None:
    """
    Pushes a latent cache as a dataset with its card; after an interruption, only the missing files. Raises ValueError
    if the cache is not complete.
    """
    from erw_hf.data.cache import check_cache_files

    check_cache_files(folder)
    repo_id = prepare_repo(repo_id, private, repo_type="dataset")
    dataset_card(folder, repo_id).save(folder / "README.md")
    # First the file that marks the repo as a cache, so that an interrupted push can be finished.
    settings = json.dumps(public_value(json.loads((folder / "cache.json").read_text())), indent=2).encode()
    retry(
        lambda: HfApi().upload_file(
            repo_id=repo_id, repo_type="dataset", path_or_fileobj=settings, path_in_repo="cache.json",
            commit_message="Settings of the latent cache",
        )
    )  # fmt: skip
    # Hundreds of gigabytes: the client splits them into several commits, so that no file is sent twice.
    patterns = ["README.md", "latent_statistics.json", "data/*.parquet"]
    commit = retry(
        lambda: HfApi().upload_folder(
            repo_id=repo_id, repo_type="dataset", folder_path=folder, allow_patterns=patterns,
            ignore_patterns="data/*.json", delete_patterns="data/*", commit_message="Latent cache",
        )
    )  # fmt: skip
    print(f"pushed: {commit.commit_url}", flush=True)


def main() -> None:
    """`python -m erw_hf.hub.push`."""
    parser = argparse.ArgumentParser(
        prog="python -m erw_hf.hub.push",
        description="Push a run, its warmup or a latent cache to the Hub, or finish a push that was interrupted.",
    )
    parser.add_argument("folder", type=Path, help="folder of a run, its `warmup` folder, or a latent cache")
    parser.add_argument(
        "--hub_model_id", "--hub_dataset_id", dest="repo_id", help="Hub id; the folder's name by default"
    )
    parser.add_argument("--hub_private", action="store_true", help="make the repo private")
    args = parser.parse_args()
    resolve_flags(parser, args, ["folder"])
    leave_silent_servers()
    try:
        if (args.folder / "cache.json").is_file():
            push_cache(args.folder, args.repo_id or args.folder.resolve().name, args.hub_private)
        elif (args.folder / "warmup.json").is_file():
            if args.repo_id is None:
                parser.error("name the repo of the warmup: --hub_model_id")
            push_warmup(args.folder, args.repo_id, args.hub_private)
        elif (args.folder / "config.yaml").is_file():
            push_run(args.folder, args.repo_id, args.hub_private)
        else:
            parser.error(f"{args.folder} is neither the folder of a run nor a warmup nor a latent cache")
    except (ValueError, *HUB_ERRORS) as error:
        raise SystemExit(f"not pushed: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
