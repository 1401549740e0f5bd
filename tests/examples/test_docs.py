# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What the documentation says holds: code runs, commands parse, messages, tests and links are there.

Python blocks of a page run in their order, in one namespace and an empty folder. The detector of the Hub that they name
is the small one that ships, served from loopback. Links within `docs/` are the builder's to check (`.ci/run`).
"""

from __future__ import annotations

import argparse
import ast
import configparser
import functools
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate.commands.launch import launch_command_parser
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch.distributed.run import get_args_parser
from transformers import AutoModelForZeroShotObjectDetection

import demo
import detect
import detect_onnx
import export_onnx
import pretrain_host
import robustness
import serve as serve_script
import train_detection
from benchmarks import deployment, serving
from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.robustness import __main__ as robustness_comparison
from benchmarks.speed import __main__ as speed
from benchmarks.speed import kept
from benchmarks.transfer import __main__ as transfer
from peft_sdpt import SDPTConfig, SDPTLayer
from peft_sdpt.commands import detect as detect_command
from peft_sdpt.commands import export as export_command
from peft_sdpt.commands import robustness as robustness_command
from peft_sdpt.commands import train
from peft_sdpt.hosts import HOSTS
from tests.helpers.detectors import ROOT, attach, make_host, run
from tests.helpers.hub import OWNER, serve, use
from tests.helpers.main_job import reset_accelerate

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/host/README.md"]
HOST = ROOT / "examples/host"
# Checked by the builder of the site.
DIRECTIVES = ("{toctree}", "{eval-rst}")
# Of ours, by what follows `python`.
SCRIPTS = {
    "examples/train_detection.py": train_detection,
    "examples/detect.py": detect,
    "examples/detect_onnx.py": detect_onnx,
    "examples/export_onnx.py": export_onnx,
    "examples/demo.py": demo,
    "examples/robustness.py": robustness,
    "examples/serve.py": serve_script,
    "examples/pretrain_host.py": pretrain_host,
    "-m benchmarks.serving": serving,
    "-m benchmarks.gpu_check": gpu_check,
    "-m benchmarks.robustness": robustness_comparison,
    "-m benchmarks.deployment": deployment,
    "-m benchmarks.speed": speed,
    "-m benchmarks.speed.kept": kept,
    "-m benchmarks.transfer": transfer,
}
# What pip installs runs the same code.
INSTALLED = {
    "sdpt-train": "examples/train_detection.py",
    "sdpt-detect": "examples/detect.py",
    "sdpt-export": "examples/export_onnx.py",
    "sdpt-robustness": "examples/robustness.py",
}
# Starts of commands that are not ours; what they are given is not checked, but for the extras of `pip install`.
OTHER_COMMANDS = (
    "python -m venv",
    ". .venv/bin/activate",
    "pip download",
    "pip install",
    "python -m pytest",
    "ruff check",
    "ruff format",
    "python -m peft_sdpt.convert",
    "python -m tests.tools.parity",
    "mypy peft_sdpt",
    "hf upload",
    "hf auth login",
    "sphinx-build",
    "python -m build",
    "twine check",
    "curl",
)

# Of pytest and of SLURM.
OTHER_FLAGS = {"--help", "--hypothesis-profile", "--nodes", "--ntasks-per-node", "--signal"}


@dataclass
class Block:
    """Code of a page, its language ("" where it is indented), and the number of the line before it."""

    language: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    found, fence, before = [], "", ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence:
            if line.strip() == fence:
                fence = ""
            else:
                found[-1].text += line + "\n"
        elif match := re.match(r"\s*(`{3,}|~{3,})(.*)", line):
            fence = match[1]
            found.append(Block(match[2].strip() or "none", number, ""))
        elif line.startswith("    "):
            if not before.strip():
                found.append(Block("", number - 1, ""))
            if found and not found[-1].language and found[-1].line + found[-1].text.count("\n") == number - 1:
                found[-1].text += line[4:] + "\n"
        before = line
    return found


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_blocks(*languages: str) -> list:
    return [page for page in PAGES if any(block.language in languages for block in blocks(page))]


def test_every_block_is_of_a_kind_that_is_checked():
    kinds = {"python", "bash", "", *DIRECTIVES}
    unknown = [(named(p), b.line, b.language) for p in PAGES for b in blocks(p) if b.language not in kinds]
    assert not unknown
    assert sum(block.language == "python" for page in PAGES for block in blocks(page)) >= 15


def test_the_parser_of_pages_finds_what_is_there(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n\n```python\nx = 1\n\ny = 2\n```\n\n    cd a\n    ls\n\n- b\n  c\n\n```\nz\n```\n")
    found = [(block.language, block.line, block.text) for block in blocks(page)]
    assert found == [("python", 3, "x = 1\n\ny = 2\n"), ("", 8, "cd a\nls\n"), ("none", 15, "z\n")]


# ---- Python


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with the detector and two adapters that the pages name."""
    folder = tmp_path_factory.mktemp("hub")
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        use(hub, patch, folder / "home")
        patch.setenv("HF_TOKEN", OWNER)
        hub.add("IDEA-Research/grounding-dino-tiny", HOST)
        for seed, name in enumerate(("aerial", "night")):
            torch.manual_seed(seed)
            config = SDPTConfig(init_weights=False)  # it has an effect, as a trained one
            model = get_peft_model(AutoModelForZeroShotObjectDetection.from_pretrained(HOST), config)
            for part in (folder / name, folder / name / "best"):
                model.save_pretrained(part)
            hub.add(f"user/{name}", folder / name)
        yield hub


def compile_fusion(model, compile=torch.compile):
    """`torch.compile` of what is ours, without a compiler: all of a detector takes a minute."""
    # `module.compile()` compiles its method. Libraries compile functions when they are imported.
    owner = getattr(model, "__self__", model)
    modules = owner.modules() if isinstance(owner, torch.nn.Module) else ()
    for layer in (module for module in modules if isinstance(module, SDPTLayer)):
        layer.forward = compile(layer.forward, backend="eager", fullgraph=True)
    return model


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model with PEFT")
@pytest.mark.parametrize("page", with_blocks("python"), ids=named)
def test_python_runs(page, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", compile_fusion)
    reset_accelerate()
    torch.manual_seed(0)
    namespace: dict = {}
    known = list(HOSTS)
    try:
        for block in blocks(page):
            if block.language == "python":
                # Lines before it, so that a traceback has those of the page.
                exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
    finally:
        HOSTS[:] = known


# ---- commands


def commands(block: Block) -> list[list[str]]:
    """Words of each command, without comments and assignments before it."""
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split(" && ") if not line.strip().startswith("#")]
    split = [shlex.split(part, comments=True) for part in parts if part]
    return [words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :] for words in split]


def parse(module, arguments: list[str], monkeypatch) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    return parse_args(module)


def parse_args(module) -> argparse.Namespace:
    """Return the arguments that a script would run with."""
    command = {
        train_detection: train,
        detect: detect_command,
        export_onnx: export_command,
        robustness: robustness_command,
    }.get(module)
    if command is None:
        return module.parse_args()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run", lambda args, *_: seen.append(args))
        module.main()
    return seen[0]


@pytest.mark.parametrize("page", with_blocks("bash", ""), ids=named)
def test_commands_parse(page, monkeypatch, capsys):
    with_extras = configparser.ConfigParser()
    with_extras.read(ROOT / "setup.cfg")
    for block in blocks(page):
        for words in commands(block) if block.language in ("bash", "") else []:
            where = f"{named(page)}:{block.line}: {shlex.join(words)}"
            launcher = {"accelerate": launch_command_parser, "torchrun": get_args_parser}.get(words[0])
            try:
                if launcher:
                    launched = launcher().parse_args(words[1 + (words[0] == "accelerate") :])
                    words = ["python", launched.training_script, *launched.training_script_args]
                if words[0] in INSTALLED:
                    words = ["python", INSTALLED[words[0]], *words[1:]]
                name = " ".join(words[1 : 3 if words[1:2] == ["-m"] else 2])
                if words[0] == "python" and name.startswith(("examples/", "-m benchmarks")):
                    module = SCRIPTS[name]
                    arguments = parse(module, words[1 + len(name.split()) :], monkeypatch)
                    if module is train_detection:
                        train.check_args(arguments)
                    continue
            except SystemExit:
                pytest.fail(f"{where}\n{capsys.readouterr().err}")
            assert shlex.join(words).startswith(OTHER_COMMANDS), where
            extras = [extra for word in words for extra in re.findall(r"\.\[(.*)\]", word)]
            if words[0] == "pip":
                assert set(",".join(extras).split(",")) <= {"", *with_extras["options.extras_require"]}, where


def options(module, monkeypatch) -> set[str]:
    """Flags of a script."""
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: self)
        parser = parse_args(module)
    return set(parser._option_string_actions)


def test_flags_in_the_text_exist(monkeypatch):
    known = set.union(*(options(module, monkeypatch) for module in SCRIPTS.values()))
    for parser in (launch_command_parser(), get_args_parser()):
        known |= set(parser._option_string_actions)
    for page in PAGES:
        used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", prose(page)))
        assert used <= known | OTHER_FLAGS, named(page)


# ---- messages


def strings(*files: Path) -> list[str]:
    """Strings of Python files as they are written, with a NUL for what is filled in."""
    return [string for file in files for string in strings_of(ast.parse(file.read_text(encoding="utf-8")))]


def strings_of(tree: ast.AST) -> list[str]:
    found = []
    pieces = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            found.append(node.value)
    return found


# Of Python itself; each has a test, of the name given.
OF_PYTHON = {
    "KeyError: 'SDPT'": "test_loading_needs_the_import_and_only_that",
    "unhashable type: 'list'": "test_a_list_of_names_is_for_the_tuner",
}


def messages() -> list[str]:
    """What the page on messages explains, in headings and in lists."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    found = re.findall(r"^### (`+)(.+?)\1$|^- `(.+?)`[:,]", page, re.MULTILINE)
    return [heading or item for _, heading, item in found]


def parts(message: str) -> list[str]:
    """What a message says whatever is filled in."""
    return list(filter(None, map(str.strip, re.split("[…\0]", message))))


def test_messages_are_those_that_are_raised():
    assert len(messages()) >= 50
    peft_files = [Path(peft.__file__).parent / name for name in ("utils/hotswap.py", "mixed_model.py", "peft_model.py")]
    peft_files.append(Path(peft.__file__).parent / "tuners/tuners_utils.py")
    ours = [*(ROOT / "peft_sdpt").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    raised = strings(*ours, *peft_files, Path(transformers.__file__).parent / "modeling_utils.py")
    for message in messages():
        if message not in OF_PYTHON:
            for part in parts(message):
                assert any(part in string for string in raised), f"{message}: nothing says {part!r}"


def explains(message: str, raised: str) -> bool:
    """Whether all that a message says is said, in this order."""
    end = 0
    for part in parts(message):
        start = raised.find(part, end)
        if start < 0:
            return False
        end = start + len(part)
    return sum(map(len, parts(message))) > 12


def test_every_message_of_the_package_is_explained():
    # The messages of the commands name a flag and its rule.
    for file in set((ROOT / "peft_sdpt").rglob("*.py")) - set((ROOT / "peft_sdpt/commands").iterdir()):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            raised = "\0".join(strings_of(node)) if isinstance(node, ast.Raise) else ""
            # Of a word or two there is nothing to find it by.
            if sum(map(len, parts(raised))) > 12:
                assert any(explains(message, raised) for message in messages()), f"{file}: {raised}"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:You are trying to modify a model with PEFT")
def test_what_to_know_of_lora_beside_sdpt():
    """The three things that the page on combining says."""
    host = make_host()
    bare = run(host)
    host.config.tie_word_embeddings = False
    inject_adapter_in_model(LoraConfig(target_modules=["fc1"], init_lora_weights=False), host, "lora")
    with_lora = run(host)
    model = attach(host).eval()
    both = run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), bare)
    model.set_adapter("lora")
    assert torch.equal(run(model), with_lora)
    model.set_adapter("default")
    assert torch.equal(run(model), both)
    assert torch.equal(run(model, adapter_names=["__base__"] * 2), with_lora)
    assert torch.equal(run(model.unload()), bare)


def test_a_list_of_names_is_for_the_tuner():
    model = attach(make_host())
    model.add_adapter("second", SDPTConfig())
    with pytest.raises(TypeError, match="unhashable type: 'list'"):
        model.set_adapter(["default", "second"])
    model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default", "second"]


# ---- tests and links


@functools.cache
def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_behaviours_name_tests_that_exist():
    rows = [line for line in (DOCS / "behaviours.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row != "| behaviour | test |"]
    assert len(rows) >= 40
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert name in functions(ROOT / file), f"{file} has no {name}"


def test_the_formats_of_data_name_tests_that_exist():
    there = set.union(*(functions(file) for file in (ROOT / "tests" / "detection").rglob("test_*.py")))
    rows = [line for line in (DOCS / "data.md").read_text().splitlines() if line.count(" | ") == 4][1:]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and set(named) <= there, row


def test_messages_of_python_have_their_tests():
    there = set.union(*(functions(file) for file in (ROOT / "tests").rglob("test_*.py")))
    assert set(OF_PYTHON.values()) <= there


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the builder make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{named(page)}: {target}"
        # Each page of the site is built from `docs/` alone.
        assert page.parent != DOCS or file.parent == DOCS, f"{named(page)}: {target} is not on the site"
        assert not anchor or anchor in slugs(file), f"{named(page)}: {target}"


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\(docs/(\w+\.md)", (ROOT / "README.md").read_text()))
    assert linked >= {page.name for page in DOCS.glob("*.md")}


# ---- numbers


def table_rows(page: Path) -> list[list[str]]:
    """Return the cells of all table rows of a page. An empty first cell gets the text of the row above."""
    rows: list[list[str]] = []
    for line in prose(page).splitlines():
        if line.strip().startswith("| "):
            cells = [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]
            rows.append([cells[0] or (rows[-1][0] if rows else ""), *cells[1:]])
    return rows


def test_the_page_on_settings_quotes_the_results():
    results: dict[str, set[str]] = {}
    for row in table_rows(DOCS / "transfer.md"):
        # The method is in the first cell or, where a table is sorted by tasks, in the second.
        for method in row[:2]:
            numbers = (re.findall(r"\d+\.\d", cell) for cell in row[1:])
            results.setdefault(method, set()).update(number for found in numbers for number in found)
    checked = 0
    for row in table_rows(DOCS / "settings.md"):
        method = re.sub(r", scale 0\.7$", "", row[0])
        if method in results:
            quoted = [number for cell in row[1:] for number in re.findall(r"^\d+\.\d\b", cell)]
            assert set(quoted) <= results[method], row
            checked += len(quoted)
    assert checked > 50


def test_the_page_on_settings_computes_time_and_memory_from_the_measurements():
    measured: dict[str, list[list[str]]] = {}
    for row in table_rows(DOCS / "performance.md"):
        measured.setdefault(row[0], []).append(row)
    rows = [row for row in table_rows(DOCS / "settings.md") if row[-1].endswith(" GB") and len(row) == 4]
    device = ""
    for row in rows:
        device = device if row[0] == "the same" else row[0]
        if "cores" in device:
            # The rows have time and memory of inference, and then of a training step.
            time, memory = measured[f"Grounding DINO Tiny, {row[1]}"][2:4]
            seconds, gigabytes = float(time[1].split()[0]), float(memory[1].split()[0])
            ratios = float(time[2].split()[0]), float(memory[2])
        else:
            (gpu,) = measured[f"training step, {row[1]}, {device.split(', ')[1]}"]
            milliseconds, gigabytes = (float(number) for number in re.findall(r"[\d.]+", gpu[1]))
            seconds, ratios = milliseconds / 1000, [float(number) for number in gpu[2].split(", ")]
        for quoted, exact in ((row[2], seconds * ratios[0]), (row[3], gigabytes * ratios[1])):
            number = quoted.split()[0]
            assert number == f"{exact:.{len(number.partition('.')[2])}f}", row
    assert len(rows) == 7
