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
"""The client of the Hub for everything that publishes: creates or checks a repo, uploads a folder, retries."""

import json
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, httpx, parse_ratelimit_headers  # type: ignore[attr-defined]  # httpx2 in version 2


RETRY_SECONDS = (2, 4, 8, 16, 32, 64)  # between attempts, on top of the client's own retries
SILENCE_SECONDS = 120  # otherwise the client waits for ever for a server that does not answer
# Error answers of the Hub and missing answers: HfHubHTTPError covers both.
HUB_ERRORS = (httpx.HTTPError, OSError)

Result = TypeVar("Result")


def prepare_repo(repo_id: str, private: bool = False, repo_type: str = "model", **kwargs: Any) -> str:
    """
    Creates a repo, or checks that it can be pushed to, and returns its id with its namespace. The trainer calls it
    before its first step. An existing repo stays as private as it is. `kwargs` are those of
    [`~huggingface_hub.HfApi.create_repo`].

    Raises:
        ValueError: if there is no token, no permission, no connection, or something else with this name.
    """
    try:
        return retry(lambda: _prepare_repo(HfApi(), repo_id, private, repo_type, **kwargs))
    except ValueError:
        raise
    except LocalTokenNotFoundError as error:
        raise ValueError("pushing to the Hub needs a token: `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise ValueError(f"the token does not allow pushing to {repo_id}: {error}") from error
        raise ValueError(f"the Hub does not accept pushes now: {error}") from error
    except HUB_ERRORS as error:
        raise ValueError(f"the Hub cannot be reached: {error}") from error


def _prepare_repo(api: HfApi, repo_id: str, private: bool, repo_type: str, **kwargs: Any) -> str:
    name = api.whoami()["name"]
    repo_id = repo_id if "/" in repo_id else f"{name}/{repo_id}"
    if not api.repo_exists(repo_id, repo_type=repo_type):
        for other in {"model", "dataset", "space"} - {repo_type}:
            if api.repo_exists(repo_id, repo_type=other):
                raise ValueError(f"{repo_id} is a {other} on the Hub, not a {repo_type}: choose another id")
    api.create_repo(repo_id, private=private or None, repo_type=repo_type, exist_ok=True, **kwargs)
    api.auth_check(repo_id, repo_type=repo_type, write=True)  # it exists, but may belong to someone else
    _check_content(api, repo_id, repo_type)
    return repo_id


def _check_content(api: HfApi, repo_id: str, repo_type: str) -> None:
    """Raises ValueError if the repo holds something of another kind, since a push replaces the content."""
    names = set(api.list_repo_files(repo_id, repo_type=repo_type)) - {".gitattributes", "README.md"}
    if repo_type == "model":
        same = not names.isdisjoint({"last-checkpoint/progress.json", "warmup/warmup.json", "warmup.json"})
        same = same or {"pytorch_lora_weights.safetensors", "config.yaml"} <= names  # a run's adapter
        if "model_index.json" in names:
            index = json.loads(Path(hf_hub_download(repo_id, "model_index.json")).read_text())
            same = "ERWPipeline" in index.get("_class_name", "")  # or ["pipeline", "ERWPipeline"]
    else:
        same = {
            "dataset": "cache.json" in names
            and all(name.startswith("data/") for name in names - {"cache.json", "latent_statistics.json"}),
            "space": {"app.py", "page.html", "style.css"} <= names,
        }[repo_type]
    if names and not same:
        raise ValueError(f"{repo_id} holds something else ({', '.join(sorted(names)[:3])}, ...): choose another id")


def retry(call: Callable[[], Result]) -> Result:
    """Makes a request to the Hub that is safe to repeat, and retries with growing pauses if that may help; raises what
    the last attempt raised."""
    for seconds in (*RETRY_SECONDS, None):
        try:
            return call()
        except (*HUB_ERRORS, RuntimeError) as error:  # RuntimeError: an upload failed in the client's threads
            response = error.response if isinstance(error, HfHubHTTPError) else None
            if response is not None:
                # 412: someone else has committed meanwhile.
                again = response.status_code in (408, 412, 429) or response.status_code >= 500
            else:
                again = not isinstance(error, (LocalTokenNotFoundError, OfflineModeIsEnabled))
            if seconds is None or not again:
                raise
            if response is not None:
                asked, limit = response.headers.get("Retry-After", ""), parse_ratelimit_headers(response.headers)
                seconds = max(seconds, int(asked)) if asked.isdigit() else seconds
                if response.status_code == 429 and limit is not None:  # its window is longer than all pauses together
                    seconds = max(seconds, limit.reset_in_seconds + 1)
            print(f"retrying in {seconds} s: {error}", file=sys.stderr, flush=True)
            time.sleep(seconds)
    raise AssertionError("unreachable")


def upload(folder: Path, repo_id: str, message: str, repo_type: str = "model", replaced: Collection[str] = ()) -> str:
    """Uploads a folder as one commit, retrying with growing pauses, and returns the commit's address. What is already
    on the Hub is not sent again. Files of the repo that the folder lacks are removed from each of its subfolders,
    and those in `replaced`."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    folders = tuple({name.split("/")[0] + "/" for name in paths if "/" in name})

    def commit() -> str:
        api = HfApi()
        there = api.list_repo_files(repo_id, repo_type=repo_type)
        stale = [name for name in there if name not in paths and (name.startswith(folders) or name in replaced)]
        operations: list[CommitOperationAdd | CommitOperationDelete | CommitOperationCopy] = [
            CommitOperationAdd(name, path) for name, path in paths.items()
        ]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(repo_id, operations, commit_message=message, repo_type=repo_type).commit_url

    return retry(commit)


def leave_silent_servers() -> None:
    """Makes the client of this process give up a request that gets no answer in `SILENCE_SECONDS`."""
    hooks = get_session().event_hooks
    set_client_factory(lambda: httpx.Client(event_hooks=hooks, follow_redirects=True, timeout=SILENCE_SECONDS))
