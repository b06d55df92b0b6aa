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
"""The loopback Hub against the real client, which reads its address at import: so each test has a process of its own."""

import os
import subprocess
import sys

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from helpers import HANGS
from loopback_hub import READ_TOKEN, LoopbackHub
from PIL import Image as PILImage


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def python(hub, home, code, *arguments, token="hf_loopback"):
    environment = {**os.environ, **hub.environment(home, token)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


MODEL_ROUND_TRIP = """
import os, sys
from huggingface_hub import HfApi, CommitOperationAdd, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError
api = HfApi()
assert api.whoami()["name"] == "user"
assert api.create_repo("user/m", exist_ok=True).repo_id == "user/m"
first = api.upload_folder(repo_id="user/m", folder_path=sys.argv[1], commit_message="one")
api.create_repo("user/m", exist_ok=True)  # answered 409
api.upload_file(path_or_fileobj=b"later", path_in_repo="b/later.txt", repo_id="user/m", commit_message="two")
folder = snapshot_download("user/m")
assert open(f"{folder}/model.safetensors", "rb").read() == bytes(range(256)) * 1000
assert open(f"{folder}/b/later.txt").read() == "later"
assert not os.path.exists(snapshot_download("user/m", revision=first.oid) + "/b/later.txt")
assert api.model_info("user/m").library_name == "diffusers"
assert [commit.title for commit in api.list_repo_commits("user/m")] == ["two", "one", "initial commit"]
paths = {entry.path: entry for entry in api.list_repo_tree("user/m", recursive=True)}
assert set(paths) == {"README.md", "model.safetensors", "b", "b/later.txt"} and paths["model.safetensors"].lfs.size == 256000
assert [entry.path for entry in api.get_paths_info("user/m", ["b/later.txt", "nothing"])] == ["b/later.txt"]
api.create_branch("user/m", branch="side")
api.delete_file("b/later.txt", "user/m", revision="side")
assert {ref.name for ref in api.list_repo_refs("user/m").branches} == {"main", "side"}
assert not api.file_exists("user/m", "b/later.txt", revision="side") and api.file_exists("user/m", "b/later.txt")
for error, call in (
    (RepositoryNotFoundError, lambda: api.model_info("user/none")),
    (RevisionNotFoundError, lambda: api.model_info("user/m", revision="none")),
    (EntryNotFoundError, lambda: hf_hub_download("user/m", "none")),
    (HfHubHTTPError, lambda: api.create_repo("stranger/m")),
):
    try:
        call()
    except error:
        continue
    raise AssertionError(error)
try:
    api.create_commit("user/m", [CommitOperationAdd("c", b"c")], commit_message="stale", parent_commit=first.oid)
except HfHubHTTPError as error:
    assert error.response.status_code == 412
else:
    raise AssertionError("a stale parent was taken")
"""


def test_models_are_pushed_and_pulled(hub, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# A model\n")
    python(hub, tmp_path / "home", MODEL_ROUND_TRIP, folder)
    assert hub.count("/lfs/", method="PUT") == 1  # the text files went with the commit


def test_the_same_through_xet(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# A model\n")
    with LoopbackHub(xet_dir=tmp_path / "xet") as hub:
        python(hub, tmp_path / "home", MODEL_ROUND_TRIP, folder)
        assert hub.count("xet-write-token") > 0 and hub.count("/lfs/") == 0


def test_spaces_and_cards(hub, tmp_path):
    code = """
from huggingface_hub import HfApi, ModelCard
api = HfApi()
api.create_repo("user/s", repo_type="space", space_sdk="gradio")
api.add_space_variable("user/s", "ERW_MODEL", "user/m")
api.upload_file(path_or_fileobj=b"---\\nsdk: gradio\\n---\\n", path_in_repo="README.md", repo_id="user/s", repo_type="space")
assert api.space_info("user/s").sdk == "gradio"
ModelCard("---\\nlicense: mit\\ntags: [a]\\n---\\n").validate()
try:
    ModelCard("---\\nlicense: mit\\ndatasets: [no id]\\n---\\n").validate()
except ValueError as error:
    assert "datasets" in str(error)
else:
    raise AssertionError
"""
    python(hub, tmp_path, code)
    assert hub.repos["spaces", "user/s"].variables == {"ERW_MODEL": "user/m"}


STREAM = """
from datasets import load_dataset
stream = load_dataset("user/data", split="train", streaming=True)
assert stream.num_shards == 3, stream.num_shards
rows = list(stream)
assert [row["label"] for row in rows] == [i % 3 for i in range(30)]
assert [row["image"].getpixel((0, 0)) for row in rows] == list(range(30))
"""


def test_parquet_shards_stream_and_survive_faults(hub, tmp_path):
    (tmp_path / "data").mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=list("abc"))})
    for shard in range(3):
        numbers = range(10 * shard, 10 * shard + 10)
        rows = {"image": [PILImage.new("L", (8, 8), i) for i in numbers], "label": [i % 3 for i in numbers]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"data/train-{shard:05d}-of-00003.parquet")
    hub.add_repo("datasets", "user/data", tmp_path / "data")
    unavailable = hub.fault(r"resolve/.*parquet", method="GET", status=503, times=2)
    limited = hub.fault(r"resolve/.*parquet", method="GET", status=429, after=2, retry_after=1)
    python(hub, tmp_path / "home", STREAM)
    assert (unavailable.fired, limited.fired) == (2, 1)
    assert hub.count(r"resolve/.*parquet", method="GET") >= 3 + 3


def test_a_cut_download_is_not_taken_for_the_file(hub, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "weights.bin").write_bytes(b"x" * 2**20)
    hub.add_repo("models", "user/m", tmp_path / "m")
    cut = hub.fault("resolve/main/weights.bin", method="GET", cut_after=1000)
    code = """
from huggingface_hub import hf_hub_download
assert len(open(hf_hub_download("user/m", "weights.bin"), "rb").read()) == 2**20
"""
    python(hub, tmp_path / "home", code)
    assert cut.fired == 1


def test_gated_private_and_read_only(hub, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    hub.add_repo("models", "other/gated", tmp_path / "m", gated=True)
    hub.add_repo("models", "other/private", tmp_path / "m", private=True)
    code = """
import sys
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
for expected, call in (
    (GatedRepoError, lambda: hf_hub_download("other/gated", "config.json")),
    (RepositoryNotFoundError, lambda: HfApi().model_info("other/private")),
    (HfHubHTTPError, lambda: HfApi().create_repo("user/m")),
):
    try:
        call()
    except expected as error:
        print(type(error).__name__, error.response.status_code)
"""
    said = "GatedRepoError {}\nRepositoryNotFoundError {}\nHfHubHTTPError {}\n"
    assert python(hub, tmp_path / "home", code, token=READ_TOKEN) == said.format(403, 404, 403)
    assert python(hub, tmp_path / "home", code, token=None) == said.format(401, 401, 401)


def test_a_lost_answer_hangs_and_for_ever(hub, tmp_path):
    hub.add_repo("models", "user/m")
    lost = hub.fault("/commit/main", method="POST", lose_answer=True)
    slow = hub.fault("/preupload/", hang=0.5)
    for_ever = hub.fault("/api/models/user/m/refs", status=500, times=None)
    code = """
from huggingface_hub import HfApi
for call in (
    lambda: HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="user/m"),
    lambda: HfApi().list_repo_refs("user/m"),
    lambda: HfApi().list_repo_refs("user/m"),
):
    try:
        call()
    except Exception as error:
        print(type(error).__name__)
"""
    said = python(hub, tmp_path, code).split()
    assert said == ["RemoteProtocolError", "HfHubHTTPError", "HfHubHTTPError"]
    assert (lost.fired, slow.fired, for_ever.fired) == (1, 1, 2)
    assert hub.files("models", "user/m") == {"x": b"x"}  # done, but the client was not told
