# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The wheel alone is enough for a training loop, and the package imports only what is needed."""

import json
import math
import os
import shutil
import subprocess
import sys
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the package, installed from a wheel of a copy of the checkout, which stays as it is."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "peft_sdpt", source / "peft_sdpt", ignore=shutil.ignore_patterns("__pycache__"))
    pip = ("-m", "pip", "--disable-pip-version-check")
    check([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source])
    (wheel,) = wheels.glob("*.whl")
    check([*pip, "install", "--quiet", "--no-deps", "--target", target, wheel])
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


def test_the_package_alone_imports_nothing_of_detection_and_training():
    code = "import sys, peft_sdpt; print([name for name in sys.modules if name.startswith('peft_sdpt.')])"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "peft_sdpt.config" in result.stdout
    assert "peft_sdpt.detection" not in result.stdout and "peft_sdpt.training" not in result.stdout
