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
"""evaluate.py as a user runs it: one process or two, killed and started again, of a model or of images, by its record."""

import json
import signal

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from helpers import REPOSITORY, TINY_MODEL, check_ended, randomize, run_forked, run_ranks, run_script, train
from PIL import Image as PILImage

from erw_hf import ERWPipeline, ERWTransformer2DModel, FlowMatchEulerMaruyamaScheduler
from erw_hf.evaluation import feature_statistics
from erw_hf.evaluation.images import dataset_images, generated_images, npz_images, sample_generator, sample_label
from erw_hf.evaluation.metrics import frechet_estimate
from erw_hf.trainer.config import TrainingConfig
from erw_hf.trainer.run_lock import RunLock
from erw_hf.trainer.run_record import read_metrics


CLASSIFIER = REPOSITORY / "pipelines" / "digits-classifier"
DIGITS = ["--reference=digits", f"--extractor={CLASSIFIER}", "--reference_split=test"]
SAMPLES = ["--num_samples=50", "--batch_size=8", "--num_inference_steps=4", "--save_npz"]


def evaluate(folder, *flags):
    run_script("evaluate", f"--output_dir={folder}", *flags)
    return json.loads((folder / "evaluation.json").read_text())


def reference_in(folder):
    """The one that was made of a data set."""
    (path,) = folder.glob("reference-*.npz")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    transformer = randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()
    ERWPipeline(transformer, None, FlowMatchEulerMaruyamaScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations") / "one"
    return folder, evaluate(folder, f"--model={model}", *DIGITS, *SAMPLES)


def test_the_record_holds_the_numbers_and_all_they_depend_on(evaluated):
    folder, record = evaluated
    assert {
        "metrics",
        "errors",
        "bias",
        "data",
        "settings",
        "model",
        "reference",
        "extractor",
        "versions",
        "hardware",
        "seconds",
    } == set(record)
    assert set(record["metrics"]) == {
        "fid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std", "mind", "accuracy",
    }  # fmt: skip
    assert all(np.isfinite(value) for value in record["metrics"].values()) and record["metrics"]["fid"] > 1
    assert set(record["errors"]) == set(record["metrics"]) - {"inception_score_std", "kid_std"}
    assert set(record["bias"]) == {"fid", "inception_score", "mind"} and record["bias"]["fid"] > 0
    settings = {"seed": 0, "labels": "random", "num_inference_steps": 4, "guidance_scale": 1.8, "num_samples": 50}
    assert settings.items() <= record["settings"].items() and record["settings"]["guidance_interval"] == [0.0, 0.7]
    assert record["model"]["scheduler"]["class"] == "FlowMatchEulerMaruyamaScheduler"
    assert "round" in record["model"]["rounding"] and "EMA" in record["model"]["weights"]
    for hashed in (record["model"], record["reference"], record["extractor"]):
        assert len(hashed["sha256"]) == 64
    assert record["versions"]["torch-fidelity"] and record["hardware"]["processes"] == 1
    assert {"load", "reference", "samples", "features", "reference_images", "metrics"} == set(record["seconds"])
    names = ["evaluation.json", reference_in(folder).name, "samples.npz"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_two_processes_draw_the_same_images_and_find_the_same_numbers(model, evaluated, tmp_path):
    folder, record = evaluated
    flags = [f"--output_dir={tmp_path}/two", f"--model={model}", *DIGITS, *SAMPLES]
    check_ended(run_ranks(2, "training/evaluate.py", *flags))
    both = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert both["hardware"]["processes"] == 2
    images = [npz_images(path / "samples.npz").read(range(50))[0] for path in (folder, tmp_path / "two")]
    assert torch.equal(*images)
    with np.load(reference_in(folder)) as one, np.load(reference_in(tmp_path / "two")) as two:
        for name in ("mu", "sigma"):
            assert abs(one[name] - two[name]).max() <= 1e-12
    # 50 samples in 64 dimensions: the square root makes 1e-8 of a last bit in the singular directions.
    assert both["metrics"] == pytest.approx(record["metrics"], rel=1e-8)


# evaluate.py that ends as by the out-of-memory killer when the fourth of its seven batches is drawn
DYING = """
import os, runpy, signal
from erw_hf.evaluation.images import NpzWriter

write = NpzWriter.write

def die(self, indices, images):
    if indices[0] == 24:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, indices, images)

NpzWriter.write = die
runpy.run_path("training/evaluate.py", run_name="__main__")
"""


def test_killed_half_way_and_started_again_it_finds_the_very_numbers(model, evaluated, tmp_path):
    folder, record = evaluated
    flags = [f"--model={model}", *DIGITS, *SAMPLES, "--save_steps=1"]
    process = run_forked("-c", DYING, f"--output_dir={tmp_path}", *flags, environment={"ACCELERATE_USE_CPU": "true"})
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    assert len(list((tmp_path / "work" / "samples").glob("labels-*.npy"))) == 3
    for name, flag in (
        ("settings.seed", "--seed=1"),
        ("settings.mixed_precision", "--mixed_precision=bf16"),
        ("files.save_png", "--save_png"),
    ):
        with pytest.raises(ValueError, match=f"begun with other {name}"):
            evaluate(tmp_path, *flags, flag)
    assert evaluate(tmp_path, *flags)["metrics"] == record["metrics"]
    images = [npz_images(path / "samples.npz").read(range(50))[0] for path in (folder, tmp_path)]
    assert torch.equal(*images)


def test_the_record_is_made_again_and_compared(evaluated, tmp_path, capsys):
    folder, record = evaluated
    copy = tmp_path / "evaluation.json"
    copy.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="finished evaluation"):
        run_script("evaluate", f"--record={copy}", f"--output_dir={tmp_path}")
    run_script("evaluate", f"--record={copy}")
    assert json.loads((tmp_path / "again" / "evaluation.json").read_text())["metrics"] == record["metrics"]
    assert "difference" in capsys.readouterr().out
    copy.write_text(json.dumps(record | {"metrics": record["metrics"] | {"fid": record["metrics"]["fid"] * 1.001}}))
    with pytest.raises(SystemExit, match="the numbers differ from those of"):
        run_script("evaluate", f"--record={copy}")
    assert "1.0e-03" in capsys.readouterr().out


def test_a_record_in_bfloat16_is_made_again_in_it(model, evaluated, tmp_path):
    record = evaluate(tmp_path, f"--model={model}", *DIGITS, *SAMPLES[:3], "--mixed_precision=bf16", "--metrics=fid")
    assert record["hardware"]["mixed_precision"] == record["settings"]["mixed_precision"] == "bf16"
    assert record["metrics"]["fid"] != evaluated[1]["metrics"]["fid"]
    run_script("evaluate", f"--record={tmp_path}/evaluation.json")  # which compares


def test_a_folder_that_another_evaluation_writes_to_is_refused(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    flags = [f"--output_dir={tmp_path}", "--images=digits", "--split=test", *DIGITS, "--metrics=fid"]
    result = run_forked("training/evaluate.py", *flags, environment={"ACCELERATE_USE_CPU": "true"})
    lock.release()
    assert result.returncode != 0 and "belongs to a run that is still going" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_images_without_a_model_have_the_numbers_of_their_model(model, evaluated, tmp_path):
    """The npz that the evaluation wrote, and the same as PNG files, against a stored reference."""
    folder, record = evaluated
    reference = f"--reference={reference_in(folder)}"
    found = evaluate(tmp_path / "npz", f"--images={folder}/samples.npz", reference, DIGITS[1], "--batch_size=8")
    expected = {name: value for name, value in record["metrics"].items() if name != "accuracy"}  # it has no labels
    assert found["metrics"] == expected and found["model"] is None
    evaluate(
        tmp_path / "png", f"--model={model}", reference, DIGITS[1], *SAMPLES[:3], "--metrics", "fid", "--save_png"
    )
    images = dataset_images(str(tmp_path / "png" / "samples"))
    assert torch.equal(images.read(range(50))[0], npz_images(folder / "samples.npz").read(range(50))[0])


def test_a_reference_is_made_of_a_data_set(tmp_path):
    path = tmp_path / "references" / "digits.npz"  # in a folder that is not there yet
    arguments = ["--images=digits", "--split=test", DIGITS[1]]
    run_script("evaluate", f"--output_dir={tmp_path}/make", *arguments, f"--save_reference={path}")
    assert list((tmp_path / "make").iterdir()) == []
    found = evaluate(tmp_path / "measure", *arguments, f"--reference={path}")
    assert found["metrics"]["fid"] == pytest.approx(0, abs=1e-9) and found["metrics"]["precision"] == 1
    # Real digits that the reference has not seen are near it: the floor for models.
    assert evaluate(tmp_path / "floor", "--images=digits", f"--reference={path}", DIGITS[1])["metrics"]["fid"] < 5


def test_a_reference_of_another_split_is_made_anew(tmp_path):
    arguments = ["--images=digits", "--split=test", "--metrics=fid", *DIGITS[:2]]
    assert evaluate(tmp_path, *arguments, "--reference_split=test")["metrics"]["fid"] == pytest.approx(0, abs=1e-9)
    (tmp_path / "evaluation.json").unlink()
    assert evaluate(tmp_path, *arguments, "--reference_split=train")["metrics"]["fid"] > 0.1


def frechet_of_few(features, *gaussians):
    """As it is, but of 128 of the 2048 dimensions: eigenvalues of all take a minute. test_quality.py checks the number itself."""
    return frechet_estimate(
        features[:, :128], *((mean[:128], covariance[:128, :128]) for mean, covariance in gaussians)
    )


def test_all_metrics_with_inception_and_dinov2(inception_weights, encoder_path, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 6, 16, 16, 3), dtype=torch.uint8, generator=generator).numpy()
    pixels[1] = pixels[1] // 2
    for name, images in zip(("a", "b"), pixels, strict=True):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    networks = [f"--inception_weights={inception_weights}", f"--dinov2={encoder_path}"]
    path = f"{tmp_path}/reference.npz"
    run_script(
        "evaluate",
        f"--output_dir={tmp_path}/make",
        f"--images={tmp_path}/b.npz",
        f"--save_reference={path}",
        *networks,
    )
    with np.load(path) as file:
        names = {"mu": 2048, "mu_s": 2023, "mu_dinov2": 16}
        assert {name: file[name].size for name in names} == names
        assert file["sigma_s"].shape == (2023, 2023) and file["arr_0"].shape == (6, 16, 16, 3)
    monkeypatch.setattr("erw_hf.evaluation.quality.frechet_estimate", frechet_of_few)
    record = evaluate(tmp_path / "a", f"--images={tmp_path}/a.npz", f"--reference={path}", *networks)
    assert {"fid", "sfid", "inception_score", "precision", "recall", "kid", "fd_dinov2"} <= set(record["metrics"])
    assert all(np.isfinite(value) for value in record["metrics"].values())
    assert min(record["metrics"][name] for name in ("fid", "sfid", "fd_dinov2")) > 0
    with pytest.raises(ValueError, match="'fd_dinov2'.* cannot be computed"):
        evaluate(
            tmp_path / "c", f"--images={tmp_path}/a.npz", f"--reference={path}", networks[0], "--metrics=fd_dinov2"
        )


def test_more_representations_are_measured_in_the_same_pass_and_recorded(
    images_of_8_px, representation_paths, tmp_path
):
    networks = [f"{name}={path}" for name, path in representation_paths.items()]
    flags = [f"--images={images_of_8_px}", DIGITS[1], "--representations", *networks]
    run_script("evaluate", f"--output_dir={tmp_path}/make", f"--save_reference={tmp_path}/r.npz", *flags)
    record = evaluate(tmp_path / "a", f"--reference={tmp_path}/r.npz", *flags)
    for name, path in representation_paths.items():
        assert record["metrics"][f"fd_{name}"] == pytest.approx(0, abs=1e-6) and record["metrics"][f"mind_{name}"] == 0
        assert record["extractor"][name] == str(path) and len(record["extractor"][f"{name}_sha256"]) == 64
        assert "antialias" in record["extractor"][f"{name}_preprocessing"]
    assert "fdr6" not in record["metrics"]  # its unit is of the published networks
    assert record["extractor"]["precision"].startswith("float32")
    run_script("evaluate", f"--record={tmp_path}/a/evaluation.json")
    other = [f"mae_cls={representation_paths['clip_cls']}"]
    with pytest.raises(ValueError, match=r"other weights of it \(extractor_mae_cls\)"):
        evaluate(tmp_path / "b", f"--reference={tmp_path}/r.npz", *flags[:3], *other)


def test_what_cannot_be_evaluated(model, tmp_path, capsys):
    arguments = [f"--model={model}", *DIGITS, "--num_inference_steps=2"]
    with pytest.raises(ValueError, match="at least 2 samples"):
        evaluate(tmp_path / "one", *arguments, "--num_samples=1")
    with pytest.raises(ValueError, match="at least 4 samples"):
        evaluate(tmp_path / "three", *arguments, "--num_samples=3")
    with pytest.raises(FileNotFoundError, match="VIRTUAL_imagenet256_labeled.npz"):
        evaluate(tmp_path / "none", arguments[0], "--reference=nowhere.npz", DIGITS[1], "--num_samples=2")
    with pytest.raises(SystemExit):
        evaluate(tmp_path / "none", arguments[0])
    assert "--reference" in capsys.readouterr().err


def test_noise_and_label_of_a_sample_are_functions_of_seed_and_index(model):
    pipe = ERWPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    images = generated_images(pipe, 60, seed=3, num_inference_steps=4)
    whole, labels = images.read(range(60))
    parts = [images.read(range(start, min(start + 7, 60))) for start in range(0, 60, 7)]
    assert torch.equal(labels, torch.cat([part[1] for part in parts]))
    difference = (whole.int() - torch.cat([part[0] for part in parts]).int()).abs()
    # The last bit of a batched product may cross a rounding edge.
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert not torch.equal(whole, generated_images(pipe, 60, seed=4, num_inference_steps=4).read(range(60))[0])
    drawn = {tuple(torch.randn(4, generator=sample_generator(0, index)).tolist()) for index in range(2000)}
    assert len(drawn) == 2000
    random = np.bincount([sample_label(0, index, 10, "random") for index in range(2000)], minlength=10)
    assert random.min() > 150 and random.max() < 250 and len(set(random)) > 1
    assert [sample_label(0, index, 10, "balanced") for index in range(20)] == [*range(10)] * 2
    assert sample_label(0, 5, 0, "random") == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_named(model, value):
    """Infinity too, which the pipeline would clip to a white pixel."""
    pipe = ERWPipeline.from_pretrained(model)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    torch.nn.init.constant_(pipe.transformer.proj_out.bias, value)
    with pytest.raises(ValueError, match="sample 3 holds NaN or infinity"):
        generated_images(pipe, 8, seed=0, num_inference_steps=1).read([3, 4])


def test_evaluating_a_run_does_not_change_it_and_is_what_evaluate_py_finds(tiny_flags, tmp_path):
    flags = [
        *tiny_flags,
        "--lr_scheduler=constant",
        "--probe_samples=60",
        "--probe_dataset=digits",
        "--evaluation_samples=40",
    ]
    monitor = ["--evaluation_steps=5", "--probe_steps=3", f"--evaluation_extractor={CLASSIFIER}"]
    train(*flags, f"--output_dir={tmp_path}/plain")
    finished = tmp_path / "run" / "evaluation" / "evaluation.json"  # where evaluate.py's docstring puts it
    finished.parent.mkdir(parents=True)
    finished.write_text("{}")
    train(*flags, f"--output_dir={tmp_path}/run", *monitor, "--max_train_steps=10", "--report_to=tensorboard")
    plain, run = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "run"))
    assert [record["loss"] for record in run[:7]] == [record["loss"] for record in plain]

    records = read_metrics(tmp_path / "run" / "evaluations.jsonl")
    assert [record["step"] for record in records] == [3, 5, 6, 9, 10]
    assert ["probes" in record for record in records] == [True, False, True, True, False]
    for record in records[::2][:2]:
        for probe in record["probes"]:  # the warmup's model has two blocks
            assert len(probe["cknna"]) == len(probe["accuracy"]) == (2 if record["phase"] == "warmup" else 3)
    assert [probe["t"] for probe in records[0]["probes"]] == [0.0, 0.5]
    for name in ("quality_curve.png", "probes.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000
    assert finished.exists() and not (tmp_path / "run" / ".evaluation-work").exists()
    assert list((tmp_path / "run").rglob("events.out*"))

    # The weights of the last step are those of the pipeline: the EMA's.
    found = evaluate(
        tmp_path / "after", f"--model={tmp_path}/run/pipeline", f"--reference={reference_in(tmp_path / 'run')}",
        DIGITS[1], "--num_samples=40", "--batch_size=4", "--num_inference_steps=2", "--guidance_scale=1", "--metrics", "fid",
        "accuracy",
    )  # fmt: skip
    assert found["metrics"] == {name: records[-1][name] for name in ("fid", "accuracy")}
    assert found["errors"] == {name: records[-1][f"{name}_error"] for name in ("fid", "accuracy")}


def test_what_a_run_shows_of_itself_never_ends_it(tiny_flags, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in (
        "snapshots.image_grid",
        "snapshots.plot_losses",
        "quality_monitor.plot_probes",
        "quality_monitor.measure",
    ):
        monkeypatch.setattr(f"erw_hf.trainer.{name}", fail)
    train(
        *tiny_flags, f"--output_dir={tmp_path}", "--evaluation_steps=5", "--probe_steps=3", "--validation_steps=6",
        f"--evaluation_extractor={CLASSIFIER}", "--probe_samples=20", "--probe_dataset=digits", "--evaluation_samples=4",
    )  # fmt: skip
    assert ERWPipeline.from_pretrained(tmp_path / "pipeline").transformer.config.num_layers == 3
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 8))
    records = read_metrics(tmp_path / "evaluations.jsonl")
    assert [(record["step"], "fid" in record, "probes" in record) for record in records] == [
        (3, False, True), (5, False, False), (6, False, True),
    ]  # fmt: skip
    for missing in (
        "step 3 has no picture of its evaluation", "step 5 has no evaluation", "step 6 has no pictures", "no grid.png",
        "no loss_curve.png",
    ):  # fmt: skip
        assert sum(f"{missing}, the run continues: OSError" in message for message in caplog.messages) == 1, missing


def test_a_run_that_could_not_evaluate_does_not_start(tiny_flags, tmp_path):
    with pytest.raises(ValueError, match="evaluation_steps needs evaluation_reference"):
        TrainingConfig(in_channels=1, evaluation_steps=5)
    with pytest.raises(ValueError, match="evaluation_samples must be at least 2"):
        TrainingConfig(in_channels=1, evaluation_samples=1)
    with pytest.raises(FileNotFoundError, match="VIRTUAL_imagenet256"):
        train(
            *tiny_flags, f"--output_dir={tmp_path}/run", "--evaluation_steps=5", "--evaluation_reference=none.npz",
            f"--evaluation_extractor={CLASSIFIER}",
        )  # fmt: skip
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="narrow.npz"):
        train(
            *tiny_flags, f"--output_dir={tmp_path}/run", "--evaluation_steps=5",
            f"--evaluation_reference={tmp_path}/narrow.npz", f"--evaluation_extractor={CLASSIFIER}",
        )  # fmt: skip
    assert not list((tmp_path / "run").glob("metrics.jsonl"))


@pytest.fixture(scope="module")
def images_of_8_px(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "some.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    return path


def test_the_record_leaves_out_what_was_not_done(model, images_of_8_px, tmp_path, capsys):
    flags = [f"--reference={images_of_8_px.parent}/r.npz", f"--extractor={CLASSIFIER}"]
    with pytest.raises(FileNotFoundError):
        evaluate(tmp_path / "a", f"--images={images_of_8_px}", *flags)
    made = f"--save_reference={images_of_8_px.parent}/r.npz"
    record = evaluate(
        tmp_path / "a", f"--images={images_of_8_px}", *flags, made, "--image_size=16", "--mixed_precision=bf16"
    )
    nothing = ["image_size", "split", "reference_split", "labels", "sampler", "num_inference_steps", "guidance_scale"]
    assert [record["settings"][name] for name in nothing] == [None] * 7
    assert (
        record["settings"]["mixed_precision"] == "no" and "--image_size 16 does not apply" in capsys.readouterr().out
    )
    drawing = [f"--model={model}", "--num_samples=4", "--num_inference_steps=1", "--metrics=fid"]
    for asked, applied in (("fp16", "no"), ("bf16", "bf16")):  # on a CPU
        record = evaluate(tmp_path / asked, *drawing, *flags, f"--mixed_precision={asked}")
        assert record["settings"]["mixed_precision"] == applied
    again = tmp_path / "a" / "again"
    run_script("evaluate", f"--record={tmp_path}/a/evaluation.json", f"--output_dir={again}")
    assert (again / "evaluation.json").exists()


BAD_FLAGS = {
    "--batch_size=0": "batch_size must be at least 1, got 0",
    "--num_samples=0": "num_samples must be at least 1",
    "--num_inference_steps=0": "num_inference_steps must be at least 1",
    "--save_steps=0": "save_steps must be at least 1",
    "--guidance_scale=nan": "guidance_scale must be a number",
    "--guidance_interval=0.7 0": "0 <= LOW <= HIGH <= 1",
    "--save_reference={folder}": "must be a file that ends with .npz",
    "--save_reference={folder}/r": "must be a file that ends with .npz",
    "--save_reference={folder}/text.npz/r.npz": "text.npz is a file",
    "--reference={folder}/r.npy": "r.npy: name an npz file",
    "--output_dir={folder}/text.npz": "text.npz is a file",
    "--metrics=fido": "invalid choice: 'fido'",
    "--representations=mae_cls": "write NAME=ID",
    "--representations=mae=a": "write NAME=ID",
    "--representations=clip_cls=a clip_cls=b": "a name comes twice",
    "--record={folder}/text.npz": "is not an evaluation.json",
    "--record={folder}/absent.json": "is not an evaluation.json",
}


@pytest.mark.parametrize("flag", BAD_FLAGS)
def test_bad_flags_end_it_before_anything_is_loaded(flag, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("404: Not Found")
    name, _, value = flag.format(folder=tmp_path).partition("=")
    subject = [] if name == "--record" else ["--model=absent", "--reference=digits"]
    with pytest.raises(SystemExit) as end:
        run_script("evaluate", f"--output_dir={tmp_path}/out", *subject, name, *value.split())
    assert end.value.code == 2 and BAD_FLAGS[flag] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind",
    [
        "few",
        "truncated",
        "text",
        "npy",
        "other keys",
        "other widths",
        "not finite",
        "objects",
        "no covariance",
        "not positive",
        "dataset",
    ],
)
def test_a_bad_reference_ends_it_before_any_image_is_drawn(model, images_of_8_px, kind, tmp_path):
    path, square = tmp_path / "r.npz", np.eye(64)
    few = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(path, mu=np.zeros(64), sigma=square, arr_0=few)
    message = "precision_recall needs at least 4 images in the reference .*r.npz, there are 3"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
        message = "not an npz file, or was cut short"
    elif kind == "text":
        path.write_text("404: Not Found")
        message = "not an npz file, or was cut short"
    elif kind == "npy":
        np.save(tmp_path / "r.npy", few)
        (tmp_path / "r.npy").replace(path)
        message = "not an npz file, or was cut short"
    elif kind == "other keys":
        np.savez(path, images=few)
        message = "no mu and sigma, which fid needs"
    elif kind == "other widths":
        np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32), arr_0=few)
        message = "2048 features, the extractor 64"
    elif kind == "not finite":
        np.savez(path, mu=np.full(64, np.nan), sigma=square, arr_0=few)
        message = "must be finite"
    elif kind == "objects":
        np.savez(path, mu=np.array([None] * 64), sigma=square, arr_0=few)
        message = "holds no arrays of numbers"
    elif kind == "no covariance":
        np.savez(path, mu=np.zeros(64), sigma=-square, arr_0=few)
        message = "sigma of .*r.npz is not a covariance"
    elif kind == "not positive":
        np.savez(path, mu=np.zeros(64), sigma=square + 3 * square.max() * (1 - np.eye(64)), arr_0=few)
        message = "sigma of .*r.npz is not a covariance"
    elif kind == "dataset":
        path = tmp_path / "three"
        path.mkdir()
        for i in range(3):
            PILImage.new("RGB", (8, 8), (i, i, i)).save(path / f"{i}.png")
        message = "precision_recall needs at least 4 images in the reference .*three, there are 3"
    flags = [f"--model={model}", f"--extractor={CLASSIFIER}", "--num_samples=5", "--num_inference_steps=1"]
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "out", *flags, f"--reference={path}")
    assert not (tmp_path / "out").exists()


def test_the_record_names_the_model_that_guides(model, tmp_path):
    pipe = ERWPipeline.from_pretrained(model)
    hashes = []
    for seed in (1, 2):
        guide = ERWTransformer2DModel(**pipe.transformer.config)
        torch.nn.init.constant_(guide.proj_out.bias, seed)
        pipe.guidance_transformer = guide
        pipe.save_pretrained(tmp_path / "guided")
        flags = [
            f"--model={tmp_path}/guided",
            *DIGITS,
            "--num_samples=8",
            "--num_inference_steps=1",
            "--metrics",
            "fid",
        ]
        hashes.append(evaluate(tmp_path / f"out{seed}", *flags)["model"]["guidance_transformer_sha256"])
    assert len(set(hashes)) == 2


def test_samples_that_are_not_square_are_refused_before_a_reference_is_made(tmp_path):
    np.savez(tmp_path / "wide.npz", arr_0=np.zeros((9, 8, 16, 3), np.uint8))
    flags = [f"--images={tmp_path}/wide.npz", "--reference=digits", f"--extractor={CLASSIFIER}"]
    with pytest.raises(ValueError, match=r"samples are \(8, 16\) px .* cropped to \(8, 8\)"):
        evaluate(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_try_that_drew_nothing_does_not_bind_the_next(tmp_path):
    broken = ERWTransformer2DModel(**TINY_MODEL)
    torch.nn.init.constant_(broken.proj_out.bias, torch.nan)
    ERWPipeline(broken, None, FlowMatchEulerMaruyamaScheduler()).save_pretrained(tmp_path / "broken")
    np.savez(tmp_path / "r.npz", mu=np.zeros(64), sigma=np.eye(64))
    flags = [f"--reference={tmp_path}/r.npz", f"--extractor={CLASSIFIER}", "--metrics=fid", "--num_samples=4"]
    for steps in (1, 2):
        with pytest.raises(ValueError, match="NaN or infinity"):
            evaluate(tmp_path / "out", f"--model={tmp_path}/broken", *flags, f"--num_inference_steps={steps}")


def test_an_evaluation_goes_on_with_its_images_alone(tmp_path, monkeypatch):
    def images(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / "some.npz", arr_0=pixels)

    np.savez(tmp_path / "r.npz", mu=np.zeros(64), sigma=np.eye(64))
    flags = [f"--images={tmp_path}/some.npz", f"--reference={tmp_path}/r.npz", f"--extractor={CLASSIFIER}"]
    flags += ["--metrics=fid", "--batch_size=2", "--save_steps=1"]
    images(0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("erw_hf.evaluation.feature_statistics._save_part", stop_after(2))
        evaluate(tmp_path / "out", *flags)
    images(1)
    with pytest.raises(ValueError, match="was begun with other data.images"):
        evaluate(tmp_path / "out", *flags)
    images(0)
    settings = tmp_path / "out/work/settings.json"
    begun = json.loads(settings.read_text())
    settings.write_text(json.dumps({part: value for part, value in begun.items() if part != "data"}))
    with pytest.raises(ValueError, match="was begun with other data.images"):  # by a version without it
        evaluate(tmp_path / "out", *flags)
    settings.write_text(json.dumps(begun))
    record = evaluate(tmp_path / "out", *flags)
    assert "arr_0.npy" in record["data"]["images"]


def stop_after(count):
    saved, save = [], feature_statistics._save_part

    def stop(part, path):
        save(part, path)
        saved.append(path)
        if len(saved) == count:
            raise KeyboardInterrupt

    return stop


def test_fewer_images_than_asked_for_are_said(tmp_path, images_of_8_px, capsys):
    np.savez(tmp_path / "r.npz", mu=np.zeros(64), sigma=np.eye(64))
    flags = [f"--images={images_of_8_px}", f"--reference={tmp_path}/r.npz", f"--extractor={CLASSIFIER}"]
    evaluate(tmp_path / "out", *flags, "--metrics=fid", "--num_samples=50")
    assert "holds only 6 images, all are evaluated" in capsys.readouterr().out


def test_a_pipeline_with_diffusers_scheduler_is_drawn_by_heun(tmp_path):
    transformer = randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()
    ERWPipeline(transformer, None, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "r.npz", mu=np.zeros(64), sigma=np.eye(64))
    flags = [f"--reference={tmp_path}/r.npz", f"--extractor={CLASSIFIER}", "--metrics=fid", "--num_samples=4"]
    record = evaluate(
        tmp_path / "out", f"--model={tmp_path}/model", *flags, "--sampler=heun", "--num_inference_steps=2"
    )
    assert record["model"]["scheduler"]["class"] == "FlowMatchHeunScheduler"


def test_another_sampler_keeps_the_shift_of_the_pipeline_or_is_refused(tmp_path):
    transformer = randomize(ERWTransformer2DModel(**TINY_MODEL)).eval()
    ERWPipeline(transformer, None, FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "r.npz", mu=np.zeros(64), sigma=np.eye(64))
    flags = [
        f"--model={tmp_path}/model",
        f"--reference={tmp_path}/r.npz",
        f"--extractor={CLASSIFIER}",
        "--metrics=fid",
    ]
    flags += ["--num_samples=4", "--num_inference_steps=2"]
    assert evaluate(tmp_path / "out", *flags, "--sampler=euler")["model"]["scheduler"]["shift"] == 3
    multistep = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    ERWPipeline(transformer, None, multistep).save_pretrained(tmp_path / "model")  # where the key has another name
    with pytest.raises(ValueError, match="shift=3: use euler"):
        evaluate(tmp_path / "other", *flags, "--sampler=heun")
