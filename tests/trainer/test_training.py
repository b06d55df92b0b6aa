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
"""The training script from the command line to the files it leaves."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    TRAINING,
    kill_training_at,
    launch_training,
    run_forked,
    signal_launcher_at,
    terminate_training_at,
    train,
)
from PIL import Image
from safetensors.torch import load_file

from erw_hf import ERWPipeline
from erw_hf.trainer.run_record import read_metrics


def losses(run):
    return [(record["step"], record["phase"], record["loss"]) for record in read_metrics(run / "metrics.jsonl")]


def weights(run):
    return load_file(run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_flags):
    run = tmp_path_factory.mktemp("runs") / "erw"
    launch_training(*tiny_flags, "--checkpoints_total_limit=2", "--validation_steps=5", f"--output_dir={run}")
    return run


def test_one_run_leaves_everything_that_is_promised(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "grid.png", "loss_curve.png", "pipeline", "warmup", "samples"} <= names
    assert Image.open(finished_run / "grid.png").size[0] > 40
    assert (finished_run / "samples" / "step-0000005.png").is_file()
    pipe = ERWPipeline.from_pretrained(finished_run / "pipeline")
    assert pipe.get_label_ids("7") == [7]
    assert pipe(class_labels=["7"], num_inference_steps=2).images[0].size == (8, 8)
    assert yaml.safe_load((finished_run / "config.yaml").read_text())["warmup_steps"] == 3


def test_metrics_count_both_phases(finished_run):
    records = read_metrics(finished_run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 8))
    assert [record["phase"] for record in records] == ["warmup"] * 3 + ["full"] * 4
    assert [record["images_seen"] for record in records] == [4 * step for step in range(1, 8)]
    warmup, full = records[0]["flops"], records[4]["flops"] - records[3]["flops"]
    assert records[2]["flops"] == pytest.approx(3 * warmup) and full > warmup > 0
    schedule = yaml.safe_load((finished_run / "config.yaml").read_text())
    for step, record in enumerate(records[3:]):  # the schedule of lambda starts with full training
        expected = schedule["alignment_weight"] * 2 ** (-step / schedule["alignment_half_life"])
        assert record["lambda"] == pytest.approx(expected)
        assert record["loss"] == pytest.approx(record["velocity"] + expected * record["alignment"], rel=1e-5)
    for record in records:
        assert {"images_per_second", "data_wait", "grad_norm", "learning_rate"} <= set(record)


def test_phase_2_starts_from_what_phase_1_learnt_in_the_same_run(finished_run, tmp_path, tiny_flags):
    """The published code starts full training from random weights in an uninterrupted run: this test fails on it."""
    warmup = load_file(finished_run / "warmup" / "transformer" / "diffusion_pytorch_model.safetensors")
    # The same run with a learning rate that moves nothing in full training, and an EMA that follows at once: its pipeline is
    # the hand-over itself.
    train(
        *tiny_flags,
        "--learning_rate=1e-300",
        "--warmup_learning_rate=1e-3",
        "--ema_decay=0",
        f"--output_dir={tmp_path}/run",
    )
    frozen, own_warmup = (
        weights(tmp_path / "run"),
        load_file(tmp_path / "run" / "warmup" / "transformer" / "diffusion_pytorch_model.safetensors"),
    )
    handed_over = [name for name in own_warmup if not name.startswith(("norm_out", "proj_out"))]
    assert any(name.startswith("transformer_blocks.1.") for name in handed_over)
    for name in handed_over:
        assert torch.equal(frozen[name], own_warmup[name]), name
    # The warmup did learn: its weights are not those that a run without warmup starts from.
    train(*tiny_flags, "--warmup_steps=0", "--max_train_steps=1", "--learning_rate=1e-300", "--ema_decay=0",
        f"--output_dir={tmp_path}/cold")  # fmt: skip
    cold = weights(tmp_path / "cold")
    assert not torch.equal(
        cold["transformer_blocks.0.attn.to_q.weight"], frozen["transformer_blocks.0.attn.to_q.weight"]
    )
    # The later blocks start the same with and without warmup.
    assert torch.equal(cold["transformer_blocks.2.attn.to_q.weight"], frozen["transformer_blocks.2.attn.to_q.weight"])
    assert set(warmup) == set(own_warmup)


def test_checkpoints_are_rotated_and_no_half_written_one_is_left(finished_run):
    names = sorted(name for name in os.listdir(finished_run) if "checkpoint" in name)
    assert names == ["checkpoint-6", "checkpoint-7"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_flags):
    run = tmp_path_factory.mktemp("runs") / "whole"
    flags = [*tiny_flags, "--checkpoints_total_limit=9", "--checkpointing_steps=1"]
    train(*flags, f"--output_dir={run}")
    return run, flags


@pytest.mark.parametrize("kept", [2, 3, 4, 6])  # in the warmup, at the hand-over, in full training
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, uninterrupted, kept):
    whole, flags = uninterrupted
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for step in range(kept + 1, 8):  # as a kill leaves it: later lines written, the last one torn, a half checkpoint
        shutil.rmtree(cut / f"checkpoint-{step}")
    shutil.rmtree(cut / "pipeline")
    shutil.copytree(cut / "checkpoint-1", cut / ".writing-checkpoint-7")
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "pha')
    before = (whole / "metrics.jsonl").read_bytes().splitlines()[:kept]
    train(*flags, f"--output_dir={cut}", "--resume_from_checkpoint=latest")
    assert losses(cut) == losses(whole)
    assert (cut / "metrics.jsonl").read_bytes().splitlines()[:kept] == before
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(cut)[name], tensor), name


def test_a_resumed_run_with_hidden_tokens_is_bitwise_too(tmp_path, tiny_flags):
    """With PixelREPA's adapter, and JiT's patch embedding and prediction."""
    flags = [*tiny_flags, "--alignment_mask_ratio=0.25", "--projector=transformer", "--prediction_type=sample",
             "--patch_bottleneck_dim=3", "--checkpointing_steps=2", "--checkpoints_total_limit=9"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*flags, f"--output_dir={whole}")
    shutil.copytree(whole, cut)
    for step in (6, 7):
        shutil.rmtree(cut / f"checkpoint-{step}")
    train(*flags, f"--output_dir={cut}", "--resume_from_checkpoint=latest")
    assert losses(cut) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(cut)[name], tensor), name


@pytest.mark.parametrize("file", ["training_state.pt", "optimizer.bin", "random_states_0.pkl"])
def test_no_file_of_a_checkpoint_can_execute_code(tmp_path, uninterrupted, file):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    whole, flags = uninterrupted
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-7")
    assert (cut / "checkpoint-6" / file).is_file()
    torch.save(Trap(), cut / "checkpoint-6" / file)
    with contextlib.suppress(pickle.UnpicklingError):  # accelerate goes on without random states, and says so
        train(*flags, f"--output_dir={cut}", "--resume_from_checkpoint=latest")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("processes", "kill_after"), [(1, 14), (2, 5)])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_one(tmp_path, tiny_flags, processes, kill_after):
    """kill -9 to processes and loader workers, of one process in full training, of two in the warmup."""
    flags = [*tiny_flags, "--dataloader_num_workers=2", "--warmup_steps=8", "--max_train_steps=20"]
    flags += ["--checkpoints_total_limit=2", "--checkpointing_steps=3", "--train_batch_size=2"]
    launch_training(*flags, f"--output_dir={tmp_path}/whole", processes=processes)
    resume = [*flags, f"--output_dir={tmp_path}/cut", "--resume_from_checkpoint=latest"]
    kill_training_at(kill_after, *resume, processes=processes)
    assert not (tmp_path / "cut" / "pipeline").exists()  # it had not come to its end
    launch_training(*resume, processes=processes)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], tensor), name


def test_a_full_disk_leaves_the_last_checkpoint_usable(tmp_path, tiny_flags, uninterrupted):
    whole, flags = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in range(5, 8):
        shutil.rmtree(run / f"checkpoint-{step}")
    shutil.rmtree(run / "pipeline")
    resume = [*flags, f"--output_dir={run}", "--resume_from_checkpoint=latest"]
    # No file may grow beyond 16 kB: metrics.jsonl stays below, a checkpoint's files do not.
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))"
    limited += f"; runpy.run_path('{TRAINING[0]}', run_name='__main__')"
    result = run_forked("-c", limited, *TRAINING[1:], *resume, environment={"ACCELERATE_USE_CPU": "true"})
    assert result.returncode != 0
    assert "checkpoint-5 could not be written" in result.stderr and "Make room" in result.stderr
    assert sorted(path.name for path in run.glob("*checkpoint*")) == [f"checkpoint-{step}" for step in range(1, 5)]
    train(*resume)
    assert losses(run) == losses(whole)
    assert all(torch.equal(weights(run)[name], tensor) for name, tensor in weights(whole).items())


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_a_checkpoint_and_exits_with_status_0(tmp_path, tiny_flags, processes):
    flags = [*tiny_flags, "--max_train_steps=100000", "--checkpointing_steps=100000", f"--output_dir={tmp_path}/run"]
    statuses = terminate_training_at(5, *flags, processes=processes)
    assert statuses == [0] * processes
    (checkpoint,) = [
        name for name in os.listdir(tmp_path / "run") if name.startswith("checkpoint-") and name != "checkpoint-3"
    ]
    step = int(checkpoint.split("-")[1])
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, step + 1))
    # By one process with the same batch in all, whatever their number was; the kill test goes on with two
    resumed = [f"--max_train_steps={step + 2}", "--resume_from_checkpoint=latest"]
    train(*flags, *resumed, f"--train_batch_size={4 * processes}")
    assert len(losses(tmp_path / "run")) == step + 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_loaders_workers_too_saves_a_checkpoint(tmp_path, tiny_flags, signum, streaming):
    """Ctrl-C and a closed terminal reach all processes of the group, SIGTERM of Slurm all of a step."""
    flags = [*tiny_flags, "--max_train_steps=100000", "--checkpointing_steps=100000", "--dataloader_num_workers=2"]
    flags += [f"--streaming={str(streaming).lower()}", f"--output_dir={tmp_path}/run"]
    assert terminate_training_at(5, *flags, signum=signum, workers=True) == [0]
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "run" / f"checkpoint-{last}" / "progress.json").is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_launcher_leaves_a_checkpoint_and_no_orphan(tmp_path, tiny_flags, processes):
    """Also that processes of interpreters of their own, whose sets have another order, agree on the samples."""
    flags = [*tiny_flags, "--lr_scheduler=constant", "--checkpointing_steps=100000"]
    own = ["--max_train_steps=100000", f"--output_dir={tmp_path}/run"]
    status = signal_launcher_at(5, signal.SIGTERM, *flags, *own, processes=processes)
    assert status == (-signal.SIGTERM if processes == 1 else 1)  # the launchers' own, as the guide says
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert last > 3 and (tmp_path / "run" / f"checkpoint-{last}").is_dir()
    train(*flags, "--max_train_steps=5", f"--train_batch_size={4 * processes}", f"--output_dir={tmp_path}/one")
    found, expected = ([entry[2] for entry in losses(tmp_path / name)[:5]] for name in ("run", "one"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_two_processes_see_the_samples_of_one(tmp_path, tiny_flags):
    flags = [*tiny_flags, "--max_train_steps=20", "--class_token_weight=0.03"]
    train(*flags, f"--output_dir={tmp_path}/one")
    launch_training(*flags, "--train_batch_size=2", f"--output_dir={tmp_path}/two", processes=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two]
    assert two[0][2] == pytest.approx(one[0][2], rel=1e-6)
    np.testing.assert_allclose([entry[2] for entry in two], [entry[2] for entry in one], rtol=1e-4)


def test_accumulation_equals_the_large_batch(tmp_path, tiny_flags, finished_run):
    flags = [*tiny_flags, "--train_batch_size=2", "--gradient_accumulation_steps=2"]
    train(*flags, f"--output_dir={tmp_path}/run")
    np.testing.assert_allclose(
        [entry[2] for entry in losses(tmp_path / "run")], [entry[2] for entry in losses(finished_run)], rtol=1e-5
    )


def test_a_run_resumes_with_another_accumulation_after_any_step(tmp_path, tiny_flags):
    """accelerate counts micro-batches, of which another number makes up a step now."""
    flags = [*tiny_flags, "--max_train_steps=9", "--checkpointing_steps=5"]
    train(*flags, f"--output_dir={tmp_path}/whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoint-9")
    split = ["--train_batch_size=2", "--gradient_accumulation_steps=2", "--resume_from_checkpoint=latest"]
    train(*flags, *split, f"--output_dir={tmp_path}/cut")
    for name in ("loss", "grad_norm"):
        found, expected = (
            [record[name] for record in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("cut", "whole")
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_resuming_says_that_it_deletes_nothing(tmp_path, tiny_flags, caplog):
    flags = [*tiny_flags, "--warmup_steps=0", f"--output_dir={tmp_path}/run"]
    train(*flags, "--max_train_steps=2")
    train(*flags, "--max_train_steps=3", "--resume_from_checkpoint=latest", "--overwrite_output_dir")
    assert "so overwrite_output_dir deletes nothing: omit one of the two" in caplog.text
    assert len(losses(tmp_path / "run")) == 3


def test_one_warmup_serves_another_run(tmp_path, tiny_flags, finished_run):
    flags = [*tiny_flags, "--warmup_steps=0", f"--warmup_from={finished_run}/warmup", "--max_train_steps=1"]
    train(*flags, "--learning_rate=1e-300", "--ema_decay=0", f"--output_dir={tmp_path}/run")
    warmup = load_file(finished_run / "warmup" / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.1.ff.net.2.weight"
    assert torch.equal(weights(tmp_path / "run")[name], warmup[name])


def test_a_warmup_with_another_encoder_or_other_data_is_warned_of(tmp_path, tiny_flags, finished_run, caplog):
    shutil.copytree(finished_run / "warmup", tmp_path / "warmup")
    record = json.loads((tmp_path / "warmup/warmup.json").read_text())
    flags = [*tiny_flags, "--warmup_steps=0", f"--warmup_from={tmp_path}/warmup", "--max_train_steps=1"]
    train(*flags, f"--output_dir={tmp_path}/same")
    assert "was made with" not in caplog.text
    changed = record | {"encoder": "facebook/dinov2-base", "dataset": "user/photos"}
    (tmp_path / "warmup/warmup.json").write_text(json.dumps(changed))
    train(*flags, f"--output_dir={tmp_path}/run")
    assert "was made with the encoder facebook/dinov2-base, this run has" in caplog.text
    assert "was made with the dataset user/photos, this run has digits" in caplog.text
    caplog.clear()
    train(*flags, "--hand_over_projector=false", f"--output_dir={tmp_path}/fresh")
    assert "the encoder" not in caplog.text and "the dataset user/photos" in caplog.text


@pytest.mark.parametrize(("key", "part"), [("warmup_from", "warmup"), ("init_from", "pipeline")])
def test_a_run_resumes_without_what_it_started_from(tmp_path, tiny_flags, finished_run, key, part):
    shutil.copytree(finished_run / part, tmp_path / part)
    flags = [*tiny_flags, "--warmup_steps=0", f"--{key}={tmp_path / part}", f"--output_dir={tmp_path}/run"]
    train(*flags, "--max_train_steps=1", "--resume_from_checkpoint=latest")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("warmup_from.json")}
    shutil.rmtree(tmp_path / part)
    train(*flags, "--max_train_steps=2", "--resume_from_checkpoint=latest")
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2]
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "run").glob("warmup_from.json")}
    with pytest.raises((ValueError, FileNotFoundError), match=part):  # a new run needs it
        train(*flags[:-1], f"--output_dir={tmp_path}/other", "--resume_from_checkpoint=latest")


def test_a_plain_sit_needs_no_encoder(tmp_path, tiny_flags):
    flags = [*tiny_flags, "--warmup_steps=0", "--encoder=none", "--max_train_steps=2"]
    train(*flags, f"--output_dir={tmp_path}/run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all("alignment" not in record and record["lambda"] == 0 for record in records)


def test_a_warmup_that_does_not_fit_is_refused_before_the_earlier_run_is_deleted(tmp_path, tiny_flags, finished_run):
    before = losses(finished_run)
    flags = [*tiny_flags, "--warmup_steps=0", f"--warmup_from={finished_run}/warmup", "--attention_head_dim=16"]
    with pytest.raises(ValueError, match="attention_head_dim=8, the config has 16"):
        train(*flags, "--overwrite_output_dir", f"--output_dir={finished_run}")
    assert losses(finished_run) == before


def test_going_on_from_an_earlier_checkpoint_leaves_no_later_ones(tmp_path, uninterrupted):
    whole, flags = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    train(*flags, "--max_train_steps=5", f"--output_dir={run}", "--resume_from_checkpoint=checkpoint-4")
    assert sorted(name for name in os.listdir(run) if name.startswith("checkpoint")) == [
        f"checkpoint-{step}" for step in range(1, 6)
    ]
    assert losses(run) == losses(whole)[:5]
    with pytest.raises(ValueError, match="num_layers is 4, the run so far had 3"):
        train(*flags, "--num_layers=4", f"--output_dir={run}", "--resume_from_checkpoint=latest")
    train(*flags, "--learning_rate=0.5", f"--output_dir={run}", "--resume_from_checkpoint=latest")
    assert read_metrics(run / "metrics.jsonl")[5]["learning_rate"] > 0.01  # the new rate holds


def test_a_broken_image_is_skipped_and_named(tmp_path, tiny_flags, caplog):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 40 * i).save(tmp_path / "images" / name / f"{i}.png")
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"no image")
    train(*tiny_flags, f"--dataset_name={tmp_path}/images", f"--output_dir={tmp_path}/run")
    assert len(losses(tmp_path / "run")) == 7
    assert "1.png holds no readable image" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_without_an_image_is_skipped_too(tmp_path, tiny_flags, caplog, streaming):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    images = [Image.new("L", (8, 8), 40 * i) for i in range(5)] + [None]
    table = {"image": images, "label": [0, 1, 0, 1, 0, 1]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(table, features=Features({"image": ImageFeature(), "label": Value("int64")})).to_parquet(
        tmp_path / "data" / "train.parquet"
    )
    flags = [f"--dataset_name={tmp_path}/data", "--num_classes=2", f"--streaming={streaming}"]
    train(*tiny_flags, *flags, f"--output_dir={tmp_path}/run")
    assert len(losses(tmp_path / "run")) == 7
    assert "no readable image (the row holds none)" in caplog.text


def test_latents_of_a_vae_and_data_without_labels(tmp_path, tiny_flags):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    images = [Image.new("RGB", (20, 16), (i * 20, 0, 0)) for i in range(6)]
    data = Dataset.from_dict({"img": images}, features=Features({"img": ImageFeature()}))
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    flags = [*tiny_flags, f"--vae={tmp_path}/vae", f"--dataset_name={tmp_path}/data", "--in_channels=4"]
    train(*flags, f"--output_dir={tmp_path}/run")
    pipe = ERWPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert isinstance(pipe.vae, AutoencoderKL) and pipe.transformer.config.num_classes == 0
    assert pipe(num_inference_steps=2).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="makes latents with 4 channels: set in_channels to that, not to 3"):
        train(*flags, "--in_channels=3", f"--output_dir={tmp_path}/other")


@pytest.mark.parametrize(
    "flags",
    [
        ["--alignment_loss=nt_xent", "--alignment_temperature=0.2"],
        ["--alignment_loss=structural", "--projector=conv", "--spatial_norm"],
        ["--warmup_noised", "--path_type=cosine", "--timestep_distribution=logit_normal"],
        ["--alignment_schedule=stop", "--alignment_stop_step=2", "--no_hand_over_projector", "--random_flip"],
        ["--use_rope", "--qk_norm=rms_norm", "--norm_type=rms_norm", "--activation_fn=swiglu"],
        ["--gradient_checkpointing", "--mixed_precision=bf16", "--lr_scheduler=linear"],
        ["--contrastive_weight=0.05", "--ema_sigma_rel=0.1"],
        ["--class_token_weight=0.03", "--projector=conv", "--warmup_noised", "--optimizer=muon"],
        ["--optimizer=muon", "--lr_scheduler=cosine", "--adam_weight_decay=0.01"],
    ],
)
def test_every_switch_runs_both_phases(tmp_path, tiny_flags, flags):
    train(*tiny_flags, *flags, f"--output_dir={tmp_path}/run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 7 and all(record["loss"] is not None for record in records)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_batch_size=8"], "had 4 images, now it would have 8"),
        (["--projector_depth=3"], "projector_depth is 3, the run so far had 2"),
        (["--ema_sigma_rel=0.1"], "ema_sigma_rel is 0.1, the run so far had None"),
    ],
)
def test_what_would_not_go_on_exactly_is_refused_and_nothing_is_touched(tmp_path, uninterrupted, flags, message):
    whole, own = uninterrupted
    shutil.copytree(whole, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match=message):
        train(*own, *flags, f"--output_dir={tmp_path}/run", "--resume_from_checkpoint=checkpoint-2")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_a_checkpoint_of_another_run_does_not_replace_this_one(tmp_path, uninterrupted):
    whole, flags = uninterrupted
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run other than"):
        train(*flags, f"--output_dir={tmp_path}/run", f"--resume_from_checkpoint={whole}/checkpoint-2")
    assert losses(tmp_path / "run") == losses(whole)
    branch = [*flags, f"--output_dir={tmp_path}/branch", f"--resume_from_checkpoint={whole}/checkpoint-2"]
    train(*branch)  # into a folder of its own
    assert losses(tmp_path / "branch") == losses(whole)[2:]


def test_muon_resumes_bitwise(tmp_path, tiny_flags):
    flags = [*tiny_flags, "--optimizer=muon", "--checkpointing_steps=1", "--checkpoints_total_limit=9"]
    train(*flags, f"--output_dir={tmp_path}/whole")
    train(*tiny_flags, f"--output_dir={tmp_path}/adamw")
    assert losses(tmp_path / "whole")[0] == losses(tmp_path / "adamw")[0]
    assert losses(tmp_path / "whole")[-1] != losses(tmp_path / "adamw")[-1]
    for kept in (2, 5):
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(tmp_path / "whole", cut)
        for step in range(kept + 1, 8):
            shutil.rmtree(cut / f"checkpoint-{step}")
        train(*flags, f"--output_dir={cut}", "--resume_from_checkpoint=latest")
        assert losses(cut) == losses(tmp_path / "whole")


def test_several_encoders_at_once(tmp_path, tiny_flags, encoder_path):
    flags = [*tiny_flags, f"--encoder={encoder_path},{encoder_path}"]
    train(*flags, f"--output_dir={tmp_path}/run")
    projectors = load_file(tmp_path / "run" / "warmup" / "projectors.safetensors")
    assert {name.split(".")[1] for name in projectors} == {"0", "1"}
    train(*flags, "--warmup_steps=0", "--max_train_steps=2", f"--warmup_from={tmp_path}/run/warmup",
        f"--output_dir={tmp_path}/other")  # fmt: skip
    with pytest.raises(ValueError, match="no tensor projectors.1"):  # a warmup of two does not fit a run of one
        train(
            *tiny_flags, "--warmup_steps=0", f"--warmup_from={tmp_path}/run/warmup", f"--output_dir={tmp_path}/third"
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmup_stepss=3"], "did you mean --warmup_steps?"),
        (["--image_column=picture"], "'picture' is not a column of the dataset"),
        (["--num_classes=5"], "is not in [0, 4]"),
        (["--encoder_image_size=24"], "6x6 encoder tokens, the latent has 4x4"),
        (["--warmup_depth=4"], "warmup_depth=4 must lie in [1, num_layers=3]"),
        (["--max_train_steps=2"], "warmup_steps=3 must lie in [0, max_train_steps=2]"),
        (["--in_channels=4"], "in_channels is 1 (grey) or 3 (RGB)"),
        (["--resume_from_checkpoint=checkpoint-99"], "'checkpoint-99' is not a checkpoint"),
        (["--warmup_steps=0", "--warmup_from=training"], "is not a saved warmup"),
        (["--config=no/such.yaml"], "cannot read the config"),
        (["--warmup_steps=0", "--warmup_from=pipelines/erw-digits"], "is not a saved warmup"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(tmp_path, tiny_flags, capsys, flags, message):
    with pytest.raises((ValueError, SystemExit)) as error:
        train(*tiny_flags, *flags, f"--output_dir={tmp_path}/run")
    assert message in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_key_of_a_config_file(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("learning_rte: 1e-4\n")
    with pytest.raises(SystemExit):
        train(f"--config={tmp_path}/bad.yaml")
    assert "unknown key learning_rte; did you mean learning_rate?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("alignment_loss: structual", "alignment_loss must be one of"),
        ("warmup_steps: 1.5", "warmup_steps must be a whole number"),
        ("streaming: 2", "streaming must be true or false"),
    ],
)
def test_impossible_values_of_a_config_file(tmp_path, capsys, line, message):
    (tmp_path / "bad.yaml").write_text(line + "\n")
    with pytest.raises(SystemExit):
        train(f"--config={tmp_path}/bad.yaml")
    assert message in capsys.readouterr().err


def test_a_saved_config_means_the_same_from_anywhere(tmp_path, monkeypatch):
    from erw_hf.trainer.config import parse_config

    monkeypatch.chdir(tmp_path)
    config = parse_config(["--in_channels=1", "--output_dir=./out", "--dataset_name=../images"])
    (tmp_path / "out").mkdir()
    config.save("out/config.yaml")
    again = parse_config(["--config=out/config.yaml"])
    assert again.output_dir == str(tmp_path / "out")
    assert again.dataset_name == str(tmp_path.parent / "images")
    again.check_resumable("out/config.yaml")
    config.check_resumable("out/config.yaml")


def test_output_folder_that_cannot_be_written(tmp_path, tiny_flags):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to output_dir"):
        train(*tiny_flags, f"--output_dir={tmp_path}/file/run")


def test_an_earlier_run_is_not_overwritten_silently(finished_run, tiny_flags):
    before = losses(finished_run)
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest"):
        train(*tiny_flags, f"--output_dir={finished_run}")
    assert losses(finished_run) == before


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint=latest"]])
def test_a_second_start_on_a_live_run_ends_before_it_touches_anything(tmp_path, tiny_flags, finished_run, flags):
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    owner = "import sys, time, pathlib; from erw_hf.trainer.run_lock import RunLock"
    owner += "; RunLock(pathlib.Path(sys.argv[1])).acquire(); print('owned', flush=True); time.sleep(3600)"
    process = subprocess.Popen([sys.executable, "-c", owner, run], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"owned\n"
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
        with pytest.raises(ValueError, match=f"process {process.pid} on .* writes to it"):
            train(*tiny_flags, *flags, f"--output_dir={run}")
        assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
        train(*tiny_flags, *flags, f"--output_dir={run}", "--dry_run")  # asks nobody
    finally:
        process.kill()
        process.wait()
    assert (run / ".lock").exists()
    train(*tiny_flags, f"--output_dir={run}", "--resume_from_checkpoint=latest")
    assert not (run / ".lock").exists()


def test_a_run_that_fails_at_its_first_batch_gives_back_the_one_that_it_was_to_replace(
    tmp_path, tiny_flags, finished_run, monkeypatch
):
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    (run / "notes.md").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    def broken(self, index):
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr("erw_hf.data.samples.SampleMaker.__call__", broken)
        with pytest.raises(RuntimeError, match="could not read its data"):
            train(*tiny_flags, "--overwrite_output_dir", f"--output_dir={run}", "--dataloader_num_workers=0")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    train(*tiny_flags, "--overwrite_output_dir", f"--output_dir={run}", "--max_train_steps=3")
    assert len(losses(run)) == 3 and not (run / "checkpoint-6").exists() and not (run / ".overwritten").exists()
    assert (run / "notes.md").read_text() == "mine" and not (run / "pipeline").exists()
    shutil.rmtree(run / "checkpoint-2")
    shutil.rmtree(run / "checkpoint-3")
    with pytest.raises(ValueError, match="holds a run whose checkpoints are missing"):
        train(*tiny_flags, f"--output_dir={run}", "--resume_from_checkpoint=latest")


def test_latest_without_a_checkpoint_starts_anew_and_says_so(tmp_path, tiny_flags, caplog):
    flags = [*tiny_flags, "--max_train_steps=3", "--resume_from_checkpoint=latest"]
    train(*flags, f"--output_dir={tmp_path}/run")
    assert "starting a new run" in caplog.text
    assert len(losses(tmp_path / "run")) == 3


def test_nonfinite_steps_are_skipped_counted_and_stop_the_run(tmp_path, tiny_flags):
    flags = [
        *tiny_flags,
        "--warmup_learning_rate=1e-3",
        "--learning_rate=1e30",
        "--max_grad_norm=1e30",
        "--max_train_steps=40",
    ]
    with pytest.raises(RuntimeError, match="3 steps in a row had a non-finite gradient"):
        train(*flags, "--max_nonfinite_steps=3", f"--output_dir={tmp_path}/run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["nonfinite_steps"] == 3 and records[-1]["loss"] is None
