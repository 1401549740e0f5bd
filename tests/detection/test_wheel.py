# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The source distribution has its tests. The wheel has the commands, and is enough for a training loop."""

import email
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.detectors import ROOT, run_python
from tests.helpers.small_tasks import write_small_task

HOST = ROOT / "examples" / "host"
TRAINING_LOOP = """
import json, sys
import torch
from accelerate import Accelerator
from peft import get_peft_model
import peft_sdpt
from peft_sdpt.detection import GroundedDetectionLoss, TrainingSamples, evaluate
from peft_sdpt.detection import load_base_model, load_processor, load_split

folder, host = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
train, test = load_split(folder, "train"), load_split(folder, "test")
processor = load_processor(None, host)
model = get_peft_model(load_base_model(host), peft_sdpt.SDPTConfig()).train()
samples = TrainingSamples(train, 24, processor, model.config.max_text_len, seed=0, augmentation=False)
loss_function = GroundedDetectionLoss(model.config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
losses = []
for inputs, labels in samples.loader(batch_size=4):
    loss = loss_function(model(**inputs), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
metrics = evaluate(model, processor, test, 4, Accelerator())
files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "peft_sdpt"]
others = [name for name in sys.modules if name.split(".")[0] in ("examples", "benchmarks", "tests", "pictograms")]
print(json.dumps({"losses": losses, "metrics": metrics, "files": files, "others": others}))
"""


def check(command: list, **options) -> str:
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
# Folders and files of a checkout that a source distribution has, without files that tools create there.
PARTS = (".ci", "benchmarks", "docs", "examples", "peft_sdpt", "tests")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "noxfile.py",
         "pyproject.toml", "setup.cfg", "setup.py")  # fmt: skip
NOT_CARRIED = shutil.ignore_patterns("__pycache__", ".*_cache")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The unpacked source distribution of a copy of the checkout, which stays as it is."""
    copy, target = (tmp_path_factory.mktemp(name) for name in ("copy", "sources"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in PARTS:
        shutil.copytree(ROOT / name, copy / name, ignore=NOT_CARRIED)
    check(["-c", BUILD, "build_sdist", target], cwd=copy)
    (archive,) = target.glob("*.tar.gz")
    shutil.unpack_archive(archive, target, filter="data")
    return next(path for path in target.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    """The wheel that is built from the source distribution."""
    target = tmp_path_factory.mktemp("wheels")
    check(["-c", BUILD, "build_wheel", target], cwd=sources)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with the package, installed from the wheel."""
    target = tmp_path_factory.mktemp("target")
    check(["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--target", target, wheel])
    return target


@pytest.mark.slow
def test_a_training_loop_runs_on_the_wheel_alone(installed, tmp_path):
    data = write_small_task(tmp_path / "data", train=4, val=1, test=2)
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    output = check(["-c", TRAINING_LOOP, data, HOST], cwd=tmp_path, env=environment)
    result = json.loads(output.strip().splitlines()[-1])
    assert result["files"] and all(Path(file).is_relative_to(installed) for file in result["files"])
    assert not result["others"]
    assert len(result["losses"]) == 6 and all(map(math.isfinite, result["losses"]))
    assert result["losses"][-1] < 0.9 * result["losses"][0]
    assert set(result["metrics"]) == {"AP", "AP50", "AP75"} and 0 <= result["metrics"]["AP"] <= 1


@pytest.mark.slow
def test_the_wheel_has_all_modules_and_its_types(installed):
    modules = {path.relative_to(ROOT) for path in (ROOT / "peft_sdpt").rglob("*.py")} | {Path("peft_sdpt/py.typed")}
    assert all((installed / module).is_file() for module in modules)


@pytest.mark.slow
def test_the_source_distribution_has_what_its_tests_need(sources):
    for part in PARTS:
        files = {path.relative_to(ROOT) for path in (ROOT / part).rglob("*") if path.is_file()}
        files = {path for path in files if "__pycache__" not in path.parts and path.suffix != ".pyc"}
        assert not [path for path in files if not (sources / path).is_file()], part
    assert all((sources / name).is_file() for name in FILES)
    # Two tests of the unpacked sources run there, with the package of these sources.
    environment = {**os.environ, "PYTHONPATH": str(sources), "OMP_NUM_THREADS": "1"}
    tests = [
        "tests/core/test_layout.py::test_no_circles",
        "tests/detection/test_saved_adapter.py::test_a_saved_adapter_is_found_again",
    ]
    output = check(["-m", "pytest", "-n", "0", "-q", *tests], cwd=sources, env=environment)
    assert " passed" in output and "failed" not in output


@pytest.mark.slow
def test_the_page_of_the_index_has_no_relative_link_or_image(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    urls = dict(url.split(", ", 1) for url in metadata.get_all("Project-URL"))
    assert set(urls) == {"Source", "Documentation", "Issues", "Changelog"}
    assert all(url.startswith(urls["Source"]) for url in urls.values())
    page = metadata.get_payload(decode=True).decode()
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    assert f"{urls['Source']}/raw/main/docs/detections.png" in targets
    assert f"{urls['Source']}/blob/main/docs/index.md#quick-tour" in targets
    assert not [target for target in targets if not target.startswith("https://")]


# Runs the scripts whose paths are given, one after the other, each with `--help`. Prints a line after each.
RUN_SCRIPTS = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("ended", end.code)
"""


@pytest.mark.slow
def test_the_wheel_installs_the_commands(installed, tmp_path):
    commands = ("sdpt-train", "sdpt-detect")

    def run(*paths) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, installed]))}
        command_line = [sys.executable, "-c", RUN_SCRIPTS, *(installed / "bin" / command for command in commands)]
        return subprocess.run(command_line, env=environment, cwd=tmp_path, capture_output=True, text=True)

    result = run()
    helps = result.stdout.split("ended 0\n")
    assert len(helps) == 3 and helps[2] == "", result.stderr
    for command, text in zip(commands, helps, strict=False):
        assert text.startswith(f"usage: {command} ") and "--model_name_or_path" in text
    # Without the extra `detection`, a package is missing.
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text("import sys; sys.modules['scipy'] = None")
    result = run(tmp_path / "without")
    assert result.stdout == "ended 2\nended 2\n" and "Traceback" not in result.stderr
    needs = "peft_sdpt.detection needs the package scipy: pip install peft_sdpt[detection]"
    errors = [line for line in result.stderr.splitlines() if line.startswith("sdpt-")]
    assert errors == [f"{command}: {needs}" for command in commands]


def test_a_missing_package_names_the_extra():
    code = """
import sys
from peft_sdpt import SDPTConfig, initialize_sdpt_prototypes  # the tuner needs no extra
for package in ("scipy", "PIL", "faster_coco_eval", "matplotlib"):
    sys.modules[package] = None  # as if it were not installed
    try:
        from peft_sdpt.detection.loss import GroundedDetectionLoss
    except ImportError as error:
        print(type(error).__name__, error)
    del sys.modules[package]
"""
    needs = "MissingExtraError peft_sdpt.detection needs the package"
    lines = [
        f"{needs} {package}: pip install peft_sdpt[detection]"
        for package in ("scipy", "PIL", "faster_coco_eval", "matplotlib")
    ]
    assert run_python(code).stdout.splitlines() == lines
