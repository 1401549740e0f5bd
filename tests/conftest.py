# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""All tests run with one thread. Fixtures that several folders use."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from tests.helpers.hub import serve, use

torch.set_num_threads(1)
# Every run tries the same examples, a few hundred in each file. `--hypothesis-profile` chooses another profile.
settings.register_profile(
    "few", max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("thorough", settings.get_profile("few"), max_examples=5000, derandomize=False)
settings.load_profile("few")


def pytest_collection_finish() -> None:
    # Accelerate collects garbage in every run. What was imported is none.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], object]], Path]:
    """Make a folder once for all tests of all worker processes, which only read it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "made-once"
    folder.mkdir(exist_ok=True)

    def made_once(name: str, make: Callable[[Path], object]) -> Path:
        made, done = folder / name, folder / f"{name}.done"
        with FileLock(folder / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(made, ignore_errors=True)  # what a failed test left
                make(made)
                done.touch()
        return made

    return made_once


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server in place of the Hub."""
    with serve() as hub:
        use(hub, monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def impatient(monkeypatch):
    """The client of the Hub waits between its attempts."""
    monkeypatch.setattr("time.sleep", lambda _: None)
