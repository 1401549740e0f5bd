# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Running `examples/train_detection.py` and comparing what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import train_detection
from peft_sdpt.commands import train_results
from tests.helpers.detectors import ROOT

HOST = ROOT / "examples" / "host"
SCRIPT = ROOT / "examples" / "train_detection.py"

# Flags of every run in a test, unless it gives others. Warm-up starts at a rate of zero: the first of a few steps would
# do nothing.
SHORT = ("--num_warmup_steps", 0, "--per_device_train_batch_size", 4)
# Flags of runs that several tests share.
ONE_STEP = ("--max_train_steps", 1, "--checkpointing_steps", 1)
TWO_STEPS = ("--max_train_steps", 2, "--checkpointing_steps", 1)
# All that is random or kept between steps, in little time.
EVERYTHING = (
    *("--max_train_steps", 6, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2),
    *("--prompt_dropout", 0.3, "--ema_decay", 0.7, "--validation_steps", 2, "--checkpointing_steps", 2),
)


def reset_accelerate() -> None:
    """Before another run in one process: Accelerate keeps its state, precision included, as long as a process lives."""
    AcceleratorState._reset_state(reset_partial_state=True)


def run_main_job(*flags, charts: bool = False) -> int:
    """Run the main job in this process. Returns its exit code, 0 when it just returns.

    Drawing `report.png` and `detections.png` takes a third of a short run, so without `charts` they are empty pictures.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_detection.py", *map(str, flags)])
        if not charts:
            patch.setattr(train_results, "draw_report", draw_nothing)
            patch.setattr(train_results, "side_by_side", lambda *_: Image.new("RGB", (1, 1)))
        reset_accelerate()
        try:
            train_detection.main()
        except SystemExit as exit:
            return exit.code
        return 0


def draw_nothing(record: dict, file: Path) -> None:
    assert record.keys() >= {"curves", "precision_recall", "classes", "errors"}
    Image.new("RGB", (1, 1)).save(file, format="PNG")


def launched(command, **options) -> subprocess.Popen:
    """Start Python with these arguments, on the CPU and with one thread, as tests in this process run."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **options)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the example gets to see it."""


def kill():
    raise Killed


def edit(file: Path, change: Callable) -> None:
    """Change a COCO file."""
    coco = json.loads(file.read_text())
    change(coco)
    file.write_text(json.dumps(coco))


def prompts(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same_prompts(one, two, same=torch.equal):
    """Whether two output folders hold the same adapters, the last and the best, by what `same` takes for the same."""
    for folder in ("", "best"):
        first, second = prompts(one / folder), prompts(two / folder)
        if not all(same(first[key], second[key]) for key in first | second):
            return False
    return True


def same_run(one, two):
    """Whether two output folders hold the same adapters, bit for bit, and the same results, curves included."""
    if not same_prompts(one, two):
        return False
    one, two = (json.loads((out / "metrics.json").read_text()) for out in (one, two))
    # The time and the flags may differ.
    return all(one[key] == two[key] for key in one.keys() - {"train_seconds", "args"})
