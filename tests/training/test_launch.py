# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Real launches use all cores, unless the user chose a number of threads."""

import os
import subprocess
import sys

import pytest

from tests.helpers.detectors import ROOT
from tests.helpers.patience import PATIENCE

ALL = 7  # stands for the cores of a process
SCRIPT = f"""
import os, torch
from peft_sdpt.training import launch
launch.cores_per_process = lambda accelerator: {ALL}
launch.make_accelerator()
os.write(1, b"threads: %d\\n" % torch.get_num_threads())  # at once, so that two processes do not mix their lines
"""
ACCELERATE = ("-m", "accelerate.commands.launch")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "chosen", "threads"),
    [
        (ACCELERATE, None, ALL),
        (ACCELERATE, "1", 1),
        ((*ACCELERATE, "--num-cpu-threads-per-process=1"), None, 1),
        (TORCHRUN, None, ALL),
    ],
)
def test_a_launcher_without_a_number_of_threads_gives_all_cores(tmp_path, launcher, chosen, threads):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": chosen} if chosen else {}
    command = [sys.executable, *launcher, str(tmp_path / "script.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("threads:")]
    assert lines == [f"threads: {threads}"] * (2 if launcher is TORCHRUN else 1)
