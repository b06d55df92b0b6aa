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
"""Published checkpoints: the table, and a stand-in that is fetched from a loopback Hub, converted, drawn and compared."""

import json
import sys

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, run_forked, run_script
from loopback_hub import LoopbackHub
from test_convert import state_dict

from erw_hf.evaluation import published
from erw_hf.evaluation.published import PUBLISHED, SCHEDULERS, Published, build_published, list_published, verification


CLASSIFIER = REPOSITORY / "pipelines" / "digits-classifier"


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_entry_names_its_source_and_a_protocol_that_evaluate_knows(name, tmp_path):
    entry = PUBLISHED[name]
    assert entry.numbers and entry.source and entry.scheduler in SCHEDULERS
    assert entry.refused or entry.file.startswith("https://") != bool(entry.repo)
    text = (REPOSITORY / "training" / "evaluate.py").read_text()
    assert all(f'"--{flag}"' in text for flag in entry.settings)
    assert name in list_published() and entry.source in list_published()


@pytest.mark.parametrize("flags", [["--verify", "--list"], ["--verify", "list"], ["--list", "--verify"]])
def test_the_table_is_printed(flags, capsys):
    with pytest.raises(SystemExit) as end:
        run_script("evaluate", *flags)
    assert not end.value.code and "lightningdit-xl-1: fid 2.17" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--verify=sit-s-2"], "sit-s-2 is not one of sit-xl-2"),
        (["--verify"], "--verify --list prints the table"),
        (["--list", "--model=a", "--reference=b.npz"], "belong to --verify"),
        (["--checkpoint=a.pt", "--model=a", "--reference=b.npz"], "belong to --verify"),
        (["--verify=sit-xl-2", "--model=a"], "not allowed with"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_script("evaluate", *flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_what_is_not_on_the_hub_or_not_of_this_library_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="download https://.*SiT-XL-2-256.pt.* with --checkpoint"):
        build_published("sit-xl-2")
    with pytest.raises(ValueError, match="DDPM.*DiTPipeline"):
        build_published("dit-xl-2")


TINY = """
import json, runpy, sys
from erw_hf.evaluation import published

published.PUBLISHED["tiny"] = published.Published(**json.loads(sys.argv.pop(1)))
runpy.run_path("training/evaluate.py", run_name="__main__")
"""


def test_a_stand_in_is_fetched_converted_drawn_and_set_beside_its_number(tmp_path, vae_path):
    for name, content in {
        "tiny": state_dict(rope=True, rms=True, swiglu=True),
        "statistics": {"mean": torch.arange(4.0).reshape(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 2.0)},
    }.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / f"{name}.pt")
    np.savez(tmp_path / "r.npz", mu=np.zeros(64), sigma=np.eye(64))
    entry = {
        "repo": "user/tiny", "file": "tiny.pt", "numbers": {"fid": 5.0, "sfid": 1.0}, "source": "a paper", "scheduler": "euler",
        "scheduler_config": {"shift": 2.0}, "vae": "user/vae", "latent_statistics": ["user/statistics", "statistics.pt"],
        "protocol": {"num_samples": 6, "num_inference_steps": 2, "extractor": str(CLASSIFIER), "reference": "r.npz"},
        "architecture": {"num_attention_heads": 2}, "differs": ["the moon"], "unverified": ["the sun"], "remeasured": ["5.1"],
    }  # fmt: skip
    with LoopbackHub() as hub:
        for name, folder in (("tiny", tmp_path / "tiny"), ("statistics", tmp_path / "statistics"), ("vae", vae_path)):
            hub.add_repo("models", f"user/{name}", folder)
        flags = ["--verify=tiny", f"--reference={tmp_path}/r.npz", "--metrics=fid", "--seed=3", "--num_samples=5"]
        environment = hub.environment(tmp_path / "home") | {"ACCELERATE_USE_CPU": "true"}
        result = run_forked(
            "-c", TINY, json.dumps(entry), *flags, f"--output_dir={tmp_path}/out", environment=environment
        )
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["model"]["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert record["model"]["scheduler"]["shift"] == 2.0
    config = json.loads((tmp_path / "out" / "published-tiny" / "vae" / "config.json").read_text())
    assert config["latents_mean"] == [0, 1, 2, 3] and config["latents_std"] == [2] * 4
    assert (config["scaling_factor"], config["shift_factor"]) == (1.0, None)
    shown = result.stdout[result.stdout.index("published") :]
    assert "protocol: num_samples was 6, here it is 5" in shown and "num_inference_steps" not in shown
    for line in ("differs: the moon", "unverified: the sun", "remeasured: 5.1"):
        assert line in shown
    assert "sfid                             1            not measured" in shown and "errors" in shown
    assert record["settings"]["guidance_scale"] == 1.0 and record["settings"]["model"].endswith("published-tiny")


def test_each_name_and_file_has_its_own_pipeline(tmp_path, monkeypatch):
    """An evaluation that fails leaves it in the folder."""
    monkeypatch.setattr("sys.path", [str(REPOSITORY / "training"), *sys.path])
    import evaluate

    def model_of(*flags):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *flags, f"--output_dir={tmp_path}", "--reference=digits"])
        return evaluate.parse_arguments().model

    for name in ("a", "b"):
        (tmp_path / f"{name}.pt").write_text(name)
    flags = [["--verify=sit-xl-2"], ["--verify=repa-xl-2"]]
    flags += [["--verify=sit-xl-2", f"--checkpoint={tmp_path}/{name}.pt"] for name in ("a", "b")]
    assert len({model_of(*some) for some in flags}) == 4


def test_the_verdict_is_two_errors_wide(monkeypatch):
    monkeypatch.setitem(PUBLISHED, "tiny", Published("a/b", "c", {"fid": 5.0}, "a paper"))
    record = {
        "metrics": {"fid": 5.3},
        "errors": {"fid": 0.2},
        "bias": {},
        "settings": dict(PUBLISHED["tiny"].settings),
    }
    assert "within 2 errors" in verification("tiny", record) and "protocol" not in verification("tiny", record)
    assert "more than 2 errors apart" in verification("tiny", record | {"errors": {"fid": 0.1}})
    assert "no error" in verification("tiny", record | {"errors": {}})
    record["settings"]["reference"] = f"/somewhere/{published.ADM_FILE}"  # the same file
    assert "protocol" not in verification("tiny", record)
