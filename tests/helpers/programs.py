# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Runs exported programs in a process that has only PyTorch."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from .detectors import run_python

# Programs for images of any size take a minute to write and to load.
ON_DEMAND = pytest.mark.skipif("EXPORTS" not in os.environ, reason="takes minutes; EXPORTS=all runs it")
ALONE = """
import sys
class Missing:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("peft", "peft_sdpt", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Missing())
import torch
files = {"detector.json": ""}
exported = torch.export.load(sys.argv[1], extra_files=files)
program = exported.module()
with torch.no_grad():
    outputs = [program(**inputs) for inputs in torch.load(sys.argv[2])]
names = [*exported.state_dict, *exported.constants]
torch.save({"outputs": outputs, "metadata": files["detector.json"], "names": names}, sys.argv[3])
"""


def alone(file: Path, inputs: list[dict[str, torch.Tensor]], folder: Path) -> tuple[list[dict], dict[str, Any], list]:
    """Run a program on each of several inputs. Returns its outputs, its metadata and the names of its weights."""
    torch.save(inputs, folder / "inputs.pt")
    done = run_python(ALONE, str(file), str(folder / "inputs.pt"), str(folder / "outputs.pt"))
    assert done.returncode == 0, done.stderr
    # Users see no warnings of the file.
    assert "Symbol" not in done.stderr
    saved = torch.load(folder / "outputs.pt")
    return saved["outputs"], json.loads(saved["metadata"]), saved["names"]
