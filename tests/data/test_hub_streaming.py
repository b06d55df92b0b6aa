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
"""Training on a stream from a Hub that fails: what it survives, and how it ends where it cannot."""

import json
import re

import pytest
from helpers import TRAINING, check_ended, run_forked, run_ranks, short_pauses, write_shards
from loopback_hub import LoopbackHub
from PIL import Image

from erw_hf.trainer.run_record import read_metrics


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub:
        write_shards(tmp_path / "shards")
        hub.add_repo("datasets", "user/greys", tmp_path / "shards")
        yield hub


@pytest.fixture
def environment(hub, tmp_path):
    return hub.environment(tmp_path / "home") | short_pauses(tmp_path / "site", 10)


def launch(environment, flags, **variables):
    return run_ranks(2, *TRAINING, *flags, environment=environment | variables)


def losses(run):
    return [(record["step"], record["loss"]) for record in read_metrics(run / "metrics.jsonl")]


def test_two_processes_survive_a_failing_hub_with_the_same_losses(hub, environment, tmp_path, tiny_flags):
    """429, 500, 503, a hanging and a cut connection: nothing is lost, repeated or in another order."""
    flags = [*tiny_flags, "--dataset_name=user/greys", "--streaming"]
    check_ended(launch(environment, [*flags, f"--output_dir={tmp_path}/calm"]))
    parquet = r"/resolve/.*\.parquet"
    faults = [
        hub.fault(parquet, method="GET", status=429, retry_after=1),
        hub.fault(parquet, method="GET", status=500, after=2),
        hub.fault(parquet, method="GET", status=503, after=4, times=2),
        hub.fault(parquet, method="GET", hang=30, after=6),
        hub.fault(parquet, method="GET", cut_after=200, after=8),
        hub.fault(r"/api/datasets/user/greys", status=502),
    ]
    check_ended(launch(environment, [*flags, f"--output_dir={tmp_path}/stormy"], HF_HUB_DOWNLOAD_TIMEOUT="2"))
    assert all(fault.fired for fault in faults), [fault.fired for fault in faults]
    assert losses(tmp_path / "stormy") == losses(tmp_path / "calm")


def test_a_hub_that_stays_away_ends_all_processes_with_one_message_and_a_checkpoint(
    hub, environment, tmp_path, tiny_flags
):
    flags = [*tiny_flags, "--dataset_name=user/greys", "--streaming", "--stream_retry_seconds=3"]
    flags += ["--warmup_steps=1", "--max_train_steps=60", f"--output_dir={tmp_path}/run", "--train_batch_size=8"]
    # From the third file on: some steps are done by then.
    hub.fault(r"/resolve/.*\.parquet", method="GET", status=500, times=None, after=14)
    ranks = launch(environment, flags)
    assert all(rank.returncode != 0 for rank in ranks)
    said = "".join(rank.stderr for rank in ranks)
    messages = re.findall(r"RuntimeError: rank \d of 2 could not read its data, so all stop .*", said)
    assert len(messages) == 2 and len({re.sub(r"^\[rank\d\]: ", "", message) for message in messages}) == 1
    assert "no data for" in messages[0] and "retried for at most 3 s" in messages[0]
    assert "--resume_from_checkpoint latest" in said
    assert len(losses(tmp_path / "run")) > 0  # it had begun


def test_an_imagefolder_streams_from_the_hub(hub, environment, tmp_path):
    for i in range(4):
        (tmp_path / "folder" / "train" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(tmp_path / "folder" / "train" / "ab"[i % 2] / f"{i}.png")
    hub.add_repo("datasets", "user/folder", tmp_path / "folder")
    fault = hub.fault(r"/resolve/.*\.png", method="GET", status=503, times=8, after=1)  # more than the client tries
    code = """
import itertools
from erw_hf.data.samples import SampleMaker
from erw_hf.data.source import load_source
from erw_hf.data.streaming import StreamingSamples
source = load_source("user/folder", streaming=True)
maker = SampleMaker(source, 8, 1, (1, 8, 8), 0, 0.1, False)
samples = itertools.islice(StreamingSamples(maker, 1, 0), 4)
print(source.id2label, sorted(int(sample["pixels"][0, 0, 0]) for sample in samples))
"""
    result = run_forked("-c", code, environment=environment)
    assert result.stdout == "{0: 'a', 1: 'b'} [0, 1, 2, 3]\n", result.stderr[-3000:]
    assert fault.fired == 8


def test_what_a_folder_on_the_hub_loses_is_said(hub, environment, tmp_path):
    for name in ("bus", "car", "train", "cats/white", "cats/white/old"):
        repo = "cats" if "cats" in name else "cars"
        (tmp_path / repo / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / repo / name / "1.png")
    for repo in ("cars", "cats"):
        hub.add_repo("datasets", f"user/{repo}", tmp_path / repo)
    code = "from erw_hf.data.source import load_source\n"
    code += "for name in ('user/cars', 'user/cats'): print(load_source(name).num_classes)"
    result = run_forked("-c", code, environment=environment)
    assert result.stdout == "0\n0\n", result.stderr[-3000:]
    assert "2 of 3 images of user/cars are in no split and are not read (bus/1.png, car/1.png)" in result.stderr
    assert (
        "the images of user/cats lie in 2 folders (cats/white, cats/white/old), read without classes" in result.stderr
    )


def test_a_new_card_leaves_the_data_what_it_was_and_new_files_do_not(hub, environment, tmp_path):
    code = """
import json
from erw_hf.data.identity import data_identity
from erw_hf.data.source import load_source
print(json.dumps(data_identity(load_source("user/greys", streaming=True), "user/greys")))
"""

    def ask():
        return json.loads(run_forked("-c", code, environment=environment).stdout)

    before = ask()
    (tmp_path / "shards" / "README.md").write_text("# A card")
    hub.add_repo("datasets", "user/greys", tmp_path / "shards")
    assert ask() == before
    write_shards(tmp_path / "shards", rows=50)
    hub.add_repo("datasets", "user/greys", tmp_path / "shards")
    assert ask()["fingerprint"] != before["fingerprint"]


def test_gated_data_says_how_to_get_access(hub, environment, tmp_path):
    hub.add_repo("datasets", "ILSVRC/imagenet-1k", tmp_path / "shards", gated=True)
    code = "from erw_hf.data.source import load_source; load_source('ILSVRC/imagenet-1k', streaming=True)"
    result = run_forked("-c", code, environment=environment)
    assert "PermissionError" in result.stderr and "gated" in result.stderr and "hf auth login" in result.stderr
