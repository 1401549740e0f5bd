# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The main job on few pictures, and runs of it that tests share."""

from __future__ import annotations

import hashlib
import shutil
import signal
from pathlib import Path

import pytest

from peft_sdpt.commands import train
from tests.helpers.main_job import SHORT, run_main_job
from tests.helpers.small_tasks import write_small_task


@pytest.fixture(scope="session")
def small_task(made_once):
    """The built-in task with few pictures, as a COCO folder."""
    return made_once("task", lambda folder: write_small_task(folder, train=12, val=4, test=4))


@pytest.fixture
def own_task(small_task, tmp_path):
    """A copy of the task to damage."""
    return Path(shutil.copytree(small_task, tmp_path / "own"))


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Shells start what they run in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def main_job(tmp_path):
    """Run the main job in this process, with `SHORT`; see `run_main_job`."""

    def run(*flags, charts: bool = False) -> int:
        return run_main_job("--output_dir", tmp_path / "out", *SHORT, *flags, charts=charts)

    return run


@pytest.fixture(scope="session")
def trained(made_once, small_task):
    """The output folder of a run on `small_task` with the given flags. It is made once: tests read it, or copy it."""

    def trained(*flags) -> Path:
        def run(out: Path) -> None:
            run = ("--dataset_name", small_task, "--output_dir", out, *SHORT)
            assert run_main_job(*run, *flags, charts=True) == 0

        return made_once("run-" + hashlib.sha256(repr(flags).encode()).hexdigest()[:12], run)

    return trained


@pytest.fixture
def at_step(monkeypatch):
    """Have something done in the middle of a training step, the first being 1, once."""

    def arrange(step: int, action, accumulated: int = 1) -> None:
        compute, calls = train.GroundedDetectionLoss.__call__, 0

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step * accumulated:
                action()
            return compute(*args, **kwargs)

        monkeypatch.setattr(train.GroundedDetectionLoss, "__call__", call)

    return arrange
