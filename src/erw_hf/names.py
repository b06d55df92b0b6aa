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
"""Paths and Hub ids as users write them: `~` and `$HOME`, and what can only be a path that was mistyped."""

import argparse
import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path


def expand_path(text: str, folder: Path | None = None) -> str:
    """
    The same path or Hub id with `~` and variables of the environment filled in, as a shell does; a path with a leading
    dot starts in `folder`.

    Raises:
        ValueError: for a variable that is not set, or a user that this machine does not have.
    """
    if Path(text).exists() and folder is None:
        return text
    expanded = os.path.expanduser(os.path.expandvars(text.strip()))
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise ValueError(f"{text!r} names ${unset[1]}, which is not set")
    if expanded.startswith("~"):
        raise ValueError(f"{text!r} names the home of a user that this machine does not have")
    if folder is not None and expanded.startswith(("./", "../")):
        return os.path.normpath(folder / expanded)
    return expanded


def may_be_hub_id(name: str) -> bool:
    """Whether a name consists of one or two words, and the first is not a folder here."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) is not None
    return is_id and not os.path.isdir(name.split("/")[0])


def names_hub_file(name: str) -> bool:
    """Whether a name is a folder or file in a Hub repo, `owner/repo/folder`, and its first word is not a folder here, nor one
    where runs usually go."""
    is_deep = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+){2,}", name) is not None
    return is_deep and name.split("/")[0] not in ("outputs", "runs") and not os.path.isdir(name.split("/")[0])


def resolve_name(name: str, key: str) -> str:
    """
    A local path or Hub id, expanded by [`expand_path`]; `key` is what it was given for, for the message.

    Raises:
        ValueError: see [`expand_path`].
        FileNotFoundError: for what can only be a local path, and does not exist: the Hub need not be asked.
    """
    expanded = expand_path(name)
    on_hub = may_be_hub_id(expanded) or "://" in expanded or (key == "init_from" and names_hub_file(expanded))
    if os.path.exists(expanded) or (not os.path.lexists(expanded) and on_hub):
        return expanded
    kind = "file" if expanded.endswith((".npz", ".pt", ".pth", ".ckpt", ".safetensors")) else "folder"
    raise FileNotFoundError(f"{key}={name!r}: there is no {kind} {os.path.abspath(expanded)}{alike(expanded)}")


def resolve_pipeline(name: str, key: str) -> str:
    """[`resolve_name`] of a Hub id, a pipeline's folder, or that of a run, whose pipeline is in `pipeline`; ValueError for
    a folder without one."""
    resolved = resolve_name(name, key)
    if not os.path.isdir(resolved):
        return resolved
    for folder in (resolved, os.path.join(resolved, "pipeline")):
        if os.path.isfile(os.path.join(folder, "model_index.json")):
            return folder
    raise ValueError(
        f"{key}={name!r} holds no pipeline: there is no model_index.json in {resolved} or its folder `pipeline`"
    )


def resolve_flags(
    parser: argparse.ArgumentParser,
    flags: argparse.Namespace,
    paths: Iterable[str],
    names: Iterable[str] = (),
    pipelines: Iterable[str] = (),
) -> None:
    """Expands in place the flags that hold a path, there or not (`paths`), a Hub id or a path that is there, or a list of
    `NAME=ID` (`names`), or what [`resolve_pipeline`] reads (`pipelines`); ends the program for a name that can only be a
    mistyped path."""
    try:
        for flag in paths:
            value = getattr(flags, flag)
            if isinstance(value, list):
                value[:] = map(expand_path, value)
            elif value is not None:
                setattr(flags, flag, type(value)(expand_path(str(value))))
        for flag in names:
            value = getattr(flags, flag)
            if isinstance(value, str):
                setattr(flags, flag, resolve_name(value, f"--{flag}"))
            elif value is not None:
                parts = [text.partition("=") for text in value]
                value[:] = [
                    f"{name}{equals}{path and resolve_name(path, f'--{flag} {name}')}" for name, equals, path in parts
                ]
        for flag in pipelines:
            if getattr(flags, flag) is not None:
                setattr(flags, flag, resolve_pipeline(getattr(flags, flag), f"--{flag}"))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def alike(path: str) -> str:
    """As advice, a folder beside a path that does not exist, of nearly its name; empty if there is none."""
    parent, name = os.path.split(path.rstrip("/"))
    folders = (
        [entry.name for entry in os.scandir(parent or ".") if entry.is_dir()] if os.path.isdir(parent or ".") else []
    )
    close = difflib.get_close_matches(name, folders, n=1)
    return f" (did you mean {os.path.join(parent or '.', close[0])}?)" if close else ""
