# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""All tests run with one thread. Fixtures that several folders use.

Tests with the fixture `device` run on the CPU, and on a GPU where there is one. TEST_DEVICE=pretend runs them on the
pretend GPU of `tests/helpers/pretend.py` instead.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from tests.helpers.hub import serve, use
from tests.helpers.pretend import pretend_gpu

torch.set_num_threads(1)
# Every run tries the same examples, a few hundred in each file. `--hypothesis-profile` chooses another profile.
settings.register_profile(
    "few", max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("thorough", settings.get_profile("few"), max_examples=5000, derandomize=False)
settings.load_profile("few")


# The devices of the tests with the fixture `device`.
CUDA = [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []
DEVICES = [os.environ["TEST_DEVICE"]] if "TEST_DEVICE" in os.environ else ["cpu", *CUDA]


@pytest.fixture(params=DEVICES)
def device(request):
    with pretend_gpu() if request.param == "pretend" else nullcontext():
        yield torch.device(request.param)


@pytest.fixture(params=CUDA or ["pretend"])
def gpu(request):
    """A GPU, pretend or real, for comparisons with the CPU."""
    with nullcontext() if CUDA else pretend_gpu():
        yield torch.device(request.param)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not CUDA:
        pytest.skip("there is no GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The slow tests first, so that no process waits for one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


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
