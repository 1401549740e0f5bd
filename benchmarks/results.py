# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Files of results that a command can resume from, and pages with results."""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peft_sdpt.version
from peft_sdpt.files import whole_file

from . import EXAMPLES

DOCS = EXAMPLES.parent / "docs"
RESULTS = "results.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the description."""


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def add_device(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="Device to run on.")


def check_device(device: str) -> None:
    """Check that a device exists.

    Raises:
        ValueError: It does not exist.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")


def add_render(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the flag that puts earlier results into a page. `what` names the parts and the page."""
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="FILE",
        help=f"Measure nothing. Put the {what}.",
    )  # fmt: skip


def check_render(files: Iterable[Path] | None) -> None:
    """Check the files of `--render`.

    Raises:
        ValueError: One does not exist.
    """
    for file in files or ():
        if not file.is_file():
            raise ValueError(f"--render {file}: no such file")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that all results depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "peft_sdpt": peft_sdpt.version.__version__,
    }


def earlier(file: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Read the results of an earlier run to resume from. If the file does not exist, there are no results.

    Args:
        file: File with the results.
        machine: Everything that all results in a file must have in common.

    Raises:
        ValueError: The file is not JSON, or its results have other values in `machine`.
    """
    if not file.exists():
        return {"machine": machine, "cells": {}}
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from None
    before = results["machine"]
    changed = [f"{name} {before.get(name)}" for name in machine | before if before.get(name) != machine.get(name)]
    if changed:
        raise ValueError(f"{file}: was measured with {', '.join(changed)}; choose another --output_dir")
    return results


def write(file: Path, text: str) -> None:
    """Write a file completely or not at all, because a run may be killed at any time."""
    with whole_file(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def put_into(page: Path, text: str) -> None:
    """Replace the text between the two marks of a page.

    Raises:
        ValueError: The page does not have each mark once and in this order.
    """
    before = page.read_text(encoding="utf-8")
    pattern = re.compile(f"(?s){re.escape(BEGIN)}.*{re.escape(END)}")
    if len(pattern.findall(before)) != 1:
        raise ValueError(f"{page}: has no {BEGIN} ... {END}.")
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n{END}", before), encoding="utf-8")
