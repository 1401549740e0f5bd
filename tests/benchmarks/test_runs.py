# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The processes in which a comparison runs."""

import json
import subprocess
import sys
from dataclasses import dataclass

import psutil
import pytest

from benchmarks import runs
from benchmarks.runs import one_line_errors, run_cells
from tests.helpers.detectors import ROOT
from tests.helpers.patience import wait_until

# `exec` is a run that another process can import.
ENDLESS = """
from dataclasses import dataclass
from pathlib import Path
from benchmarks.runs import run_cells

@dataclass
class Cell:
    key: str = "one"

code = (
    "import os, time; open({file!r} + '.new', 'w').write(str(os.getpid())); "
    "os.rename({file!r} + '.new', {file!r}); time.sleep(6000)"
)
results, file = {{"cells": {{}}}}, Path({file!r} + ".json")
run_cells(lambda _: [Cell()], exec, lambda _: (code,), results, file, device="cpu", num_processes=1)
"""


@dataclass
class Cell:
    key: str


def has_ended(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_run_ends_with_a_command_that_is_killed(tmp_path):
    file = tmp_path / "pid"
    command = subprocess.Popen([sys.executable, "-c", ENDLESS.format(file=str(file))], cwd=ROOT)
    try:
        wait_until(file.exists)
    finally:
        command.kill()
        command.wait()
    wait_until(lambda: has_ended(int(file.read_text())))


def test_a_run_that_is_killed_is_an_error_on_one_line_and_earlier_results_stay(tmp_path, capsys):
    codes = {"good": "{'AP': 0.5}", "killed": "__import__('os')._exit(1)", "late": "{}"}
    results = {"cells": {"earlier": {"AP": 0.1}}}
    with pytest.raises(SystemExit) as end, one_line_errors("it"):
        run_cells(
            lambda _: [Cell(key) for key in ("earlier", *codes)],
            eval,
            lambda cell: (codes[cell.key],),
            results,
            tmp_path / "results.json",
            device="cpu",
            num_processes=1,
        )
    assert end.value.code == 1
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert cells == {"earlier": {"AP": 0.1}, "good": {"key": "good", "AP": 0.5, "on": runs.device_name("cpu")}}
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("it: a run was killed, perhaps because of a lack of memory")
    )
