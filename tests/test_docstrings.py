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
"""Docstrings, in the diffusers style. In the public API every argument has an entry; elsewhere a sentence is enough. Nowhere
is anything documented that is not there."""

import ast
import re

import pytest
from helpers import REPOSITORY

import erw_hf


def public_definitions():
    for path in sorted((REPOSITORY / "src" / "erw_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                inits = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
                yield path, node.name, node, inits[0] if inits else None
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield path, f"{node.name}.{method.name}", method, method
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield path, node.name, node, node


# What users import: `erw_hf.__all__`, the method's pure functions, and the library calls that the docs name. Other modules
# serve the scripts; their readers have the signature and the type before them.
PUBLIC = {
    "transformer_erw", "pipeline_erw", "scheduling_erw", "encoders", "flow", "alignment", "objective", "warmup", "metrics", "export",
}  # fmt: skip
PUBLIC_NAMES = {"convert_checkpoint", "read_checkpoint", "load_source", "Source"}
DEFINITIONS = [
    pytest.param(*d[1:], d[0].stem not in PUBLIC and d[1] not in PUBLIC_NAMES, id=f"{d[0].stem}.{d[1]}")
    for d in public_definitions()
]


def test_what_is_public_exists():
    found = [(d[0].stem, d[1]) for d in public_definitions()]
    assert PUBLIC <= {stem for stem, _ in found} and PUBLIC_NAMES <= {name for _, name in found}
    assert set(erw_hf.__all__) - {"__version__"} <= {name for stem, name in found if stem in PUBLIC}


# Documented by the base class whose contract they fulfil, or modules whose arguments the model's docstring explains.
INTERNAL = {
    "ERWAttnProcessor", "ERWAttention", "ERWTransformerBlock", "ERWTimeClassEmbedding", "ERWRotaryPosEmbed",
    "ERWAdaLayerNormOut", "ERWClassTokenEmbedding", "FlowMatchSchedulerOutput", "ERWTransformer2DModelOutput",
}  # fmt: skip
PLAIN = {"forward", "state_dict", "load_state_dict", "extract_init_dict", "dtype"}


@pytest.mark.parametrize(("name", "node", "signature", "is_internal"), DEFINITIONS)
def test_every_public_argument_is_documented(name, node, signature, is_internal):
    owner, _, method = name.partition(".")
    if owner in INTERNAL or method in PLAIN and owner not in ("ERWTransformer2DModel", "RepresentationEncoder"):
        return
    docstring = ast.get_docstring(node) or ""
    assert docstring, f"{name} has no docstring"
    if signature is None:
        return
    arguments = [a.arg for a in signature.args.args + signature.args.kwonlyargs if a.arg not in ("self", "cls")]
    section = re.search(r"Args:\n(.*?)(\n\n(Returns|Raises|Examples):|\Z)", docstring, flags=re.S)
    entries = re.findall(r"^    (\w+) \(", section[1], flags=re.M) if section else []
    if name == "ERWPipeline.check_inputs":
        return  # the arguments of `__call__`
    starred = [a.arg for a in (signature.args.vararg, signature.args.kwarg) if a is not None]
    assert entries == [a for a in entries if a in [*arguments, *starred]], f"{name} documents what it lacks"
    described = dict(re.findall(r"^    (\w+) \((.*?)\):", section[1], flags=re.M | re.S)) if section else {}
    for argument, description in described.items():
        if "Tensor`" in description and "[" not in description:
            assert "shape" in description, f"{name}: the shape of {argument} is not given"
    defaults = signature.args.defaults
    for argument, default in zip(
        signature.args.args[len(signature.args.args) - len(defaults) :], defaults, strict=True
    ):
        if ast.unparse(default) != "None" and argument.arg in described:
            assert "defaults to" in described[argument.arg], f"{name}: the default of {argument.arg} is not given"
    if is_internal:
        return
    missing = [a for a in arguments if a not in entries]
    if isinstance(node, ast.ClassDef) and not section and not arguments:
        return
    assert not missing, f"{name} does not document {missing}"
    if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) != "None":
        is_property = any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)
        assert is_property or re.search("(Returns|Yields):", docstring), f"{name} does not say what it returns"
    raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(signature))
    if raises and name != "ERWPipeline.check_inputs":
        assert "Raises:" in docstring or "Raises:" in (ast.get_docstring(node) or ""), f"{name} hides what it raises"


def test_call_documents_every_argument():
    tree = ast.parse((REPOSITORY / "src" / "erw_hf" / "pipeline_erw.py").read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "__call__")
    docstring = ast.get_docstring(call)
    for argument in call.args.args[1:]:
        assert re.search(rf"^    {argument.arg} \(.*\):", docstring, flags=re.M), argument.arg
    for argument, default in zip(call.args.args[-len(call.args.defaults) :], call.args.defaults, strict=True):
        if ast.unparse(default) not in ("None",):
            entry = re.search(rf"^    {argument.arg} \((.*)\):", docstring, flags=re.M)[1]
            assert "defaults to" in entry, argument.arg
