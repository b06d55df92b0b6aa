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
"""Publishing the demo for a model on the Hub: `python -m erw_hf.hub.space --model user/model --space user/space`."""

import argparse
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard

from erw_hf.hub.upload import HUB_ERRORS, leave_silent_servers, prepare_repo, retry, upload


# Exists only in a checkout: the demo is not part of the wheel.
DEMO = Path(__file__).parents[3] / "spaces" / "erw"
FILES = ("app.py", "README.md", "requirements.txt")  # required


def publish_space(model: str, space: str, folder: Path = DEMO, private: bool = False) -> str:
    """Creates or updates a Space that serves a pushed pipeline, and returns its id with its namespace. Raises
    ValueError if the model is not a pipeline on the Hub, the demo is missing, or the Space cannot be pushed to."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {missing}: name the folder `spaces/erw` of a checkout with --folder")
    api = HfApi()
    if not retry(lambda: api.repo_exists(model) and api.file_exists(model, "model_index.json")):
        raise ValueError(f"{model} is not a pipeline on the Hub that this account can read: push it first")
    if retry(lambda: api.model_info(model)).private:
        print(f"{model} is private: give the Space a secret HF_TOKEN that can read it, in its settings")
    space = prepare_repo(space, private, repo_type="space", space_sdk="gradio")
    # Before the files, since they start the build.
    retry(lambda: api.add_space_variable(space, "ERW_MODEL", model))
    with tempfile.TemporaryDirectory() as name:
        demo = Path(name) / "demo"
        shutil.copytree(folder, demo, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        card = SpaceCard.load(demo / "README.md")
        card.data.models = [model]
        card.save(demo / "README.md")
        upload(demo, space, f"Demo of {model}", repo_type="space")
    return space


def main() -> None:
    """`python -m erw_hf.hub.space`."""
    parser = argparse.ArgumentParser(prog="python -m erw_hf.hub.space", description="Publish the demo of a model.")
    parser.add_argument("--model", required=True, help="Hub id of a pushed pipeline")
    parser.add_argument("--space", required=True, help="Hub id of the Space")
    parser.add_argument(
        "--folder", type=Path, default=DEMO, help="the demo's folder; spaces/erw of the checkout by default"
    )
    parser.add_argument("--hub_private", action="store_true", help="make the Space private")
    args = parser.parse_args()
    leave_silent_servers()
    try:
        print(f"published: {publish_space(args.model, args.space, args.folder, args.hub_private)}")
    except (ValueError, *HUB_ERRORS) as error:
        raise SystemExit(f"not published: {error}") from error


if __name__ == "__main__":
    main()
