# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The runs of a comparison: in processes of their own, saved one after the other, resumed by the same command."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .results import device_name, write


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how many runs there are, and when."""
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds.")
    parser.add_argument(
        "--num_processes", type=int,
        help="Number of runs at the same time, with one core each. They share the GPU. The default is one per core on "
        "a CPU, and 1 on a GPU.",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, help="Start no run after this many minutes. The same command resumes.")


def check_runs(args: argparse.Namespace) -> None:
    """Check the flags of `add_runs`.

    Raises:
        ValueError: The value of a flag is not allowed.
    """
    for name in ("seeds", "num_processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")


def run_cells(
    plan: Callable[[Mapping[str, Any]], list[Any]],
    run_cell: Callable[..., dict[str, Any]],
    arguments: Callable[[Any], tuple],
    results: dict[str, Any],
    file: Path,
    *,
    device: str,
    num_processes: int | None = None,
    minutes: float | None = None,
) -> dict[str, str]:
    """Run the cells that have no results yet, several at the same time.

    Args:
        plan: Returns the cells, in the order to run them. It gets the results of the cells so far, because they may
            decide what else to run. A cell is a dataclass with a `key`.
        run_cell: Runs a cell and returns its result. It is called in another process.
        arguments: Returns the arguments of `run_cell` for a cell.
        results: Its "cells" maps keys to results. A new result also has the fields of its cell, and `on`, the device.
        file: File for `results`. It is written after each run.
        device: "cpu" or "cuda".
        num_processes: Number of runs at the same time. None for the default of `add_runs`.
        minutes: Start no run after this time. None for no limit.

    Returns:
        The errors of the runs that failed, by key. The other runs go on.

    Raises:
        BrokenProcessPool: The process of a run was killed.
    """
    if num_processes is None:
        num_processes = len(os.sched_getaffinity(0)) if device == "cpu" and sys.platform == "linux" else 1
    found = results["cells"]
    running: dict[Future, Any] = {}
    failed: dict[str, str] = {}
    begin = time.monotonic()
    with (
        tqdm(unit="run") as progress,
        ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), prepare_worker) as pool,
    ):
        while True:
            cells = plan(found)
            begun = found.keys() | failed | {cell.key for cell in running.values()}
            waiting = [cell for cell in cells if cell.key not in begun]
            progress.total, progress.n = len(cells), sum(cell.key in found for cell in cells)
            out_of_time = minutes is not None and time.monotonic() - begin > 60 * minutes
            while waiting and len(running) < num_processes and not out_of_time:
                cell = waiting.pop(0)
                running[pool.submit(run_cell, *arguments(cell))] = cell
            progress.set_postfix_str(", ".join(cell.key for cell in running.values()))
            if not running:
                return failed
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            # Results first. If a run was killed, the loop ends there.
            for future in sorted(done, key=lambda each: each.exception() is not None):
                cell = running.pop(future)
                try:
                    found[cell.key] = {**asdict(cell), **future.result(), "on": device_name(device)}
                except BrokenProcessPool:
                    raise
                except Exception as error:  # a method may not suit a base model or a task
                    failed[cell.key] = f"{type(error).__name__}: {error}"
                write(file, json.dumps(results) + "\n")


def prepare_worker() -> None:
    """Prepare this process for runs on one core."""
    # Ctrl-C ends the process at once. Its run is not in the results and will be repeated.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # Progress bars and warnings would disturb the progress bar of the command. Errors are passed on separately.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _end_with_parent() -> None:
    """End this process when the command is killed. A pool does not do this."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End a command with one line on stderr instead of a traceback.

    A `ValueError` is a flag or a file that cannot be used, with exit code 2. The exit code of a killed run is 1, and
    that of Ctrl-C is 130.
    """
    try:
        yield
    except ValueError as error:
        print(f"{program}: {str(error).rstrip('.')}.", file=sys.stderr)
        sys.exit(2)
    except BrokenProcessPool:
        print(
            f"{program}: a run was killed, perhaps because of a lack of memory; the same command resumes, and needs "
            "less memory with --num_processes 1.",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command resumes.", file=sys.stderr)
        sys.exit(130)


def exit_if_failed(program: str, failed: Mapping[str, str]) -> None:
    """End the command with exit code 1 if runs failed, and say which."""
    if failed:
        errors = "".join(f"\n  {key}: {error}" for key, error in failed.items())
        print(f"{program}: these runs failed; the same command tries them again:{errors}", file=sys.stderr)
        sys.exit(1)
