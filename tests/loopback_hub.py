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
"""A Hub on 127.0.0.1, in memory, that the real huggingface_hub talks to, and that fails on demand.

    with LoopbackHub() as hub:
        hub.add_repo("datasets", "user/digits", folder)
        hub.fault(r"resolve/.*parquet", method="GET", status=503, times=3)
        subprocess.run(command, env={**os.environ, **hub.environment(tmp_path)})
        assert hub.count(r"/commit/", method="POST") == 1

It speaks what the client asks for: repos of models, datasets and Spaces, trees, ranged reads, pre-upload, LFS, commits,
branches, tags, gated and private repos. By default files come by LFS, as from clients without hf_xet: xet's own protocol
would bypass the faults injected here. With `xet_dir` they come by hf_xet, which then keeps its store in that folder; downloads are plain HTTP either way.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import re
import shutil
import socket
import struct
import tempfile
import threading
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_loopback"
READ_TOKEN = "hf_loopback_read"  # may not write
# What the real .gitattributes sends to LFS; the client asks which of its files that are.
LFS_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".npy", ".parquet", ".arrow", ".tar", ".zip",
    ".png", ".jpg", ".jpeg", ".webp", ".gif",
)  # fmt: skip
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """Content of a file."""

    data: bytes
    is_lfs: bool

    @property
    def git_oid(self) -> str:
        data = self.pointer if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        )


@dataclass(frozen=True)
class Commit:
    """One commit: its whole tree."""

    files: dict[str, Blob]
    title: str
    parent: str | None


@dataclass
class Repo:
    """A repo with its branches and tags, both name -> sha."""

    kind: str  # "models", "datasets" or "spaces"
    id: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # of a Space

    def commit(self, branch: str, files: dict[str, Blob], title: str) -> str:
        parent = self.branches.get(branch)
        sha = hashlib.sha1(f"{self.kind}/{self.id}/{branch}/{parent}/{title}/{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = Commit(files, title, parent)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision.removeprefix("refs/heads/")) or self.tags.get(revision)


@dataclass
class Fault:
    """What goes wrong, where and how often."""

    match: re.Pattern
    method: str | None
    status: int | None
    times: int | None
    after: int
    hang: float | None
    cut_after: int | None
    lose_answer: bool
    retry_after: int | None
    fired: int = 0
    released: threading.Event = field(default_factory=threading.Event)  # set, it ends what hangs


class HubError(Exception):
    """An answer of another status than 2xx."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class LoopbackHub:
    """
    The server and its state; a context manager.

    Args:
        user (`str`, *optional*, defaults to `"user"`): Who the tokens belong to.
        organizations (`tuple[str]`, *optional*, defaults to `("team",)`): Where this user may write too.
        port (`int`, *optional*, defaults to 0): Port; 0 for a free one.
        xet_dir (`Path`, *optional*): Folder of a xet store; without it clients are told to upload by LFS.
    """

    def __init__(
        self,
        user: str = "user",
        organizations: tuple[str, ...] = ("team",),
        port: int = 0,
        xet_dir: Path | None = None,
    ) -> None:
        self.user, self.organizations, self.xet_dir = user, organizations, xet_dir
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []  # method, path with query, status (0: no answer)
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False  # a hanging request must not hang the test's end
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "LoopbackHub":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables for a process that shall use this Hub (they are read at import), with its caches in `home`."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_DATASETS_CACHE": str(Path(home) / "datasets"),
            "HF_MODULES_CACHE": str(Path(home) / "modules"),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1" if self.xet_dir is None else "0",
            "HF_XET_CACHE": str(Path(home) / "xet"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return variables

    def add_repo(
        self, kind: str, repo_id: str, folder: Path | None = None, private: bool = False, gated: bool = False
    ) -> Repo:
        """Makes a repo of "models", "datasets" or "spaces", with the files of a folder."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private, gated)
        files = {}
        if folder is not None:
            paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
            files = {str(path.relative_to(folder)): _blob(path.name, path.read_bytes()) for path in paths}
        repo.commit("main", files, "initial commit")
        return repo

    def files(self, kind: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of each file of a repo."""
        repo = self.repos[kind, repo_id]
        return {path: blob.data for path, blob in repo.commits[repo.resolve(revision)].files.items()}

    def fault(
        self,
        match: str,
        method: str | None = None,
        status: int | None = None,
        times: int | None = 1,
        after: int = 0,
        hang: float | None = None,
        cut_after: int | None = None,
        lose_answer: bool = False,
        retry_after: int | None = None,
    ) -> Fault:
        """
        Makes requests fail.

        Args:
            match (`str`): Regular expression that is searched in the path with its query.
            method (`str`, *optional*): HTTP method; any by default.
            status (`int`, *optional*): Answer with this status, having done nothing.
            times (`int`, *optional*, defaults to 1): Requests that fail; `None` for all.
            after (`int`, *optional*, defaults to 0): Matching requests that pass first.
            hang (`float`, *optional*): Seconds to wait first, unless it is `released` before. Alone it only delays.
            cut_after (`int`, *optional*): Close the connection after so many bytes of the body, of the request if it
                has one, else of the answer.
            lose_answer (`bool`, *optional*, defaults to `False`): Do what was asked, and close without an answer.
            retry_after (`int`, *optional*): Seconds in the header of that name.
        """
        fault = Fault(re.compile(match), method, status, times, after, hang, cut_after, lose_answer, retry_after)
        with self.lock:
            self.faults.append(fault)
        return fault

    def count(self, match: str, method: str | None = None) -> int:
        """Requests so far whose path matches."""
        with self.lock:
            return sum(
                bool(re.search(match, path)) and method in (None, verb) for verb, path, _ in list(self.requests)
            )

    def read_xet(self) -> None:
        """Takes what hf_xet has stored: each file that a shard of the store names."""
        import hf_xet

        files = {}
        for shard in (self.xet_dir / "xet" / "xorbs" / "shards").glob("*.mdb"):
            files |= _read_shard(shard.read_bytes())
        new = {sha256: file for sha256, file in files.items() if sha256 not in self.lfs}
        with tempfile.TemporaryDirectory() as name:
            # The client holds a lock on the store while it waits for our answer, but not on a copy.
            copy = shutil.copytree(self.xet_dir, Path(name) / "store")
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                for sha256, (xet_hash, size) in new.items():
                    group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), f"{name}/{sha256}")
            self.lfs |= {sha256: Path(name, sha256).read_bytes() for sha256 in new}

    def _take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method in (None, method) and fault.match.search(path):
                    if fault.after > 0:
                        fault.after -= 1
                    elif fault.times is None or fault.fired < fault.times:
                        fault.fired += 1
                        return fault
        return None


class _Cut(Exception):
    """The connection is to be closed now."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, BrokenPipeError):  # clients that are killed
            super().handle()

    def do_GET(self) -> None:
        fault, status = self.hub._take_fault(self.command, self.path), 0
        try:
            if fault is not None and fault.hang is not None:
                fault.released.wait(fault.hang)
            cut = fault.cut_after if fault is not None else None
            body = self._read_body(cut)
            if fault is not None and fault.status is not None:
                headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                status, headers, answer = fault.status, headers, b"injected"
            else:
                status, headers, answer = self._answer(body)
            if fault is not None and fault.lose_answer:
                status = 0
                raise _Cut
            self._send(status, headers, answer, cut)
        except _Cut:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            with self.hub.lock:
                self.hub.requests.append((self.command, self.path, status))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self, cut: int | None) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while (size := int(self.rfile.readline().split(b";")[0], 16)) > 0:
                body += self.rfile.read(size)
                self.rfile.readline()
                if cut is not None and len(body) >= cut:
                    raise _Cut
            self.rfile.readline()
            return body
        length = int(self.headers.get("Content-Length") or 0)
        if cut is not None and length > 0:
            self.rfile.read(min(cut, length))
            raise _Cut
        return self.rfile.read(length)

    def _send(self, status: int, headers: dict[str, str], answer: bytes, cut: int | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value.replace("\n", " "))
        if "Content-Length" not in headers:  # a HEAD's answer says how long the GET's would be
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer if cut is None else answer[:cut])
        if cut is not None:
            raise _Cut
        self.wfile.flush()

    def _answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(self.path)
        try:
            result = self._route(url.path, parse_qs(url.query), body)
        except HubError as error:
            answer = json.dumps({"error": error.message}).encode()
            return error.status, {"Content-Type": "application/json", **error.headers}, answer
        if isinstance(result, tuple):
            return result
        return 200, {"Content-Type": "application/json"}, json.dumps(result).encode()

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> object:
        method = self.command
        if path == "/api/whoami-v2":
            return self._whoami()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/repos/delete":
            asked = json.loads(body)
            repo = self._repo(f"{asked.get('type') or 'model'}s", self._full_name(asked), write=True)
            del self.hub.repos[repo.kind, repo.id]
            return {}
        if path == "/api/validate-yaml":
            return _validate_yaml(**json.loads(body))
        if path == "/api/agent-harnesses":
            return {}
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self._lfs_content(match[1], body)
        if path == "/lfs-verify":
            if json.loads(body)["oid"] not in self.hub.lfs:
                raise HubError(404, "no such object")
            return {}
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repo(match[1] or "models", match[2], write=True)
            return self._lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1] or "models", match[2], unquote(match[3]), unquote(match[4]))
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.*))?", path):
            kind, repo_id, rest = match[1], match[2], [unquote(part) for part in (match[3] or "").split("/") if part]
            return self._api(method, kind, repo_id, rest, query, body)
        if match := re.fullmatch(r"/api/(models|datasets|spaces)", path):
            return [
                _info(repo, repo.branches["main"], False)
                for (kind, _), repo in self.hub.repos.items()
                if kind == match[1]
            ]
        raise HubError(404, f"the loopback Hub knows no {method} {path}")

    # Who asks, and what they may

    def _token(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in (TOKEN, READ_TOKEN):
            raise HubError(401, "Invalid credentials in Authorization header")
        return token or None

    def _whoami(self) -> dict:
        token = self._token()
        if token is None:
            raise HubError(401, "Invalid username or password.")
        role = "write" if token == TOKEN else "read"
        return {
            "type": "user",
            "name": self.hub.user,
            "fullname": self.hub.user,
            "orgs": [{"type": "org", "name": name, "roleInOrg": "write"} for name in self.hub.organizations],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }

    def _full_name(self, asked: dict) -> str:
        return f"{asked.get('organization') or self.hub.user}/{asked['name'].split('/')[-1]}"

    def _may_write(self, repo_id: str) -> bool:
        return self._token() == TOKEN and repo_id.split("/")[0] in (self.hub.user, *self.hub.organizations)

    def _repo(self, kind: str, repo_id: str, write: bool = False, content: bool = False) -> Repo:
        token, repo = self._token(), self.hub.repos.get((kind, repo_id))
        if (
            repo is None
            or repo.private
            and not (token and repo_id.split("/")[0] in (self.hub.user, *self.hub.organizations))
        ):
            # The Hub does not tell whether a private repo exists.
            message = "Repository not found" if token else "Invalid username or password."
            raise HubError(404 if token else 401, message, "RepoNotFound")
        if write and not self._may_write(repo_id):
            if token is None:
                raise HubError(401, "Invalid username or password.")
            raise HubError(403, f"Forbidden: pass a token with write access to {repo_id}")
        if content and repo.gated and not self._may_write(repo_id):
            message = f"Access to {kind[:-1]} {repo_id} is restricted and you are not in the authorized list."
            raise HubError(403 if token else 401, message, "GatedRepo")
        return repo

    def _revision(self, repo: Repo, revision: str) -> tuple[str, Commit]:
        sha = repo.resolve(revision)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # Repos

    def _create(self, asked: dict) -> dict:
        kind, repo_id = f"{asked.get('type') or 'model'}s", self._full_name(asked)
        token = self._token()
        if token is None:
            raise HubError(401, "Invalid username or password.")
        if not self._may_write(repo_id):
            raise HubError(
                403,
                f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{repo_id.split("/")[0]}"',
            )
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        with self.hub.lock:
            if (kind, repo_id) in self.hub.repos:
                error = {"error": f"You already created this {kind[:-1]} repo: {repo_id}", "url": url}
                return 409, {"Content-Type": "application/json"}, json.dumps(error).encode()
            private = asked.get("private") or asked.get("visibility") == "private"
            repo = self.hub.add_repo(kind, repo_id, private=bool(private))
            repo.sdk = asked.get("sdk")
        return {"url": url, "name": repo_id, "id": repo_id}

    def _api(
        self, method: str, kind: str, repo_id: str, rest: list[str], query: dict[str, list[str]], body: bytes
    ) -> object:
        what, argument = (rest[0] if rest else ""), "/".join(rest[1:])
        writes = method in ("POST", "PUT", "DELETE") and what != "paths-info" or what == "xet-write-token"
        checks_write = what == "auth-check" and argument == "write"
        repo = self._repo(kind, repo_id, write=writes or checks_write, content=what in ("paths-info", "auth-check"))
        if what == "auth-check":
            return {}
        if what in ("", "revision") and method == "GET":
            return _info(repo, self._revision(repo, argument or "main")[0], "blobs" in query)
        if what == "tree":
            return self._tree(repo, rest[1], "/".join(rest[2:]), query.get("recursive") in (["true"], ["True"]))
        if what == "paths-info":
            return self._paths_info(repo, argument, body)
        if what == "refs":
            refs = {
                name: [{"name": n, "ref": f"refs/{prefix}/{n}", "targetCommit": sha} for n, sha in table.items()]
                for name, prefix, table in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
            }
            return {**refs, "converts": [], "pullRequests": []}
        if what == "commits":
            sha, found = self._revision(repo, argument)[0], []
            while sha is not None:
                found.append({"id": sha, "title": repo.commits[sha].title, "message": "", "date": DATE, "authors": []})
                sha = repo.commits[sha].parent
            return found
        if what == "branch":
            if method == "DELETE":
                repo.branches.pop(argument)
            elif argument in repo.branches:
                raise HubError(409, f"Reference already exists: {argument}")
            else:
                start = json.loads(body or b"{}").get("startingPoint") or "main"
                repo.branches[argument] = self._revision(repo, start)[0]
            return {}
        if what == "tag":
            repo.tags[json.loads(body)["tag"]] = self._revision(repo, argument)[0]
            return {}
        if what == "preupload":
            return {"files": [self._upload_mode(repo, argument, file) for file in json.loads(body)["files"]]}
        if what == "commit":
            return self._commit(repo, argument, body)
        if what in ("xet-write-token", "xet-read-token") and self.hub.xet_dir is not None:
            headers = {
                "X-Xet-Cas-Url": f"local://{self.hub.xet_dir}",
                "X-Xet-Access-Token": "token",
                "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
            }
            answer = {"casUrl": headers["X-Xet-Cas-Url"], "accessToken": "token", "exp": int(time.time()) + 3600}
            return 200, {"Content-Type": "application/json", **headers}, json.dumps(answer).encode()
        if what == "settings":
            settings = json.loads(body)
            repo.private = settings.get("private", settings.get("visibility", "") == "private")
            return {"private": repo.private}
        if what == "variables":
            if method == "POST":
                variable = json.loads(body)
                repo.variables[variable["key"]] = variable["value"]
            return {key: {"value": value} for key, value in repo.variables.items()}
        raise HubError(404, f"the loopback Hub knows no {method} {self.path}")

    def _tree(self, repo: Repo, revision: str, folder: str, recursive: bool) -> list[dict]:
        _, commit = self._revision(repo, revision)
        prefix, entries = f"{folder}/" if folder else "", {}
        for path, blob in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                parent = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(parent.encode()).hexdigest()
                entries.setdefault(parent, {"type": "directory", "oid": oid, "size": 0, "path": parent})
            if recursive or len(parts) == 1:
                entries[path] = _entry(path, blob)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return list(entries.values())

    def _paths_info(self, repo: Repo, revision: str, body: bytes) -> list[dict]:
        _, commit = self._revision(repo, revision)
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(body)["paths"]
        else:
            paths = parse_qs(body.decode())["paths"]
        found = []
        for path in paths:
            if path in commit.files:
                found.append(_entry(path, commit.files[path]))
            elif any(name.startswith(f"{path.rstrip('/')}/") for name in commit.files):
                oid = hashlib.sha1(path.encode()).hexdigest()
                found.append({"type": "directory", "oid": oid, "size": 0, "path": path})
        return found

    # Uploads

    def _upload_mode(self, repo: Repo, revision: str, file: dict) -> dict:
        _, commit = self._revision(repo, revision)
        existing = commit.files.get(file["path"])
        answer = {
            "path": file["path"],
            "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10 * 2**20 else "regular",
            "shouldIgnore": False,
        }
        if existing is not None:
            answer["oid"] = existing.sha256 if existing.is_lfs else existing.git_oid
        return answer

    def _lfs_batch(self, asked: dict) -> object:
        objects = []
        for item in asked["objects"]:
            if item["oid"] in self.hub.lfs:  # uploaded already: nothing to do
                objects.append(item)
                continue
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs-verify"},
            }
            objects.append({**item, "authenticated": True, "actions": actions})
        answer = json.dumps({"transfer": "basic", "objects": objects}).encode()
        return 200, {"Content-Type": "application/vnd.git-lfs+json"}, answer

    def _lfs_content(self, oid: str, body: bytes) -> dict:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "the content is not what its name says")
        self.hub.lfs[oid] = body
        return {}

    def _commit(self, repo: Repo, revision: str, body: bytes) -> dict:
        with self.hub.lock:
            head, commit = self._revision(repo, revision)
            files, title = dict(commit.files), ""
            for line in body.splitlines():
                item = json.loads(line)
                key, value = item["key"], item["value"]
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, head):
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.lfs and self.hub.xet_dir is not None:
                        self.hub.read_xet()
                    if value["oid"] not in self.hub.lfs:
                        raise HubError(400, f"LFS object {value['oid']} was not uploaded")
                    files[value["path"]] = Blob(self.hub.lfs[value["oid"]], True)
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise HubError(400, f"no file {value['path']} to delete")
                elif key == "deletedFolder":
                    prefix = value["path"].rstrip("/") + "/"
                    files = {path: blob for path, blob in files.items() if not path.startswith(prefix)}
                else:
                    raise HubError(400, f"the loopback Hub knows no operation {key}")
            if (card := files.get("README.md")) is not None and card != commit.files.get("README.md"):
                _validate_yaml(card.data.decode(), repo.kind[:-1])
            sha = repo.commit(revision, files, title)
        url = f"{self.hub.url}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.id}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""}

    # Reading

    def _resolve(self, kind: str, repo_id: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        repo = self._repo(kind, repo_id, content=True)
        sha, commit = self._revision(repo, revision)
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        etag = f'"{blob.sha256 if blob.is_lfs else blob.git_oid}"'
        headers = {
            "ETag": etag,
            "X-Repo-Commit": sha,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "Last-Modified": formatdate(0, usegmt=True),
        }
        if blob.is_lfs:
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(blob.data))}
        size = len(blob.data)
        if self.command == "HEAD":
            return 200, {**headers, "Content-Length": str(size)}, b""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None or match[0] == "bytes=-":
            return 200, headers, blob.data
        first = int(match[1]) if match[1] else max(size - int(match[2]), 0)
        last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
        if first >= size:
            raise HubError(416, "Requested range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return 206, headers, blob.data[first : last + 1]


def _blob(name: str, data: bytes) -> Blob:
    return Blob(data, name.endswith(LFS_SUFFIXES))


def _read_shard(data: bytes) -> dict[str, tuple[str, int]]:
    """sha256 -> xet hash and size of the files that a shard describes, in records of 48 bytes after as long a header."""

    def hexadecimal(record: bytes) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack("<4Q", record[:32]))

    found, position = {}, 48
    while data[position : position + 32] != b"\xff" * 32:  # the end of the list of files
        xet_hash = hexadecimal(data[position:])
        flags, segments = struct.unpack("<II", data[position + 32 : position + 40])
        sizes = [struct.unpack_from("<I", data, position + 48 * (i + 1) + 36)[0] for i in range(segments)]
        position += 48 * (1 + segments * (2 if flags & 1 << 31 else 1))  # each with its verification
        if flags & 1 << 30:
            found[hexadecimal(data[position:])] = xet_hash, sum(sizes)
            position += 48
    return found


def _entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "oid": blob.git_oid, "size": len(blob.data), "path": path}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def _card_data(text: str) -> dict:
    match = re.match(r"---\n(.*?)\n---", text, flags=re.S)
    return (yaml.safe_load(match[1]) if match else None) or {}


def _info(repo: Repo, sha: str, with_blobs: bool) -> dict:
    files = repo.commits[sha].files
    card = _card_data(files["README.md"].data.decode()) if "README.md" in files else {}
    siblings = [
        {
            "rfilename": path,
            **({k: v for k, v in _entry(path, blob).items() if k in ("size", "lfs")} if with_blobs else {}),
        }
        for path, blob in sorted(files.items())
    ]
    info = {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": sha,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "cardData": card,
        "siblings": siblings,
        "createdAt": DATE,
        "lastModified": DATE,
    }
    if repo.kind == "models":
        info |= {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}
    if repo.kind == "spaces":
        info["sdk"] = card.get("sdk", repo.sdk)
    return info


def _validate_yaml(content: str, repoType: str = "model") -> dict:  # noqa: N803, as the client sends it
    """Some of the Hub's rules, those that are documented."""
    errors = []
    try:
        data = _card_data(content)
    except yaml.YAMLError as error:
        data, errors = {}, [f"invalid YAML: {error}"]
    for name in ("tags",):
        if not isinstance(data.get(name, []), list):
            errors.append(f'"{name}" must be an array')
    for name in ("pipeline_tag", "library_name", "license_name", "title", "emoji"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for name in ("datasets", "base_model"):
        for repo_id in [data[name]] if isinstance(data.get(name), str) else data.get(name) or []:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
                errors.append(f'"{name}" with value "{repo_id}" is not valid. Use a model id from hf.co/models.')
    if data.get("license") == "other" and "license_name" not in data:
        errors.append('"license_name" is required with license: other')
    for entry in data.get("model-index") or []:
        if "name" not in entry or not isinstance(entry.get("results"), list):
            errors.append('"model-index" needs a name and results')
            continue
        for result in entry["results"]:
            if "type" not in result.get("task", {}) or not {"type", "name"} <= set(result.get("dataset", {})):
                errors.append('"model-index" results need task.type, dataset.type and dataset.name')
            for metric in result.get("metrics", []):
                if not {"type", "value"} <= set(metric):
                    errors.append('"model-index" metrics need type and value')
    if repoType == "space":
        if data.get("sdk") not in ("gradio", "docker", "static", "streamlit"):
            errors.append('"sdk" must be one of [gradio, docker, static]')
        colors = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
        errors += [
            f'"{n}" must be one of {colors}' for n in ("colorFrom", "colorTo") if data.get(n, "red") not in colors
        ]
        if len(data.get("short_description", "")) > 60:
            errors.append('"short_description" length must be less than or equal to 60 characters long')
    if errors:
        raise HubError(400, "; ".join(errors))
    return {"errors": [], "warnings": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "repos", nargs="*", help="kind/user/name=folder, for instance datasets/user/digits=/tmp/digits"
    )
    args = parser.parse_args()
    with LoopbackHub(port=args.port) as hub:
        for repo in args.repos:
            name, folder = repo.split("=", 1)
            hub.add_repo(*name.split("/", 1), folder)
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_OFFLINE=0 HF_HUB_DISABLE_XET=1", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
