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
"""Pushing to the Hub: the real client, a loopback Hub, faults and kills."""

import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers import (
    REPOSITORY,
    TINY_MODEL,
    TRAINING,
    Forked,
    check_ended,
    forked_ranks,
    launch_training,
    randomize,
    run_forked,
    run_script,
    short_pauses,
    train,
    wait_until,
)
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from loopback_hub import READ_TOKEN, LoopbackHub
from PIL import Image
from safetensors.torch import load_file, save_file

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler
from erw_hf.data.cache import check_cache
from erw_hf.hub import push, upload
from erw_hf.hub.space import publish_space
from erw_hf.names import resolve_name
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.initialization import load_initial
from erw_hf.trainer.run_record import read_metrics


TEXT = {".md", ".json", ".jsonl", ".yaml", ".txt", ".py"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A loopback Hub for this process and those that it starts, whose pauses between attempts take no time."""
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "home")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # This process imported the client before its variables were set.
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", environment["HF_HUB_CACHE"])
        monkeypatch.setattr(upload, "RETRY_SECONDS", (0.01,) * 6)
        monkeypatch.setattr(push, "subprocess", SimpleNamespace(Popen=forked, DEVNULL=subprocess.DEVNULL))
        for name, value in short_pauses(tmp_path / "site", 100).items():
            monkeypatch.setenv(name, value)
        yield hub


def forked(command, stdin, stdout, stderr, env):
    """As `subprocess.Popen` for a push in the background, whose imports are done."""
    return Forked(command[1:], env, log=Path(stdout.name))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_flags):
    """A run that ended before anybody thought of pushing it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(*tiny_flags, f"--output_dir={folder}", "--checkpoints_total_limit=9")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def push_command(*arguments):
    return run_forked("-m", "erw_hf.hub.push", *arguments)


def titles(hub, repo_id="user/m", kind="models"):
    """Of the commits, the newest first."""
    repo, found = hub.repos[kind, repo_id], []
    sha = repo.branches["main"]
    while sha is not None:
        found.append(repo.commits[sha].title)
        sha = repo.commits[sha].parent
    return found


def names_no_path_of_this_machine(files):
    texts = {name: data.decode() for name, data in files.items() if Path(name).suffix in TEXT}
    assert {"README.md", ".json"} <= {*texts, *(Path(name).suffix for name in texts)}
    roots = [str(REPOSITORY), tempfile.gettempdir()]
    assert [(name, root) for name, text in texts.items() for root in roots if root + "/" in text] == []


SAME_IMAGES = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler
repo, folder = sys.argv[1:]
pipelines = [
    ERWPipeline.from_pretrained(folder),
    ERWPipeline.from_pretrained(repo),
    DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True),
]
first, *others = [
    pipeline(class_labels=["3", 7], num_inference_steps=3, generator=torch.manual_seed(0), output_type="np").images
    for pipeline in pipelines
]
assert first.std() > 0 and all(numpy.array_equal(first, images) for images in others)
"""


def test_faults_a_kill_and_the_command_that_finishes_the_push(hub, tmp_path, tiny_flags):
    """500, 429, 412, a cut connection and a lost answer are got over; SIGKILL during the push loses nothing."""
    folder = tmp_path / "run"
    faults = [
        hub.fault("/preupload/", status=500),
        hub.fault("objects/batch", status=429, retry_after=1),
        hub.fault("^/lfs/", method="PUT", cut_after=500),
        hub.fault("/commit/", status=412),
        hub.fault("/commit/", status=500),
        hub.fault("/commit/", hang=600, status=500),
    ]
    flags = (*tiny_flags, f"--output_dir={folder}", "--push_to_hub", "--hub_model_id=m")
    with forked_ranks(1, *TRAINING, *flags) as (process,):  # killed at the end, with the process that it pushes in
        wait_until(lambda: faults[-1].fired, process)
    assert [fault.fired for fault in faults] == [1] * len(faults), (folder / "push.log").read_text()
    assert titles(hub) == ["initial commit"]  # a push is one commit: nothing of it shows

    lost = hub.fault("/commit/", lose_answer=True)
    result = push_command(folder)
    assert result.returncode == 0, result.stderr
    assert lost.fired == 1 and titles(hub) == ["Step 7", "initial commit"]  # done once, though told nothing
    assert not push._queue(folder)
    files = hub.files("models", "user/m")
    assert {"README.md", "config.yaml", "metrics.jsonl", "loss_curve.png", "grid.png", "pipeline.py"} <= set(files)
    assert files["grid.png"] == (folder / "grid.png").read_bytes()
    assert not {"push_to_hub", "output_dir", "overwrite_output_dir"} & set(yaml.safe_load(files["config.yaml"]))
    check_ended([run_forked("-c", SAME_IMAGES, "user/m", folder / "pipeline")])


def losses(folder):
    return [(record["step"], record["loss"]) for record in read_metrics(Path(folder) / "metrics.jsonl")]


def test_a_push_that_never_works_costs_nothing_but_a_warning(hub, finished, tmp_path, tiny_flags, caplog):
    hub.fault("/commit/", status=500, times=None)
    flags = [f"--output_dir={tmp_path}/run", "--push_to_hub", "--hub_model_id=user/m", "--hub_strategy=every_save"]
    with caplog.at_level(logging.WARNING):
        train(*tiny_flags, *flags)  # returns: status 0
    warnings = [record.getMessage() for record in caplog.records if "push to" in record.getMessage()]
    assert len(warnings) == 1 and f"python -m erw_hf.hub.push {tmp_path}/run" in warnings[0]
    assert (tmp_path / "run/pipeline/model_index.json").is_file() and (tmp_path / "run/checkpoint-7").is_dir()
    assert losses(tmp_path / "run") == losses(finished)
    hub.faults.clear()
    push.push_run(tmp_path / "run")
    assert titles(hub) == ["Step 7", "initial commit"]


def test_snapshots_hold_the_ema_and_the_checkpoint_of_their_step(hub, tmp_path, tiny_flags, monkeypatch):
    monkeypatch.setattr(push.BackgroundPush, "_start", lambda self: None)  # they stay where they wait
    folder = tmp_path / "run"
    flags = ["--push_to_hub", "--hub_model_id=user/m", "--hub_strategy=checkpoint", "--checkpoints_total_limit=1"]
    train(*tiny_flags, f"--output_dir={folder}", *flags)
    assert [path.name for path in push._queue(folder)] == [f"step-{i}" for i in (2, 3, 4, 6, 7)]
    assert (folder / "hub/step-2/last-checkpoint").is_dir() and not (folder / "hub/step-2/model_index.json").exists()
    for step in (4, 6, 7):
        snapshot = folder / "hub" / f"step-{step}"
        assert (snapshot / "warmup" / "README.md").is_file()
        assert json.loads((snapshot / "last-checkpoint/progress.json").read_text())["step"] == step
        ema = torch.load(snapshot / "last-checkpoint/training_state.pt", weights_only=True)["ema"]
        transformer = ERWPipeline.from_pretrained(snapshot).transformer
        assert all(torch.equal(tensor, ema["averages"][0][name]) for name, tensor in transformer.named_parameters())
    assert not (folder / "checkpoint-4").exists()  # removed by the limit, while its snapshot still waits


def test_a_server_that_falls_silent_is_left(hub, run):
    hub.fault("/commit/", hang=600)
    code = "from erw_hf.hub import push, upload; upload.SILENCE_SECONDS = 0.5; push.main()"
    check_ended([run_forked("-c", code, run, "--hub_model_id=user/m")])
    assert titles(hub) == ["Step 7", "initial commit"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", "needs a token"),
        ("read token", "does not allow pushing"),
        ("somebody else's", "does not allow pushing"),
        ("data set", "user/m is a dataset"),
        ("another model", "holds something else"),
        ("another pipeline", "holds something else"),
        ("no pipeline", "holds something else"),
        ("offline", "cannot be reached"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_step_1(hub, tmp_path, tiny_flags, monkeypatch, case, message):
    repo_id = "user/m"
    if case == "no token":
        monkeypatch.setenv("HF_TOKEN", "")
    if case == "read token":
        monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    if case == "somebody else's":
        repo_id = "stranger/m"
        hub.add_repo("models", repo_id)
    if case == "data set":
        hub.add_repo("datasets", repo_id)
    other = tmp_path / "other"
    other.mkdir()
    if case == "another model":
        (other / "config.json").write_text("{}")
        hub.add_repo("models", repo_id, other)
    if case == "another pipeline":
        (other / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
        hub.add_repo("models", repo_id, other)
    if case == "no pipeline":
        (other / "model_index.json").write_text("{}")
        hub.add_repo("models", repo_id, other)
    if case == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        train(*tiny_flags, f"--output_dir={tmp_path}/run", "--push_to_hub", f"--hub_model_id={repo_id}")
    assert not (tmp_path / "run").exists()


def test_of_several_snapshots_the_newest_is_pushed(hub, run):
    background = push.BackgroundPush(run, resume_step=7)
    hanging = hub.fault("/commit/", hang=600)
    write_pipeline = partial(push.link_folder, run / "pipeline")
    push_config(run, hub_model_id="user/m")
    background.submit(5, write_pipeline, None)
    wait_until(lambda: hanging.fired)
    started = time.monotonic()
    background.submit(6, write_pipeline, None)
    background.submit(7, write_pipeline, None)
    assert time.monotonic() - started < 600  # which the Hub hangs; training waits for files, not for the Hub
    hanging.released.set()
    assert background.wait()
    assert titles(hub) == ["Step 7", "Step 5", "initial commit"]
    assert len(hub.files("models", "user/m")["metrics.jsonl"].splitlines()) == 7
    assert "after step 5 of 7" in hub.files("models", "user/m", hub_parent(hub))["README.md"].decode()


def test_the_last_snapshot_is_tried_though_the_one_before_failed(hub, run):
    push_config(run, hub_model_id="user/m")
    refused = hub.fault("/commit/", hang=600, status=403)
    background = push.BackgroundPush(run, resume_step=7)
    background.submit(5, partial(push.link_folder, run / "pipeline"), None)
    wait_until(lambda: refused.fired)
    background.submit(7, partial(push.link_folder, run / "pipeline"), None)
    refused.released.set()
    assert background.wait() and titles(hub) == ["Step 7", "initial commit"]
    assert "not pushed" in (run / "push.log").read_text() or "403" in (run / "push.log").read_text()


def test_two_pushes_of_a_run_follow_each_other(hub, run):
    hanging = hub.fault("/commit/", hang=600)
    command = ["-m", "erw_hf.hub.push", run, "--hub_model_id=user/m"]
    with forked_ranks(1, *command) as (first,):
        wait_until(lambda: hanging.fired, first)
        with forked_ranks(1, *command) as (second,):
            wait_until(lambda: "waiting for another push" in second.stdout, second)
            hanging.released.set()
            assert [process.wait() for process in (first, second)] == [0, 0]
            assert "pushed step 7" in second.stdout and titles(hub) == ["Step 7", "initial commit"]


def test_what_ends_a_push_is_said_in_a_line(hub, run):
    hub.fault("/commit/", status=403)
    (run / "metrics.jsonl").rename(run / "elsewhere.jsonl")
    lost = push_command(run, "--hub_model_id=user/m")
    (run / "elsewhere.jsonl").rename(run / "metrics.jsonl")
    refused = push_command(run, "--hub_model_id=user/m")
    for result, word in ((lost, "metrics.jsonl"), (refused, "403")):
        assert result.returncode == 1 and "Traceback" not in result.stderr
        last = result.stderr.splitlines()[-1]
        assert last.startswith("not pushed: ") and word in last


def test_measurements_of_the_run_are_pushed_up_to_the_snapshots_step(hub, run):
    probes = [{"t": 0.0, "cknna": [0.1, 0.2], "accuracy": [0.3, 0.4]}]
    records = [{"step": i, "phase": "full", "images_seen": 4 * i, "fid": 9.0 - i, "probes": probes} for i in (4, 7)]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    push_config(run, hub_model_id="user/m")
    push.stage(run, 5, partial(push.link_folder, run / "pipeline"), None)
    push.push_run(run)
    files = hub.files("models", "user/m")
    assert [json.loads(line) for line in files["evaluations.jsonl"].splitlines()] == records[:1]
    for name in ("quality_curve.png", "probes.png"):
        assert files[name].startswith(b"\x89PNG") and f"]({name})" in files["README.md"].decode()
    (run / "evaluations.jsonl").unlink()  # of a run that is made anew without
    push.push_run(run)
    files = hub.files("models", "user/m")
    assert not {"evaluations.jsonl", "quality_curve.png", "probes.png"} & set(files)
    assert "probes.png" not in files["README.md"].decode()


def test_a_full_disk_ends_no_run(hub, run, caplog):
    def full(folder):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    background = push.BackgroundPush(run, resume_step=7)
    background.submit(7, full, None)
    assert not background.wait() and "No space left" in caplog.text
    assert not list((run / "hub").iterdir())


def push_config(run, **values):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **values}))


def hub_parent(hub, repo_id="user/m"):
    repo = hub.repos["models", repo_id]
    return repo.commits[repo.branches["main"]].parent


def test_a_second_push_sends_what_changed_and_removes_what_is_gone(hub, run):
    push.push_run(run, "user/m")
    uploads = hub.count("^/lfs/", method="PUT")
    push.push_run(run, "user/m")
    assert titles(hub) == ["Step 7", "initial commit"] and hub.count("^/lfs/", method="PUT") == uploads
    for name in ("transformer/old-shard.safetensors", "notes.md"):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="user/m")
    push.push_run(run, "user/m")
    files = hub.files("models", "user/m")
    assert "notes.md" in files and "transformer/old-shard.safetensors" not in files
    assert hub.count("^/lfs/", method="PUT") == uploads + 1  # the stray file's own


def test_an_evaluation_is_pushed_with_the_weights_that_it_measured_and_no_others(hub, run, capsys):
    flags = ["--num_samples=20", "--num_inference_steps=2", "--reference=digits", "--reference_split=test"]
    flags += [f"--extractor={REPOSITORY / 'pipelines/digits-classifier'}"]
    run_script("evaluate", f"--model={run}/pipeline", f"--output_dir={run}/evaluation", *flags)
    record = json.loads((run / "evaluation/evaluation.json").read_text())
    assert str(REPOSITORY) in json.dumps(record) and str(run) in json.dumps(record)
    images = {**record, "model": None, "metrics": {"fid": 0.125}}
    (run / "evaluation.json").write_text(json.dumps(images))  # newer, and of no model
    push.push_run(run, "user/m")
    files = hub.files("models", "user/m")
    assert json.loads(files["evaluation.json"])["metrics"] == record["metrics"]
    card = ModelCard(files["README.md"].decode())
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == record["metrics"]
    assert f"| fid | {record['metrics']['fid']:.4g} ± {record['errors']['fid']:.2g} |" in card.text
    assert "evaluation.json is not pushed" in capsys.readouterr().out
    names_no_path_of_this_machine(files)
    assert json.loads(files["evaluation.json"])["extractor"]["name"] == "digits-classifier"

    weights = run / "pipeline/transformer/diffusion_pytorch_model.safetensors"
    other = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(other, weights, metadata={"format": "pt"})
    push.push_run(run, "user/m")  # as after training on
    files = hub.files("models", "user/m")
    assert not {"evaluation.json", ".eval_results/erw.yaml"} & set(files)
    assert "no number is claimed" in files["README.md"].decode()
    assert capsys.readouterr().out.count("it measured other weights") == 2


def test_the_same_through_xet(run, tmp_path):
    with LoopbackHub(xet_dir=tmp_path / "xet") as hub:
        hub.fault("/commit/", status=500)
        environment = hub.environment(tmp_path / "home")
        check_ended([run_forked("-m", "erw_hf.hub.push", run, "--hub_model_id=user/m", environment=environment)])
        name = "transformer/diffusion_pytorch_model.safetensors"
        assert hub.files("models", "user/m")[name] == (run / "pipeline" / name).read_bytes()
        assert hub.count("xet-write-token") > 0 and hub.count("/lfs/") == 0


def test_a_run_goes_on_from_the_hub(hub, run, tmp_path, tiny_flags, encoder_path):
    push_config(run, hub_model_id="user/m", hub_strategy="checkpoint")
    push.stage(run, 4, None, run / "checkpoint-4")
    push.push_run(run)
    assert not (run / "hub" / "step-4").exists() and (run / "checkpoint-4" / "progress.json").is_file()
    names_no_path_of_this_machine(hub.files("models", "user/m"))
    elsewhere = Path(snapshot_download("user/m", local_dir=tmp_path / "elsewhere"))
    push_config(elsewhere, encoder=str(encoder_path))  # where the folder lies here
    train(*tiny_flags, f"--output_dir={elsewhere}", "--resume_from_checkpoint=last-checkpoint")

    assert losses(elsewhere) == losses(run) and len(losses(run)) == 7


def test_a_warmup_from_the_hub_serves_other_runs(hub, run, tmp_path, tiny_flags):
    push.push_run(run, "user/m")
    assert push_command(run / "warmup", "--hub_model_id=user/w").returncode == 0
    assert "2 blocks" in hub.files("models", "user/w")["README.md"].decode()
    results = []
    for name, source in (("a", "user/m"), ("b", "user/w")):
        flags = [
            f"--warmup_from={source}",
            "--warmup_steps=0",
            "--max_train_steps=2",
            f"--output_dir={tmp_path}/{name}",
        ]
        train(*tiny_flags, *flags)
        results.append([record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert results[0] == results[1]
    push.push_run(tmp_path / "a", "user/a")
    assert "which is **not** in the table: 3 steps, 12 images" in hub.files("models", "user/a")["README.md"].decode()


def test_a_latent_cache_is_pushed_and_streamed_back(hub, tmp_path, vae_path, tiny_flags, monkeypatch):
    spec = importlib.util.spec_from_file_location("cache_latents", REPOSITORY / "training" / "cache_latents.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = ["--dataset_name=digits", "--dataset_split=test", f"--vae={vae_path}", "--sample_size=8"]
    flags += [
        "--rows_per_file=200",
        f"--output_dir={tmp_path}/cache",
        "--push_to_hub",
        "--hub_dataset_id=user/latents",
    ]
    monkeypatch.setattr(sys, "argv", ["cache_latents.py", *flags])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    hub.fault("/commit/", status=503)
    hub.fault("/commit/", status=403, after=1)
    with pytest.raises(HfHubHTTPError):
        script.main()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert set(hub.files("datasets", "user/latents")) == {"cache.json"}
    push.push_cache(tmp_path / "cache", "user/latents")  # half a cache is known as one
    files = hub.files("datasets", "user/latents")
    parquet = {f"data/train-{i:05d}-of-00002.parquet" for i in range(2)}
    assert set(files) == {"README.md", "cache.json", "latent_statistics.json", *parquet}
    assert "num_examples: 359" in files["README.md"].decode()
    assert titles(hub, "user/latents", "datasets")[1] == "Settings of the latent cache"
    names_no_path_of_this_machine(files)
    assert json.loads(files["cache.json"])["vae"] == vae_path.name
    assert json.loads((tmp_path / "cache/cache.json").read_text())["vae"] == str(vae_path)  # to go on with it

    hub.fault(r"resolve/.*parquet", method="GET", status=503, times=2)
    flags = [*tiny_flags, "--dataset_name=user/latents", "--streaming", f"--vae={vae_path}", "--in_channels=4"]
    launch_training(*flags, f"--output_dir={tmp_path}/run")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 7
    assert hub.count(r"datasets/user/latents/resolve/.*parquet", method="GET") > 2

    with pytest.raises(ValueError, match="made with the vae"):  # as its record on the Hub says
        check_cache(False, [], vars(TrainingConfig(dataset_name="user/latents", vae="user/other", sample_size=8)))
    next((tmp_path / "cache" / "data").glob("*.parquet")).unlink()
    with pytest.raises(ValueError, match="lacks files"):
        check_cache(
            False, [], vars(TrainingConfig(dataset_name=f"{tmp_path}/cache", vae=str(vae_path), sample_size=8))
        )
    with pytest.raises(ValueError, match="lacks files"):
        push.push_cache(tmp_path / "cache", "user/latents")


def test_a_run_that_has_only_warmed_up_is_pushed_as_that(hub, run, tmp_path):
    shutil.rmtree(run / "pipeline")
    push.push_run(run, "user/m")
    files = hub.files("models", "user/m")
    assert "warmup/projectors.safetensors" in files and "model_index.json" not in files
    assert len(files["metrics.jsonl"].splitlines()) == 3 and "cannot draw yet" in files["README.md"].decode()
    shutil.rmtree(run / "warmup")
    with pytest.raises(ValueError, match="neither a pipeline nor a warmup"):
        push.push_run(run, "user/m")


def test_the_demo_is_published_for_a_model(hub, run):
    demo = REPOSITORY / "spaces" / "erw"
    with pytest.raises(ValueError, match="not a pipeline on the Hub"):
        publish_space("user/m", "user/s")
    push.push_run(run, "user/m")
    assert publish_space("user/m", "s") == "user/s"
    files = hub.files("spaces", "user/s")
    tracked = ["git", "ls-files", "spaces/erw"]
    names = subprocess.run(tracked, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    assert (
        set(files) == {name.removeprefix("spaces/erw/") for name in names}
        and files["app.py"] == (demo / "app.py").read_bytes()
    )
    assert ModelCard(files["README.md"].decode()).data.models == ["user/m"]
    assert hub.repos["spaces", "user/s"].variables == {"ERW_MODEL": "user/m"}


def test_a_branch_off_another_run_is_pushed_with_the_steps_of_both(hub, run, tmp_path, tiny_flags):
    branch = tmp_path / "branch"
    train(*tiny_flags, f"--output_dir={branch}", f"--resume_from_checkpoint={run}/checkpoint-4")
    assert [record["step"] for record in read_metrics(branch / "metrics.jsonl")] == [5, 6, 7]
    push.push_run(branch, "user/branch")
    files = hub.files("models", "user/branch")
    assert "model_index.json" in files and len(files["metrics.jsonl"].splitlines()) == 3
    card = files["README.md"].decode()
    push.push_run(run, "user/m")
    whole = hub.files("models", "user/m")["README.md"].decode()
    for row in ("steps", "images seen", "FLOPs", "full-step equivalents"):
        (line,) = re.findall(rf"^\| {row} \|.*$", whole, flags=re.M)
        assert line in card
    assert "3 warmup + 4 full" in card


@pytest.fixture
def ports(hub, finished, tmp_path):
    """A repo of a stranger with models in folders and files."""
    shutil.copytree(finished / "pipeline", tmp_path / "repo/mine")
    torch.save({"no": "model"}, tmp_path / "repo/SiT.pt")
    hub.add_repo("models", "owner/ports", tmp_path / "repo")


def test_a_model_on_the_hub_is_fine_tuned_and_the_adapter_is_pushed(hub, ports, finished, tmp_path, tiny_flags):
    """docs/tutorials/fine-tune.md, with tiny stand-ins."""
    pytest.importorskip("peft")
    for label in ("my cat", "my dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (12, 10), 40 * index + len(label)).save(tmp_path / "photos" / label / f"{index}.png")
    changes = ["--warmup_steps=0", "--alignment_weight=0", "--lora_rank=2", "--max_train_steps=2", "--random_crop"]
    data = [f"--dataset_name={tmp_path}/photos", "--init_from=owner/ports/mine", f"--output_dir={tmp_path}/run"]
    train(*tiny_flags, *changes, *data)
    assert "base_model: owner/ports\n" in (tmp_path / "run/lora/README.md").read_text()
    push.push_run(tmp_path / "run", "user/photos.v1")
    files = hub.files("models", "user/photos.v1")
    assert {"pytorch_lora_weights.safetensors", "class_embeddings.safetensors", "grid.png", "README.md"} <= set(files)
    assert not {"model_index.json", "transformer/config.json"} & set(files)
    assert yaml.safe_load(files["config.yaml"])["init_from"] == "owner/ports/mine"
    assert str(tmp_path) not in files["config.yaml"].decode() + files["README.md"].decode()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "owner/ports" and card.data.base_model_relation == "adapter"
    assert {"lora", "adapter", "class-conditional"} <= set(card.data.tags)
    assert "Classes that it adds: my cat, my dog." in card.text and 'adapter_name="photos_v1"' in card.text
    assert "2 steps of velocity matching" in card.text
    pipe = ERWPipeline.from_pretrained(finished / "pipeline")
    # Without the name diffusers would ask the Hub that this process was started with.
    pipe.load_lora_weights("user/photos.v1", weight_name="pytorch_lora_weights.safetensors")
    assert pipe(class_labels=["my dog"], num_inference_steps=1).images[0].size == (8, 8)
    (tmp_path / "run/lora/class_embeddings.safetensors").unlink()  # a later adapter may have no classes of its own
    push.push_run(tmp_path / "run", "user/photos.v1")
    assert "class_embeddings.safetensors" not in hub.files("models", "user/photos.v1")


def test_of_a_transformer_alone_what_was_pushed_last_is_what_loads(hub, tmp_path):
    first, second, third = (randomize(ERWTransformer2DModel(**TINY_MODEL), seed=seed) for seed in range(3))

    def loaded():
        return ERWTransformer2DModel.from_pretrained("user/parts").pos_embed.proj.weight

    first.save_pretrained(tmp_path / "first", max_shard_size="10KB", push_to_hub=True, repo_id="user/parts")
    assert torch.equal(loaded(), first.pos_embed.proj.weight)
    second.push_to_hub("user/parts", safe_serialization=False)
    assert torch.equal(loaded(), second.pos_embed.proj.weight)
    second.save_pretrained(tmp_path / "second", max_shard_size="10KB", push_to_hub=True, repo_id="user/parts")
    first.save_pretrained(tmp_path / "first", variant="fp16")  # a folder of both
    third.save_pretrained(tmp_path / "first", push_to_hub=True, repo_id="user/parts")
    assert torch.equal(loaded(), third.pos_embed.proj.weight)
    second.push_to_hub("user/parts", variant="fp16")
    assert torch.equal(loaded(), third.pos_embed.proj.weight)
    fp16 = ERWTransformer2DModel.from_pretrained("user/parts", variant="fp16")
    assert torch.equal(fp16.pos_embed.proj.weight, second.pos_embed.proj.weight)


def test_a_run_starts_from_a_folder_or_a_file_in_a_hub_repo(ports, finished):
    config = ERWPipeline.from_pretrained(finished / "pipeline").transformer.config
    config = {name: config[name] for name in ("num_classes", "sample_size", "num_layers")}
    state = load_initial("owner/ports/mine", config, None)
    weights = load_file(finished / "pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    with pytest.raises(ValueError, match="does not hold a SiT"):
        load_initial("owner/ports/SiT.pt", config, None)
    assert resolve_name("owner/ports/SiT.pt", "init_from") == "owner/ports/SiT.pt"


@pytest.mark.parametrize(
    ("first", "second"), [({}, {"safe_serialization": False}), ({"variant": "fp16"}, {"variant": "fp16"}), ({}, {})]
)
def test_a_pipeline_that_is_pushed_again_is_what_loads(hub, tmp_path, first, second):
    def made(seed):
        torch.manual_seed(seed)
        transformer = randomize(ERWTransformer2DModel(**TINY_MODEL))
        return ERWPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler(), id2label={0: str(seed)})

    made(3).push_to_hub("user/m", variant="other")
    made(1).push_to_hub("user/m", **first)
    upload_folder = huggingface_hub.upload_folder
    sharded = tmp_path / "sharded"
    made(1).save_pretrained(sharded, max_shard_size="20KB", variant=first.get("variant"))
    upload_folder(repo_id="user/m", folder_path=sharded)
    new = made(2)
    new.push_to_hub("user/m", **second)
    loaded = ERWPipeline.from_pretrained("user/m", variant=second.get("variant"))
    state = new.transformer.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.transformer.state_dict().items())
    kept = [name for name in huggingface_hub.list_repo_files("user/m") if ".other." in name]
    assert bool(kept) == ("variant" in second)


def test_a_push_waits_until_the_hubs_limit_is_over(monkeypatch):
    """The Hub says so in `RateLimit`, and its window is longer than all pauses between attempts."""
    slept, answers = [], [429, 429, 200]

    def request():
        status = answers.pop(0)
        if status == 200:
            return "done"
        headers = {"RateLimit": '"api";r=0;t=250', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
        raise HfHubHTTPError(
            "limited", response=httpx.Response(status, headers=headers, request=httpx.Request("POST", "http://hub"))
        )

    monkeypatch.setattr("erw_hf.hub.upload.time.sleep", slept.append)
    assert upload.retry(request) == "done" and slept == [251, 251]


@pytest.mark.parametrize(
    ("repo_type", "files", "ours"),
    [
        ("space", ["app.py", "requirements.txt", "secret_model.bin"], False),
        ("space", ["app.py", "page.html", "style.css"], True),
        ("dataset", ["cache.json", "train.csv"], False),
        ("dataset", ["cache.json", "latent_statistics.json", "data/train-00000-of-00001.parquet"], True),
    ],
)
def test_other_peoples_spaces_and_datasets_are_not_replaced(repo_type, files, ours):
    api = SimpleNamespace(list_repo_files=lambda *_, **__: ["README.md", *files])
    if ours:
        upload._check_content(api, "user/name", repo_type)
    else:
        with pytest.raises(ValueError, match="holds something else"):
            upload._check_content(api, "user/name", repo_type)
