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
"""What a pip user gets: a wheel that holds the package and nothing else, imported without the checkout."""

import ast
import graphlib
import inspect
import os
import subprocess
import sys
import zipfile

import pytest
from helpers import REPOSITORY

import erw_hf


EXAMPLE = """
import sys, erw_hf
assert erw_hf.__file__.startswith(sys.argv[1]), erw_hf.__file__
assert "torch" not in sys.modules  # importing the package is cheap
from erw_hf import ERWPipeline
pipe = ERWPipeline.from_pretrained(sys.argv[2])
pipe(class_labels=["7"], num_inference_steps=2).images[0].save("seven.png")
"""


def test_wheel_builds_and_its_example_runs_without_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run(build, check=True, timeout=1800, cwd=tmp_path)
    wheel = next(tmp_path.glob("erw_hf-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"erw_hf"}
    assert "erw_hf/hub/model_cards/model.md.jinja" in names
    assert "erw_hf/hub/convert.py" in names and any(name.endswith("LICENSE") for name in names)

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=1800)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", EXAMPLE, str(site), str(REPOSITORY / "pipelines" / "erw-digits")]
    subprocess.run(command, check=True, timeout=1800, cwd=tmp_path, env=environment)
    assert (tmp_path / "seven.png").stat().st_size > 100


def test_public_names():
    for name in erw_hf.__all__:
        assert getattr(erw_hf, name) is not None
    assert set(erw_hf.__all__) <= set(dir(erw_hf))
    (checked,) = (node for node in ast.parse(inspect.getsource(erw_hf)).body if isinstance(node, ast.If))
    seen = {(alias.name, line.module) for line in checked.body for alias in line.names}  # by type checkers
    assert seen == set(erw_hf._PUBLIC.items())


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nothing"):
        getattr(erw_hf, "Nothing")  # noqa: B009


def test_weights_are_small_and_safetensors():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    files = [REPOSITORY / name for name in tracked.splitlines()]
    weights = [path for path in files if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    assert weights and all(path.suffix == ".safetensors" for path in weights)
    sizes = [path.stat().st_size for path in weights]
    assert max(sizes) < 16 * 2**20 and sum(sizes) < 26 * 2**20


@pytest.mark.parametrize("pipeline", ["erw-digits", "erw-emoji"])
def test_a_shipped_pipeline_links_to_the_code(pipeline):
    """One copy of each module file: the folder loads as it is, and uploads as files."""
    links = {"transformer/transformer_erw.py": "", "scheduler/scheduling_erw.py": "", "pipeline.py": "pipeline_erw.py"}
    for name, own in links.items():
        shipped = REPOSITORY / "pipelines" / pipeline / name
        assert shipped.is_symlink() and not shipped.readlink().is_absolute()
        assert shipped.resolve() == REPOSITORY / "src" / "erw_hf" / (own or shipped.name)


def imports_of(path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import, which the copies in exported repos cannot have"
            # `from erw_hf import ERWPipeline` is of the public table, which is lazy.
            found.add(node.module)
    return found


PACKAGE = REPOSITORY / "src" / "erw_hf"
IMPORTS = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): imports_of(path)
    for path in sorted(PACKAGE.rglob("*.py"))
}
SCRIPTS = [path for name in ("training", "benchmarks", "spaces") for path in (REPOSITORY / name).rglob("*.py")]


def own(name: str) -> set[str]:
    return {module for module in IMPORTS[name] if module.split(".")[0] == "erw_hf"}


@pytest.mark.parametrize("name", ["transformer_erw", "pipeline_erw", "scheduling_erw", "flow", "alignment"])
def test_what_travels_alone_imports_nothing_of_the_package(name):
    assert not own(f"erw_hf.{name}")


@pytest.mark.parametrize("name", ["flow", "alignment"])
def test_the_maths_knows_no_files(name):
    assert {module.split(".")[0] for module in IMPORTS[f"erw_hf.{name}"]} <= {
        "collections",
        "functools",
        "math",
        "torch",
    }


@pytest.mark.parametrize(
    ("room", "below"),
    [
        ("data", {"names", "pipeline_erw", "provenance"}),
        ("encoders", set()),
        ("objective", {"alignment", "encoders", "flow", "transformer_erw"}),
        ("warmup", {"encoders", "objective", "sizes", "transformer_erw"}),
        (
            "evaluation",
            {
                "conversion",
                "data",
                "scheduling_erw",
                "encoders",
                "files",
                "flow",
                "names",
                "pipeline_erw",
                "processes",
                "provenance",
                "transformer_erw",
            },
        ),
    ],
)
def test_a_room_imports_from_below_alone(room, below):
    for name in IMPORTS:
        if f"{name}.".startswith(f"erw_hf.{room}."):
            rooms = {module.split(".")[1] for module in own(name)}
            assert rooms <= below | {room}, name


def test_modules_import_in_one_direction():
    graph = {
        name: own(name) for name in IMPORTS if name != "erw_hf"
    }  # the package names its classes for type checkers
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(graph)  # raises CycleError


def test_no_script_is_imported():
    names = {path.stem for path in SCRIPTS} | {"training", "benchmarks"}
    assert {"train_erw", "evaluate", "app"} <= names
    for name, modules in IMPORTS.items():
        assert names.isdisjoint(module.split(".")[0] for module in modules), name
    for path in SCRIPTS:
        if "benchmarks" in path.parts:  # which share their clocks and tables
            continue
        assert names.isdisjoint(module.split(".")[0] for module in imports_of(path)), path
