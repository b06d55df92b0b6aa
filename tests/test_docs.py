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
"""README and docs are held to what they say: their Python runs, their commands parse, their links and names exist."""

import argparse
import collections
import importlib
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from helpers import REPOSITORY, TINY_MODEL, run_forked, run_script
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from erw_hf.trainer.config import TrainingConfig, given_values, parse_config


PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((REPOSITORY / "docs").rglob("*.md"))
IDS = [str(page.relative_to(REPOSITORY)) for page in PAGES]
pages = pytest.mark.parametrize("page", PAGES, ids=IDS)

SCRIPTS = sorted(path for path in (REPOSITORY / "training").glob("*.py") if path.stem != "train_erw")
MODULES = ["erw_hf.hub.push", "erw_hf.hub.space", "erw_hf.hub.cards", "erw_hf.hub.convert", "erw_hf.trainer.ema"]
# What a reader has and this folder has not.
CONFIGS = dict.fromkeys(
    ("X.yaml", "mine.yaml", "planned.yaml", "outputs/mine/config.yaml"), "training/configs/digits.yaml"
)
FOREIGN = {"git", "source", "cd", "mkdir", "cp"}  # commands of others, whose flags are theirs
FOREIGN_FLAGS = {"--logdir", "--help", "--no-deps", "--nodes", "--target"}
FOREIGN_KEYS = {"fsdp_version"}  # of accelerate


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


# --- commands


class Found(Exception):
    """Takes a script's parser out of it before anything is run."""


def parser_of(name: str) -> argparse.ArgumentParser:
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, REPOSITORY / name)
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str((REPOSITORY / name).parent))  # as Python does for a script
            spec.loader.exec_module(module)
    else:
        module = importlib.import_module(name)

    def found(parser, *args):
        raise Found(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", found)
        getattr(module, "parse_arguments", module.main)()
    return caught.value.args[0]


def check_command(words: list[str]) -> None:
    """Raises SystemExit, as the command would, for a flag or a value that it does not take."""
    words = [CONFIGS.get(word, word) for word in words]
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    command, *rest = words
    if command == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.M)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    elif command == "pip":
        extras = re.findall(r"^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text(), flags=re.M)
        for word in rest:
            if found := re.fullmatch(r"\.\[(.*)\]", word):
                assert set(found[1].split(",")) <= set(extras), words
    elif command == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch", words
        launch = launch_command_parser().parse_args(rest[1:])
        assert launch.config_file is None or (REPOSITORY / launch.config_file).is_file(), words
        check_script(launch.training_script, launch.training_script_args)
    elif Path(command).name == "python":
        if rest[:2] == ["-m", "pytest"]:
            assert all((REPOSITORY / path).exists() for path in rest[2:]), words
        elif rest[0] == "-m":
            parser_of(rest[1]).parse_args(rest[2:])
        else:
            check_script(rest[0], rest[1:])
    elif command == "sbatch":
        files = [word for word in rest if not word.startswith("-")][:2]
        assert all((REPOSITORY / path).is_file() for path in files), words
    elif command == "hf":
        from click.testing import CliRunner
        from huggingface_hub.cli.hf import app

        result = CliRunner().invoke(app, [*rest, "--help"])  # which parses what stands before it
        assert result.exit_code == 0, result.output
    else:
        assert command in FOREIGN, f"{words}: how is its line checked?"


def check_script(script: str, flags: list[str]) -> None:
    if script == "training/train_erw.py":
        given_values(flags) if "--plan" in flags else parse_config(flags)
    else:
        parser_of(script).parse_args(flags)


def commands(page: Path) -> list[list[str]]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += [code for code in inline_code(page) if re.match(r"(accelerate launch|python|make|hf) ", code)]
    lines = [re.sub(r" > [\w.-]+$", "", line) for line in lines]  # where the output goes
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pages
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for words in commands(page):
        check_command(words)


def test_commands_are_found():
    assert sum(len(commands(page)) for page in PAGES) > 40


@pytest.mark.parametrize(
    "line",
    [
        "accelerate launch training/train_erw.py --config training/configs/digits.yaml --warmup_step 3",
        "accelerate launch training/train_erw.py --config training/configs/digit.yaml",
        "accelerate launch training/train_erw.py --config training/configs/digits.yaml --alignment_loss cosin",
        "accelerate launch --num_process 2 training/train_erw.py",
        "python training/evaluate.py --models pipelines/erw-digits",
        "python -m erw_hf.hub.push outputs/mine --hub_id user/mine",
        "make quickstarts",
        'pip install -e ".[training]"',
        "hf auth logins",
        "hf download user/mine --localdir here",
        "curl example.org",
    ],
)
def test_a_wrong_command_is_found(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises((SystemExit, AssertionError)):
        check_command(shlex.split(line))


# --- names in the text


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    parsers = [parser_of(f"training/{path.name}") for path in SCRIPTS] + [parser_of(name) for name in MODULES]
    parsers.append(launch_command_parser())
    own = {f"--{name}" for name in TrainingConfig.__dataclass_fields__} | {"--config"}
    return own.union(FOREIGN_FLAGS, *(parser._option_string_actions for parser in parsers))


@pages
def test_flags_and_keys_in_the_text_exist(page, known_flags):
    types = get_type_hints(TrainingConfig)
    for code in inline_code(page):
        assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) <= known_flags, code
        if found := re.fullmatch(r"([a-z]\w+): ([\w.]+)", code):
            name, value = found[1], found[2]
            assert name in types or name in FOREIGN_KEYS, code
            if get_origin(types.get(name)) is Literal:
                assert value in get_args(types[name]), code


@pages
def test_paths_in_the_text_exist(page):
    folders = ("src/", "training/", "tests/", "docs/", "benchmarks/", "pipelines/", "spaces/", "model_cards/")
    for code in inline_code(page):
        if code.startswith(folders) and not set(code) & set(" {*"):
            assert (REPOSITORY / code).exists(), code


def slug(heading: str) -> str:
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@pages
def test_links_and_anchors_resolve(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(
                r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), flags=re.M
            )
            assert anchor in [slug(heading) for heading in headings], f"{target}#{anchor}"


@pytest.mark.parametrize(
    ("page", "data", "fewest"),
    [("README.md", "emoji", 6), ("docs/warmup-study.md", "emoji", 11), ("docs/warmup-study.md", "digits", 5)],
)
def test_the_rows_of_the_study_are_those_of_its_record(page, data, fewest):
    """Whatever a page calls an arm: what follows is the end of a row of the results."""
    results = (REPOSITORY / "benchmarks" / "results" / f"convergence-{data}.md").read_text().splitlines()
    section = (REPOSITORY / page).read_text().split(f"[start:{data}]")[1].split(f"[end:{data}]")[0]
    rows = [line.split("|", 2)[2] for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) == fewest and all(any(line.endswith(row) for line in results) for row in rows)


def test_the_comparison_of_spaces_is_that_of_the_records():
    """Each cell holds the distances of one arm, in the order of the seeds."""
    methods = {"digits": ["sit", "repa", "masked", "noised"], "emoji": ["sit", "repa", "masked", "erw_noised"]}
    suffixes = {"64 numbers": "_t", "256 numbers": "_t_p16", "48 numbers": "", "192 numbers": "_p8"}
    ends = {data: collections.defaultdict(dict) for data in methods}
    for data, arms in ends.items():
        for line in (REPOSITORY / "benchmarks" / "results" / f"convergence-{data}.jsonl").read_text().splitlines():
            run = json.loads(line)
            arms[run["arm"]][run["seed"]] = f"{run['points'][-1]['fid']:.{2 if data == 'digits' else 1}f}"
    checked, data, suffix = 0, "", ""
    for line in (REPOSITORY / "docs" / "guides" / "spaces.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 7 or not cells[2].startswith(("velocity", "sample")):
            continue
        data = next((name for name in methods if cells[0].startswith(f"[{name}]")), data)
        suffix = next((end for size, end in suffixes.items() if cells[1].startswith(size)), suffix)
        for method, cell in zip(methods[data], cells[3:], strict=True):
            arm = method + suffix
            if cells[2].startswith("sample"):
                arm = ("sample" if method == "sit" else f"{method}_sample") + suffix
            arm += "_lr4e-3" if "rate 4e-3" in cells[2] else ""
            seeds = sorted(seed for seed in ends[data][arm] if seed < 100)  # the others are for choosing
            assert cell == ", ".join(ends[data][arm][seed] for seed in seeds), arm
            checked += 1
    assert checked == 40


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 100


def test_included_files_and_sections_exist():
    found = 0
    for page in PAGES:
        for name, section in re.findall(r'^--8<-- "([^":]+)(?::(\w+))?"$', page.read_text(), flags=re.M):
            found += 1
            text = (REPOSITORY / name).read_text()
            assert not section or {f"[start:{section}]", f"[end:{section}]"} <= set(re.findall(r"\[\w+:\w+\]", text))
    assert found >= 3


def test_every_module_is_in_the_reference():
    modules = {
        ".".join(path.relative_to(REPOSITORY / "src").with_suffix("").parts)
        for path in (REPOSITORY / "src" / "erw_hf").rglob("*.py")
        if path.name != "__init__.py"
    }
    shown = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)]
    assert sorted(shown) == sorted(modules)


# --- Python


def run_python(page: Path, folder: Path, stand_ins: dict[str, Path]) -> dict[str, object]:
    """Runs a page's blocks one after another; what lies on the Hub, or in a reader's folder, is exchanged."""
    namespace = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        for name, path in stand_ins.items():
            block = block.replace(f'"{name}"', f'"{path}"')
        block = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", block)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            exec(compile(block, str(page), "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, vae_path) -> dict[str, Path]:
    from erw_hf import ERWTransformer2DModel

    folder = tmp_path_factory.mktemp("converted")
    ERWTransformer2DModel(**(TINY_MODEL | {"in_channels": 4, "num_classes": 1000})).save_pretrained(folder)
    encoder = tmp_path_factory.mktemp("dinov2-base")  # four blocks of it
    config = Dinov2Config(hidden_size=768, num_hidden_layers=4, num_attention_heads=12, patch_size=14, image_size=56)
    Dinov2Model(config).save_pretrained(encoder)
    BitImageProcessorPil().save_pretrained(encoder)
    return {
        "pipelines/erw-digits": REPOSITORY / "pipelines" / "erw-digits",
        "pipelines/erw-emoji": REPOSITORY / "pipelines" / "erw-emoji",
        "user/mine": REPOSITORY / "pipelines" / "erw-digits",
        "sit-xl": folder,
        "facebook/dinov2-base": encoder,
        "stabilityai/sd-vae-ft-ema": vae_path,
    }


OWN_IMAGES = REPOSITORY / "docs" / "tutorials" / "own-images.md"
PYTHON_PAGES = [page for page in PAGES if blocks(page, "python") and page != OWN_IMAGES]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=[page.stem for page in PYTHON_PAGES])
def test_python_runs(page, tmp_path, stand_ins):
    run_python(page, tmp_path, stand_ins)


def test_own_images_from_the_yaml_to_a_picture(tmp_path, tiny_flags, vae_path):
    """The tutorial as it is, but for its sizes."""
    from PIL import Image

    for i in range(8):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 30), (30 * i, 0, 0)).save(path)
    (text,) = blocks(OWN_IMAGES, "yaml")
    assert len(text.splitlines()) == 8  # as it says
    (tmp_path / "mine.yaml").write_text(text)
    flags = [flag for flag in tiny_flags if not flag.startswith("--checkpointing_steps")]
    output_dir = tmp_path / "outputs" / "mine"
    config = [f"--config={tmp_path}/mine.yaml", f"--vae={vae_path}", "--dataloader_num_workers=0"]
    run_script("train_erw", *config, *flags, f"--output_dir={output_dir}")
    run_python(OWN_IMAGES, tmp_path, {})
    assert Image.open(tmp_path / "cat.png").size == (16, 16)


def test_the_new_alignment_loss_trains(tmp_path, tiny_flags):
    """The tutorial's edits, made in a copy."""
    page = REPOSITORY / "docs" / "tutorials" / "alignment-loss.md"
    for name in ("src", "training"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    with (tmp_path / "src" / "erw_hf" / "alignment.py").open("a") as file:
        file.write(blocks(page, "python")[0])
    (diff,) = blocks(page, "diff")
    for part in re.split(r"^--- .*\n\+\+\+ b/", diff, flags=re.M)[1:]:
        name, *hunks = re.split(r"\n@@\n", part)
        path = tmp_path / name
        for hunk in hunks:
            lines = hunk.rstrip("\n").split("\n")
            old = "\n".join(line[1:] for line in lines if not line.startswith("+")) + "\n"
            new = "\n".join(line[1:] for line in lines if not line.startswith("-")) + "\n"
            assert path.read_text().count(old) == 1, f"{name} has no longer what the tutorial changes:\n{old}"
            path.write_text(path.read_text().replace(old, new))
    (tmp_path / "pipelines").symlink_to(REPOSITORY / "pipelines")
    command = ["training/train_erw.py", "--config=training/configs/digits.yaml", *tiny_flags]
    command += ["--alignment_loss=margin", "--warmup_steps=1", "--max_train_steps=2", f"--output_dir={tmp_path}/run"]
    environment = {"PYTHONPATH": str(tmp_path / "src"), "ACCELERATE_USE_CPU": "true"}
    result = run_forked(*command, environment=environment, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "alignment_loss: margin" in (tmp_path / "run" / "config.yaml").read_text()


# --- words

# What CONTRIBUTING's "Style" asks for, as far as a machine can see it: pattern -> what to write instead.
WORDS = {
    r"data sets?": "dataset",
    r"(?:line|value|vector|token|file|folder|process|point|picture) an? (?:step|sample|row|image|class|rank|run|block|line)": "per",
    r"(?:images|tokens|samples|rows|steps) a (?:second|step)": "per",
    r"of which(?! class)": "a new sentence",
    r"what is wrong with": "fails with, does not fit",
    r"cannot be had|(?:not|been) at hand|data at hand": "not available",
    r"nothing of (?:it|an?|the|them)": "without, lacks",
    r"(?:try|tries|tried|trying) again": "retry",
    r"whole or absent": "complete or not there",
    r"(?<!there )(?:is|are) no (?!longer\b|more than\b)[a-z]+": "is not a, lacks",
    r"sooner by \d": "1.11× faster",
    r"phase [12]": "warmup, full training",
    r"(?:run|training|it) (?:goes|go|going) on": "resume, continue",
    r"parts samples|samples parted": "pushes samples apart",
}
PROSE = [*PAGES, *sorted((REPOSITORY / "benchmarks" / "recipes").glob("*.yaml"))]
for folder, names in {
    "src": ".py .jinja",
    "training": ".py .yaml",
    "spaces": ".py .md .html",
    "benchmarks": ".py",
    "docs": ".py",
}.items():
    PROSE += sorted(path for path in (REPOSITORY / folder).rglob("*") if path.suffix in names.split())


def unidiomatic(text: str) -> list[str]:
    """The phrases of WORDS in a text. What stands in backticks is quoted; a phrase may run over lines and comments."""
    text = re.sub(r"`[^`\n]*`", "`", text)
    text = re.sub(r"[\s#\"]+", " ", text)
    return [
        f"{match[0]!r}: write {word}"
        for pattern, word in WORDS.items()
        for match in re.finditer(rf"\b(?:{pattern})\b", text, re.I)
    ]


@pytest.mark.parametrize("path", PROSE, ids=[str(path.relative_to(REPOSITORY)) for path in PROSE])
def test_words(path):
    assert unidiomatic(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "a data set", "one line a step", "40 images a second", "three of\n    # which", "what is wrong with it",
        "nothing of it", "it is tried\nagain", "a file that is no image", "the run goes on", 'data at " "hand', "lambda in Phase 2",
    ],
)  # fmt: skip
def test_an_unidiomatic_phrase_is_found(text):
    assert len(unidiomatic(text)) == 1


def test_idiomatic_phrases_pass():
    assert (
        unidiomatic("There is no shuffle buffer, and it is no longer one line per step; `data set` is quoted.") == []
    )
