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
"""What the site takes from the repository: the reference from docstrings, the keys of a run, the results.

Nothing is imported, so a build needs no torch. mkdocstrings would print this docstring format's backticks and links as
they are written.
"""

import ast
import functools
import re
from pathlib import Path
from textwrap import dedent

from mkdocs.structure.files import File


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODULE = re.compile(r"^::: ([\w.]+)$", flags=re.M)  # a line that stands for a module's reference


def on_files(files, config):
    """Pictures of the results lie beside them."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown, **_):
    markdown = MODULE.sub(lambda match: module_reference(match[1]), markdown)
    # A page links to the results where they lie in the repository; on the site plots lie in results/, pages in results.md.
    markdown = re.sub(r"\(((?:\.\./)*)\.\./benchmarks/results/([\w-]+\.png)\)", r"(\1results/\2)", markdown)
    markdown = re.sub(r"\(((?:\.\./)*)\.\./benchmarks/results/[\w-]+\.md\)", r"(\1results.md)", markdown)
    if "{{ results }}" in markdown:
        markdown = markdown.replace("{{ results }}", results())
    if "{{ configuration }}" in markdown:
        markdown = markdown.replace("{{ configuration }}", configuration())
    return markdown


def results() -> str:
    """Every page of benchmarks/results as it is, two levels down; its pictures lie in results/ of the site."""
    parts = []
    for path in sorted(RESULTS.glob("*.md")):
        text = path.read_text()
        if not text.startswith("# "):
            text = f"# {path.stem}\n\n{text}"
        text = re.sub(r"^(#+) ", r"##\1 ", text, flags=re.M)
        parts.append(re.sub(r"\]\((?!https?:)", "](results/", text))
    return "\n\n".join(parts)


def configuration() -> str:
    """The keys of a run with the help texts that `--help` shows, by the dataclasses that group them."""
    tree = ast.parse((ROOT / "src" / "erw_hf" / "trainer" / "config.py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    intervals = next(node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple))
    named = dict(zip(map(ast.unparse, intervals.targets[0].elts), ast.literal_eval(intervals.value), strict=True))
    rows = []
    for base in reversed(classes["TrainingConfig"].bases):
        group = classes[base.id]
        rows += [
            "",
            f"## {ast.get_docstring(group)}",
            "",
            "| key | values | default | what it is |",
            "|---|---|---|---|",
        ]
        for node in group.body:
            if isinstance(node, ast.AnnAssign):
                rows.append(key_row(node, named))
    return "\n".join(rows[1:])


def key_row(node: ast.AnnAssign, intervals: dict[str, str]) -> str:
    default, text = (ast.literal_eval(argument) for argument in node.value.args)
    about = {keyword.arg: keyword.value for keyword in node.value.keywords}
    kind = re.sub(r"Literal\[(.*)\]", r"\1", ast.unparse(node.annotation).removesuffix(" | None"))
    values = ", ".join(f"`{value}`" for value in re.split(r", | \| ", kind))
    if "range" in about:
        interval = about["range"]
        values += f" in {intervals[interval.id] if isinstance(interval, ast.Name) else ast.literal_eval(interval)}"
    default = "none" if default is None else f"`{default}`"
    return f"| `{node.target.id}` | {values} | {default} | {text}{' †' * ('fixed' in about)} |"


def module_reference(name: str) -> str:
    tree = ast.parse(source_of(name).read_text())
    parts = [f"## `{name}` {{ #{name} }}", ast.get_docstring(tree) or ""]
    for node in tree.body:
        if is_public(node):
            parts += definition(node, f"{name}.{node.name}", level=3)
    return "\n\n".join(parts)


def is_public(node: ast.AST) -> bool:
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or not ast.get_docstring(node):
        return False
    return node.name == "__call__" or not node.name.startswith("_")


def definition(node: ast.ClassDef | ast.FunctionDef, name: str, level: int) -> list[str]:
    parts = [f"{'#' * level} {node.name} {{ #{name} }}", signature(node), *docstring(ast.get_docstring(node))]
    if isinstance(node, ast.ClassDef):
        for method in filter(is_public, node.body):
            parts += definition(method, f"{name}.{method.name}", level + 1)
    return parts


def signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    function = node
    if isinstance(node, ast.ClassDef):
        function = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
        if function is None:
            return f"```python\nclass {node.name}\n```"
    arguments = function.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + arguments.defaults
    shown = [(a, d) for a, d in zip(arguments.args, defaults, strict=True) if a.arg not in ("self", "cls")]
    if arguments.kwonlyargs:
        shown += [("*", None), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    words = [a if a == "*" else ast.unparse(a) + (f" = {ast.unparse(d)}" if d else "") for a, d in shown]
    words += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    first = f"class {node.name}" if node is not function else f"def {node.name}"
    result = f" -> {ast.unparse(function.returns)}" if node is function and function.returns else ""
    line = f"{first}({', '.join(words)}){result}"
    if len(line) > 90 and words:
        line = f"{first}(\n" + "".join(f"    {word},\n" for word in words) + f"){result}"
    return f"```python\n{line}\n```"


def docstring(text: str) -> list[str]:
    """diffusers' format as Markdown."""
    first, *sections = re.split(r"^(Args|Returns|Raises|Examples):\n?", text, flags=re.M)
    parts = [first]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body = dedent(body).strip("\n")
        if not body:
            continue
        if title in ("Args", "Raises"):
            entries = [re.sub(r"\s+", " ", entry) for entry in re.split(r"\n(?=\S)", body)]
            entries = [re.sub(r"^(\w+) \(", r"`\1` (", re.sub(r"^(\w+): ", r"`\1`: ", entry)) for entry in entries]
            body = "\n".join(f"- {entry}" for entry in entries)
        parts += [f"**{title}**", body]
    return [linked(part) for part in parts]


def linked(text: str) -> str:
    """diffusers writes a reference to a name of the package as [`name`] or [`~module.name`]."""
    return re.sub(r"\[`~?([\w.]+)`\](?!\()", lambda match: link(match[1]), text)


@functools.cache
def anchors() -> dict[str, str]:
    """Full name of each public definition -> where the reference has it."""
    found = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for module in MODULE.findall(page.read_text()):
            tree = ast.parse(source_of(module).read_text())
            found |= {
                f"{module}.{node.name}": f"{page.name}#{module}.{node.name}" for node in tree.body if is_public(node)
            }
    return found


def link(name: str) -> str:
    target = next((place for full, place in anchors().items() if full.endswith(f".{name}")), None)
    return f"`{name}`" if target is None else f"[`{name}`]({target})"


def source_of(module: str) -> Path:
    return ROOT / "src" / f"{module.replace('.', '/')}.py"
