# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The direction of imports: no circles, and each part of the package knows only what is below it."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

from tests.helpers.detectors import ROOT, run_python

PACKAGE = ROOT / "peft_sdpt"
# Parts of the package, each with the parts that it may import.
PARTS = {
    "core": {"core"},
    "training": {"core", "training"},
    "detection": {"core", "training", "detection"},
    "deployment": {"core", "training", "detection", "deployment"},
    "commands": {"core", "training", "detection", "deployment", "commands"},
}
# Old names, which import the new ones.
FORMER_NAMES = ("peft_sdpt.loss", "peft_sdpt.grounding")


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imported(name: str, at_top: bool = True) -> set[str]:
    """Modules of the package that a module imports; only when it is imported itself, or anywhere."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    names = set()
    for node in ast.walk(tree):
        if at_top and node in inside:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            names.add(source)
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return {each for each in names if each in MODULES} - {name}


def part_of(name: str) -> str:
    part = name.split(".")[1] if "." in name else "core"
    return part if part in PARTS else "core"


def test_no_circles():
    """`import peft_sdpt` runs before any of its modules, so what `__init__` imports does not count."""
    graph = {name: imported(name) - {"peft_sdpt"} for name in MODULES if name != "peft_sdpt"}
    # Tests nothing if relative imports are not understood.
    assert {"peft_sdpt.layer", "peft_sdpt.targeting"} <= graph["peft_sdpt.model"]
    assert "peft_sdpt.training.interruption" in graph["peft_sdpt.detection.prediction"]
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(FORMER_NAMES)))
def test_each_part_imports_only_what_is_below_it(name):
    strangers = {each for each in imported(name) if part_of(each) not in PARTS[part_of(name)]}
    assert not strangers


def test_the_maths_knows_nothing_of_peft():
    for name in ("attention", "fused_attention", "inverse"):
        assert "peft" not in (PACKAGE / f"{name}.py").read_text(encoding="utf-8").replace("peft_sdpt", "").lower()


def test_nothing_changes_the_search_path():
    files = [file for part in ("peft_sdpt", "examples", "benchmarks") for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 50
    assert not [file for file in files if "sys.path" in file.read_text(encoding="utf-8")]


def test_importing_the_package_imports_none_of_its_extras():
    code = "import sys, peft_sdpt; print(*(name for name in sys.modules if name.startswith('peft_sdpt.')))"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "peft_sdpt.model" in result.stdout
    assert not [name for name in result.stdout.split() if part_of(name) != "core"]


@pytest.mark.parametrize("name", FORMER_NAMES)
def test_former_names_still_import(name):
    sys.modules.pop(name, None)
    with pytest.warns(FutureWarning, match=r"Import from peft_sdpt\.detection"):
        former = __import__(name, fromlist=["x"])
    new = __import__(name.replace("peft_sdpt.", "peft_sdpt.detection."), fromlist=["x"])
    public = [key for key, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__]
    public = [key for key in public if not key.startswith("_")]
    assert public and all(getattr(former, key) is getattr(new, key) for key in public)
