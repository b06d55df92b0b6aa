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
"""The controlled experiment: what a budget buys, that runs go on, and that its page says what the numbers say."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import set_seed
from helpers import REPOSITORY
from helpers import run_script as run_in_process

from erw_hf.trainer.run_record import read_metrics
from erw_hf.trainer.setup import build_full_model


sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import convergence  # noqa: E402
import convergence_report  # noqa: E402
from convergence_report import answer, choose, error_bar, load_records, records_path, speed_up, write_report  # noqa: E402


RECIPES = REPOSITORY / "benchmarks" / "recipes"
TINY = {
    "evaluation_samples": 20, "sample_size": 8, "patch_size": 2, "num_layers": 3, "num_attention_heads": 2,
    "attention_head_dim": 8, "projector_dim": 16, "warmup_depth": 2, "projector_depth": 2, "train_batch_size": 4, "lr_warmup_steps": 1,
    "num_validation_images": 1, "num_inference_steps": 2,
}  # fmt: skip


@pytest.fixture
def recipes(tmp_path, encoder_path, monkeypatch):
    """The digits' own recipe, made tiny, and its scripts run in this process."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    base = yaml.safe_load((RECIPES / "digits.yaml").read_text())
    classifier = str(REPOSITORY / "pipelines" / "digits-classifier")
    base |= {**TINY, "encoder": str(encoder_path), "evaluation_extractor": classifier}
    (folder / "digits.yaml").write_text(yaml.safe_dump(base))
    table = yaml.safe_load((RECIPES / "arms.yaml").read_text())
    for arm in table["arms"].values():
        if "blocks" in arm:
            arm["blocks"] = 2
    table["arms"]["half_sit"] = {"alignment_weight": 0.0, "budget": 0.5}
    table |= {"probe_images": 60}
    table["data"]["digits"] |= {"budget": 6e7, "warmup_steps": 4, "evaluations": 2}
    (folder / "arms.yaml").write_text(yaml.safe_dump(table))

    monkeypatch.setattr("signal.signal", lambda *_: None)  # which Python allows in the main thread alone

    def run_script(study, command, log):
        if time.monotonic() > study.stop_at:
            raise convergence.OutOfTime
        run_in_process(command[0].removeprefix("training/").removesuffix(".py"), *command[1:])

    monkeypatch.setattr(convergence, "run_script", run_script)
    return folder


def command(recipes, *flags):
    folders = ["--runs", recipes.parent / "runs", "--results", recipes.parent / "results", "--recipes", recipes]
    return [str(part) for part in (*flags, "--jobs", 1, *folders)]


def study_of(recipes, budget):
    table = convergence.read_table(recipes, "digits")
    runs, results = recipes.parent / "runs" / "digits", recipes.parent / "results"
    return convergence.Study(recipes, "digits", runs, results, budget, table)


def test_the_budget_buys_whole_evaluations_and_pays_for_the_warmup(recipes):
    study = study_of(recipes, 0)
    config = convergence.read_config(study, {"warmup_steps": 4})
    warmup, full = convergence.step_flops(config)
    assert 0 < warmup < full
    assert convergence.plan(config, 4 * warmup + 6.5 * full, 2) == (10, 5)
    assert convergence.plan(config, 4 * warmup + 7.5 * full, 2) == (10, 5)  # 11 is no multiple of 2
    config.warmup_steps = 0
    assert convergence.plan(config, 4 * warmup + 6.5 * full, 2)[0] == 2 * int((4 * warmup + 6.5 * full) / full / 2)
    config.warmup_steps = 4
    with pytest.raises(ValueError, match="ends before full training"):
        convergence.plan(config, 4 * warmup + full, 2)
    # No projector, no encoder: SiT's step is cheaper.
    assert convergence.step_flops(convergence.read_config(study, {"alignment_weight": 0.0}))[1] < full


def test_runs_are_measured_recorded_skipped_and_gone_on_with(recipes, monkeypatch):
    arms = ["--arms", "sit", "half_sit", "erw", "erw_asleep", "--seeds", 1]
    assert not convergence.main(command(recipes, *arms, "--max_minutes", 0))  # nothing was begun
    results = recipes.parent / "results"
    assert not list(results.iterdir())

    run = convergence.run_script

    def without_time_for_probes(study, script, log):
        if script[0].endswith("probe.py"):
            raise convergence.OutOfTime
        run(study, script, log)

    with monkeypatch.context() as patch:
        patch.setattr(convergence, "run_script", without_time_for_probes)
        assert not convergence.main(command(recipes, "--arms", "sit", "--seeds", 1))
    trained = (recipes.parent / "runs" / "digits" / "sit-seed0" / "metrics.jsonl").read_bytes()
    assert convergence.main(command(recipes, *arms))
    assert (recipes.parent / "runs" / "digits" / "sit-seed0" / "metrics.jsonl").read_bytes() == trained  # not again

    records = {r["arm"]: r for r in load_records(records_path(results, "digits"))}
    assert set(records) == {"sit", "half_sit", "erw", "erw_asleep"} and {r["seed"] for r in records.values()} == {0}
    assert {path.stem for path in (results / "pictures").iterdir()} == {f"digits-{name}" for name in records}
    for record in records.values():
        last = record["points"][-1]
        assert 0.8 * record["budget"] < last["flops"] <= record["budget"]
        assert len(record["probes"]) == 2 and "cknna" in record["probes"][0]  # for SiT too
        assert str(recipes.parent / "runs") not in json.dumps(record)
        assert len(json.dumps(record)) < 100_000
        # A point can be run again from its line.
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", record["commit"])
        assert {len(value) for value in record["weights"].values()} == {64} and len(record["weights"]) == 2
    assert records["half_sit"]["budget"] == records["sit"]["budget"] / 2
    # What the start was made of is paid for, in steps as in FLOPs.
    asleep, erw = (records[name]["points"] for name in ("erw_asleep", "erw"))
    assert asleep[-1] | {"seconds": 0, "fid": 0, "accuracy": 0} == erw[-1] | {"seconds": 0, "fid": 0, "accuracy": 0}
    metrics = recipes.parent / "runs" / "digits" / "erw-seed0" / "metrics.jsonl"
    assert erw[-1]["flops"] == read_metrics(metrics)[-1]["flops"]
    page = (recipes.parent / "results" / "convergence-digits.md").read_text()
    assert "Does the warmup pay without any alignment" not in page  # a question whose arms were not run
    for name in ("methods", "pictures"):
        assert (recipes.parent / "results" / f"convergence-digits-{name}.png").exists()

    before = records_path(results, "digits").stat().st_mtime_ns
    assert convergence.main(command(recipes, *arms))
    assert before == records_path(results, "digits").stat().st_mtime_ns
    with pytest.raises(ValueError, match="another budget"):
        convergence.main(command(recipes, *arms, "--budget", "7e7"))

    # Where a teacher lies and what the CPU chose make no other run; another teacher of the arm does
    base = yaml.safe_load((recipes / "digits.yaml").read_text())
    encoder = recipes.parent / "encoder"
    shutil.copytree(base["encoder"], encoder)
    (recipes / "digits.yaml").write_text(yaml.safe_dump(base | {"encoder": str(encoder), "mixed_precision": "auto"}))
    assert convergence.main(command(recipes, *arms))
    table = yaml.safe_load((recipes / "arms.yaml").read_text())
    table["arms"]["erw"]["encoder"] = "random"
    (recipes / "arms.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match="another encoder"):
        convergence.main(command(recipes, *arms))


def test_a_run_goes_on_with_its_own_settings_alone(recipes, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(convergence, "run_script", out_of_time)
        assert not convergence.main(command(recipes, "--arms", "sit", "--seeds", 1))
    table = yaml.safe_load((recipes / "arms.yaml").read_text())
    table["arms"]["sit"]["learning_rate"] = 0.5
    (recipes / "arms.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match="was begun with other settings.*choose another --runs, or delete"):
        convergence.main(command(recipes, "--arms", "sit", "--seeds", 1))


def out_of_time(*_):
    raise convergence.OutOfTime


def test_a_running_script_is_stopped_when_the_time_is_over(tmp_path):
    study = convergence.Study(tmp_path, "digits", tmp_path, tmp_path, 0, {}, stop_at=time.monotonic() + 0.5)
    started = time.monotonic()
    with pytest.raises(convergence.OutOfTime):
        convergence.run_script(study, ["-c", "import time; time.sleep(3600)"], str(tmp_path / "log"))
    assert time.monotonic() - started < 1800
    study.stop_at = float("inf")
    with pytest.raises(RuntimeError, match="no such thing"):
        convergence.run_script(study, ["-c", "raise SystemExit('no such thing')"], str(tmp_path / "log"))


def test_a_woken_run_differs_from_its_control_in_the_gates_alone(recipes, encoder_path):
    from erw_hf import ERWTransformer2DModel, RepresentationEncoder

    study = study_of(recipes, 6e7)
    config = convergence.read_config(study, {"seed": 7})
    set_seed(7)  # as train_erw.py does
    encoder = RepresentationEncoder.from_pretrained(encoder_path, config.token_grid)
    control = build_full_model(config, 10, [encoder]).transformer.state_dict()
    random_state = torch.get_rng_state()
    convergence.make_start(config, {"start": "woken", "blocks": 2, "gate": 0.3}, recipes.parent / "run")
    assert torch.equal(torch.get_rng_state(), random_state)
    woken = ERWTransformer2DModel.from_pretrained(recipes.parent / "run-start" / "transformer").state_dict()
    gates = [f"transformer_blocks.{block}.modulation.bias" for block in (0, 1)]
    assert [name for name, tensor in woken.items() if not torch.equal(tensor, control[name])] == gates
    for name in gates:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = woken[name].chunk(6)
        assert not torch.cat([shift, scale, shift_mlp, scale_mlp]).any()
        assert torch.equal(torch.cat([gate, gate_mlp]), torch.full((32,), 0.3))


def test_a_control_keeps_of_the_encoder_what_its_name_says(recipes):
    from transformers import AutoModel

    study = study_of(recipes, 6e7)
    trained = AutoModel.from_pretrained(convergence.read_config(study, {}).encoder).state_dict()
    made = {}
    for kind in convergence.CONTROLS:
        folder = convergence.control_encoder(study, kind, 3)
        made[kind] = AutoModel.from_pretrained(folder).state_dict()
        assert made[kind].keys() == trained.keys() and (folder / "preprocessor_config.json").exists()
    assert convergence.control_encoder(study, "random", 4) != convergence.control_encoder(study, "random", 3)
    gates = {name for name in trained if "layer_scale" in name}
    matrices = {name for name, tensor in trained.items() if tensor.ndim == 2 and "token" not in name}
    assert gates and matrices
    for name, tensor in trained.items():
        if name in gates:
            assert torch.equal(made["gates"][name], tensor)
        else:
            assert torch.equal(made["gates"][name], made["random"][name])
        if name in matrices:
            assert not torch.equal(made["permuted"][name], tensor)
            rows = [sorted(map(tuple, m.tolist())) for m in (made["permuted"][name], tensor)]
            assert rows[0] == rows[1] and not torch.equal(made["random"][name], tensor)
        elif tensor.ndim == 1:
            assert torch.equal(made["permuted"][name], tensor)


def test_a_record_says_what_its_teacher_knows(recipes, tmp_path):
    study = study_of(recipes, 6e7)
    encoder = tmp_path / "teacher"
    encoder.mkdir()
    (encoder / "training.json").write_text(
        json.dumps({"held_out_accuracy": {"cells": 0.5}, "flops": 7, "images_seen": 2, "arguments": {}})
    )
    found = convergence.provenance(study, [f"--encoder={encoder}"])["teacher"]
    assert found == {"name": "teacher", "held_out_accuracy": {"cells": 0.5}, "flops": 7, "images_seen": 2}
    assert "teacher" not in convergence.provenance(study, [f"--encoder={encoder}", "--alignment_weight=0"])  # SiT
    # Another encoder than the base's is found from the repository's root, wherever the study is started
    flags, _ = convergence.prepare(
        study, {"encoder": "pipelines/dinov2-tiny-digits", "alignment_weight": 0.0}, 0, tmp_path / "run"
    )
    assert f"--encoder={REPOSITORY}/pipelines/dinov2-tiny-digits" in flags


def record(arm, seed, *quality, budget=100.0):
    """A run that was measured at equal distances, the last time at the end of its budget."""
    places = [budget * (i + 1) / len(quality) for i in range(len(quality))]
    points = [{"step": int(p), "flops": p, "seconds": p, "fid": q} for p, q in zip(places, quality, strict=True)]
    probes = [{"t": t, "cknna": [0.1, 0.2], "accuracy": [0.5, 0.6]} for t in (0.0, 0.5)]
    return {
        "arm": arm, "seed": seed, "budget": budget, "points": points, "probes": probes, "hardware": "a CPU",
        "versions": {"torch": "2"}, "base": {"evaluation_samples": 20, "num_inference_steps": 2},
    }  # fmt: skip


@pytest.mark.parametrize("data", ["digits", "emoji"])
def test_what_is_on_record_is_not_run_again(data):
    """Nothing is trained here: a record made with other settings than today's raises."""
    results = REPOSITORY / "benchmarks" / "results"
    table = convergence.read_table(RECIPES, data)
    study = convergence.Study(RECIPES, data, Path("nowhere"), results, float(table["budget"]), table)
    for line in load_records(study.records):
        settings = {
            key: value for key, value in convergence.resolve_arm(study, line["arm"]).items() if key != "chosen"
        }
        convergence.run_arm(study, line["arm"], settings, line["seed"])


def test_speed_up_at_equal_quality():
    control = record("control", 0, 64.0, 16.0)  # at 50 and 100 FLOPs
    assert speed_up(record("arm", 0, 16.0, 4.0), control) == (2.0, "at least ")  # at its first measurement, or before
    assert speed_up(record("arm", 0, 64.0, 4.0), control) == (pytest.approx(100 / 75), "")  # half way in log
    assert speed_up(record("arm", 0, 64.0, 17.0), control) is None
    assert speed_up(control, control)[0] == 1.0
    assert error_bar(2.0, [2.0 + 1e-15]) == (
        0.0,
        pytest.approx(0),
    )  # of a lone ratio the mean may miss it, and no bar is negative
    # Noise is nearer to the data than the first blur: what counts is from where on it is as good for good.
    assert speed_up(record("arm", 0, 8.0, 64.0, 32.0, 4.0), record("control", 0, 99.0, 32.0))[0] == pytest.approx(
        100 / 75
    )
    # A control at rest does not make the others fast: it was there at 50 itself.
    assert speed_up(record("arm", 0, 16.0, 4.0), record("control", 0, 16.0, 16.0))[0] == 1.0


def test_ahead_is_lower_and_sooner():
    # Two per cent of the budget are left over: a little lower at a later end is no lead.
    control = record("control", 0, 64.0, 16.0, budget=98.0)
    assert not convergence_report.is_ahead(record("arm", 0, 64.0, 15.9, budget=100.0), control)
    assert convergence_report.is_ahead(record("arm", 0, 64.0, 10.0, budget=100.0), control)
    # A control that is as good as it ends from its first measurement on, and still far behind
    assert convergence_report.is_ahead(record("arm", 0, 8.0, 7.0), record("control", 0, 64.0, 65.0))
    assert not convergence_report.is_ahead(record("control", 0, 64.0, 65.0), record("arm", 0, 8.0, 7.0))
    assert not convergence_report.is_ahead(record("arm", 0, 8.0, 17.0), control)
    assert convergence_report.distance_at(control, 73.5) == pytest.approx(32.0)  # half way in log
    assert convergence_report.distance_at(control, 120.0) == 16.0
    assert np.isnan(convergence_report.distance_at(control, 20.0))


def test_choosing_seeds_are_measured_where_the_reported_ones_end(recipes):
    assert convergence.main(command(recipes, "--arms", "sit", "--seeds", 1, "--choosing", 1))
    reported, choosing = load_records(records_path(recipes.parent / "results", "digits"))
    assert (reported["seed"], choosing["seed"]) == (0, 100)
    assert [point["step"] for point in choosing["points"]] == [reported["points"][-1]["step"]]
    assert len(reported["points"]) == 2 and reported["probes"] and not choosing["probes"]


def test_answers_follow_the_numbers():
    def runs(arm, *finals):
        return [record(arm, seed, 100.0, value) for seed, value in enumerate(finals)]

    good, bad, mixed = runs("good", 2.0, 3.0), runs("bad", 20.0, 30.0), runs("mixed", 1.0, 50.0)
    assert answer(good + bad, "good", "bad")[0] == "yes"
    assert answer(good + bad, "bad", "good")[0] == "no"
    assert "never" in answer(good + bad, "bad", "good")[1]
    assert answer(good + mixed, "good", "mixed")[0] == "undecided"
    assert answer(good[:1] + bad, "good", "bad")[0] == "one seed only"
    assert answer(good, "good", "bad")[0] == "not run"
    # Choosing seeds choose, and are in no answer.
    chosen_by = [record("good", 100, 5.0), record("bad", 100, 6.0)]
    assert choose(good + bad + chosen_by, ["bad", "good"]) == "good"
    assert answer(chosen_by, "good", "bad")[0] == "not run"
    with pytest.raises(ValueError, match="--choosing first: mixed"):
        choose(chosen_by + mixed, ["good", "mixed"])


def test_a_tuned_arm_is_the_best_of_the_choosing_seeds(recipes):
    study = study_of(recipes, 6e7)
    study.results.mkdir(parents=True)
    with pytest.raises(ValueError, match="--choosing first"):
        convergence.resolve_arm(study, "sit_best")
    for number, arm in enumerate(study.table["arms"]["sit_best"]["best_of"]):
        for seed, distance in ((100, 9.0 - number), (0, 1.0 + number)):  # the reported seed would choose the first
            convergence.add_record(study.records, record(arm, seed, distance))
    found = convergence.resolve_arm(study, "sit_best")
    assert found == {**study.table["arms"]["sit_muon_lr2e-3"], "chosen": "sit_muon_lr2e-3"}
    with pytest.raises(ValueError, match="no arm 'other'"):
        convergence.resolve_arm(study, "other")


def test_the_page_is_made_of_raw_results(tmp_path):
    table = {
        "arms": {"erw": {"warmup_steps": 2}, "repa": {}, "best": {"best_of": ["erw", "repa"]}},
        "questions": [["Is it better?", "erw", "repa"], ["Is it worse?", "repa", "erw"]],
        "glance": [["Both", "repa", "erw", "noised"], ["None", "noised", "erw"]],
        "figures": {"methods": ["repa", "erw"]},
        "real_distance": "that of real ones is 1",
        "drawn": ["erw"],
    }
    encoder = {"name": "tiny", "flops": 10.0, "steps": 5, "images_per_step": 2}
    for r in [record("erw", 0, 8.0, 2.0), record("erw", 1, 8.0, 4.0), record("repa", 0, 16.0, 8.0),
              record("repa", 1, 16.0, 9.0), record("erw", 100, 7.5), record("repa", 100, 9.5)]:  # fmt: skip
        convergence.add_record(records_path(tmp_path, "digits"), r)
    write_report(tmp_path, "digits", table, encoder)
    page = (tmp_path / "convergence-digits.md").read_text()
    assert "**Yes**: Is it better?\n" in page and "**No**: Is it worse?\n" in page
    assert "erw ends at 3.00 (2.00–4.00), repa at 8.50 (8.00–9.00); ahead on 2 of 2 seeds, ranges apart" in page
    assert "| Both | 8.50 (8.00–9.00) | 3.00 (2.00–4.00); at least 2.00× (2.00–2.00) |  |" in page
    assert "| erw | repa |  | 2.00× (2.00–2.00) | 2.45× (2.12–2.83) | 3.00× (2.25–4.00) |" in page
    assert "| None |" not in page
    assert "at least 2.00" in page and "never" in page
    assert "0.10 of a run's budget" in page  # the encoder's own training
    assert "best: erw, of 2" in page and "7.50" in page
    for picture in ("methods", "probes"):
        assert (tmp_path / f"convergence-digits-{picture}.png").stat().st_size > 10_000
    convergence_report.write_report(tmp_path, "digits", table, encoder)
    assert (tmp_path / "convergence-digits.md").read_text() == page


def test_the_page_sets_speed_ups_beside_what_the_teachers_know(tmp_path):
    table = {
        "arms": {"repa": {}, "sit": {"alignment_weight": 0.0}, "repa_weak": {}, "start": {}},
        "questions": [],
        "glance": [],
        "figures": {"methods": ["sit", "repa"]},
        "real_distance": "that of real ones is 1",
        "drawn": [],
        "scale": {
            "control": "sit",
            "knows": "By retrieval.",
            "arms": {"REPA": ["repa_weak", "repa"], "start": ["start"], "other": ["not_run"]},
        },
        "levers": ["repa", "sit", "start", "not_run"],
    }
    for arm, knows, *quality in [("sit", None, 64.0, 16.0), ("repa_weak", 0.2, 64.0, 17.0), ("repa", 0.4, 64.0, 4.0),
                                 ("start", 0.4, 32.0, 16.0)]:  # fmt: skip
        line = record(arm, 0, *quality) | {"weights": {"encoder": f"{knows}-hash-of-weights"}}
        if knows is not None:
            line["teacher"] = {
                "name": f"vit-{knows}",
                "held_out_accuracy": {"class": 0.1, "patches": knows},
                "flops": 250.0,
            }
        convergence.add_record(records_path(tmp_path, "digits"), line)
    write_report(tmp_path, "digits", table, None)
    page = (tmp_path / "convergence-digits.md").read_text()
    assert "| vit-0.2 | 0.200 | 2.5e+02 (2.5) | 0.2-hash |" in page
    assert "| REPA | repa | vit-0.4 |  | 1.00× | 2.00× | 4.00× | 1.33× | 1 |" in page
    assert "| REPA | repa_weak | vit-0.2 |  | 1.00× | 0.97× | 0.94× | never | 1 |" in page
    assert "| start | start | vit-0.4 |  | 2.00× | 1.41× | 1.00× | 1.00× | 1 |" in page
    assert "| sit | alignment_weight 0.0 | 16.00 | never | 1 |" in page  # over the first lever
    assert "not_run" not in page and "Training the encoder" not in page
    for picture in ("scale", "levers"):
        assert (tmp_path / f"convergence-digits-{picture}.png").stat().st_size > 5_000


def test_every_arm_on_the_emoji_is_a_run_and_every_name_an_arm():
    table = convergence.read_table(RECIPES, "emoji")
    arms = table["arms"]
    base = yaml.safe_load((RECIPES / "emoji.yaml").read_text())
    for name, arm in arms.items():
        settings = {k: v for k, v in arm.items() if k not in convergence.NOT_FLAGS and v not in convergence.CONTROLS}
        config = convergence.parse_config(["--config", str(RECIPES / "emoji.yaml"), *convergence.to_flags(settings)])
        assert not any(base.get(key) == value for key, value in arm.items() if key != "alignment_weight"), name
        assert (config.warmup_steps > 0) == name.startswith("erw")
    named = [*(arm for question in table["questions"] for arm in question[1:]), *table["levers"], *table["drawn"]]
    for row in (*table["glance"], *([None, *shown] for shown in table["figures"].values())):
        named += row[1:]
    named += [table["scale"]["control"], *(arm for family in table["scale"]["arms"].values() for arm in family)]
    # None that nothing shows, but for those to choose by
    assert {name for name in arms if "_lr" not in name} <= set(named) <= set(arms)


@pytest.mark.parametrize(("data", "length"), [("digits", 200), ("digits-s2", 400)])
def test_every_arm_of_a_recipe_is_a_run_and_every_name_an_arm(data, length):
    table = convergence.read_table(RECIPES, data)
    arms = table["arms"]
    lengths = {name: arms[name]["warmup_steps"] for name in ("erw", "erw_warmup_0.25", "erw_warmup_2")}
    assert lengths == {"erw": length, "erw_warmup_0.25": length // 4, "erw_warmup_2": 2 * length}
    for name, arm in arms.items():
        if "best_of" in arm:
            assert set(arm["best_of"]) <= set(arms) and list(arm) == ["best_of"], name
            continue
        settings = {k: v for k, v in arm.items() if k not in convergence.NOT_FLAGS and v != "random"}
        convergence.parse_config(["--config", str(RECIPES / f"{data}.yaml"), *convergence.to_flags(settings)])
    records = load_records(records_path(REPOSITORY / "benchmarks" / "results", "digits"))
    best = {name: choose(records, arms[name]["best_of"]) for name in ("repa_best", "erw_best")}
    assert best == {
        "repa_best": "repa_lr4e-3",
        "erw_best": "erw_constant_lr4e-3",
    }  # what a row of the glance is named by
    for _, arm, control in table["questions"]:
        assert {arm, control} <= set(arms)
    for shown in (*table["figures"].values(), *(row[1:] for row in table["glance"]), table["drawn"]):
        assert set(shown) <= set(arms)
