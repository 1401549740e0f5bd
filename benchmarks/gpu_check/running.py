# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Runs sections one after another. Each has a budget of seconds, and fails alone."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch


class OutOfTime(BaseException):
    """The budget of a section is used up. It is no `Exception`, so that no library catches it."""


@dataclass
class Run:
    """What all sections share.

    Attributes:
        device: "cuda" or "cpu".
        dry: Whether to use tiny shapes.
        file: File for the rows of results, as JSON lines. None for no file.
        section: Name of the current section.
        faults: What is wrong in the current section.
    """

    device: str
    dry: bool
    file: TextIO | None = None
    section: str = ""
    faults: list[str] = field(default_factory=list)

    def say(self, **row: Any) -> None:
        """Print a row of results, and write it into the file. JSON has no nan and inf, so they are strings there."""
        print(f"{self.section}: " + ", ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)
        if self.file is not None:
            self.file.write(json.dumps(_for_json({"section": self.section, **row}), allow_nan=False) + "\n")
            self.file.flush()

    def require(self, ok: bool, fault: str) -> None:
        """Let the current section fail at its end unless `ok`."""
        if not ok:
            self.faults.append(fault)


def _for_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _for_json(part) for name, part in value.items()}
    return [_for_json(part) for part in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: Name in the results and for `--only`.
        function: Does the work, and calls `Run.say` and `Run.require`.
        seconds: Budget. A section that takes longer is stopped.
    """

    name: str
    function: Callable[[Run], None]
    seconds: float


def run_section(run: Run, section: Section, factor: float = 1) -> bool:
    """Run a section, and print and write how it ended.

    Args:
        run: What all sections share.
        section: The section.
        factor: Factor of its budget.

    Returns:
        Whether it passed.
    """
    run.section, run.faults = section.name, []
    budget = factor * section.seconds
    begin, ending = time.perf_counter(), {"status": "passed"}
    try:
        with _time_limit(budget):
            section.function(run)
    except OutOfTime:
        ending = {"status": "stopped", "error": f"it took longer than its budget of {budget:g} s"}
    except Exception as error:  # whatever is broken in one section, the others are worth the time on a GPU
        trace = traceback.format_exc(limit=-4)
        ending = {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:600]}", "trace": trace[-2000:]}
    if run.faults:
        ending = {**ending, "status": "failed", "faults": run.faults}
    run.say(**ending, seconds=round(time.perf_counter() - begin, 1))
    gc.collect()
    if run.device == "cuda":
        torch.cuda.empty_cache()
    return ending["status"] == "passed"


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    # Again every five seconds, because Python ignores what is raised in a destructor.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
