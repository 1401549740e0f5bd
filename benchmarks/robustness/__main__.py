# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Train SDPT and other methods with and without attacks, and compare how robust they are.

    python -m benchmarks.robustness

The command uses the small base model in `examples/host` and two built-in tasks. Each run trains on all images of a
task, and measures AP on the first 64 images of its test split, clean and after PGD with 20 steps at 2/255 (adaptive). A
few runs are also measured at other distances and after other attacks. Results are saved in results.json after each run,
and the same command resumes. A table is in report.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .. import EXAMPLES
from ..results import (
    DOCS,
    RESULTS,
    Help,
    add_device,
    add_render,
    check_device,
    check_render,
    device_name,
    earlier,
    put_into,
    versions,
    write,
)
from ..transfer.running import prepare_worker
from ..transfer.tasks import Task, built_in
from .cost import step_costs
from .grid import TASKS, Cell, plan
from .report import cost_table, report
from .running import run_cell


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=Path("robustness-results"), help="Folder for the results.")
    parser.add_argument(
        "--model_name_or_path", default=str(EXAMPLES / "host"), help="Folder or Hub id of the base model."
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="Built-in tasks.")
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds.")
    add_device(parser)
    parser.add_argument(
        "--num_processes", type=int, default=len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1,
        help="Number of runs at the same time, with one core each. They share the GPU.",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, help="Start no run after this many minutes. The same command resumes.")
    parser.add_argument(
        "--cost", action="store_true",
        help="Only measure the time of a training step with each way of adversarial training. Use an idle machine.",
    )  # fmt: skip
    add_render(
        parser,
        "table of these results.json into docs/robustness.md, and their data into docs/robustness.json. Of a run that "
        "is in several files, the first counts",
    )
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check the flags.

    Raises:
        ValueError: The value of a flag is not allowed.
    """
    for name in ("seeds", "num_processes"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    check_device(args.device)
    check_render(args.render)


def find_tasks(args: argparse.Namespace) -> dict[str, Task]:
    """Return the tasks that the flags select.

    Raises:
        ValueError: A task is unknown.
    """
    known = {task.name: task for task in built_in(args.output_dir, args.tasks)}
    for name in args.tasks:
        if name not in known:
            raise ValueError(f"--tasks {name}: is unknown")
    return {name: known[name] for name in args.tasks}


def run(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    machine = {"host": Path(args.model_name_or_path).name, **versions()}
    results = earlier(args.output_dir / RESULTS, machine)
    tasks = find_tasks(args)
    if args.cost:
        task = next(iter(tasks.values()))
        results["costs"] = {"on": device_name(args.device), **step_costs(task, args.model_name_or_path, args.device)}
        write(args.output_dir / RESULTS, json.dumps(results) + "\n")
        print(cost_table(results["costs"]))
        return
    failed = run_cells(plan(tasks, args.seeds), tasks, results, args)
    write(args.output_dir / "report.md", report(results["cells"]))
    print(f"Results: {args.output_dir}/{RESULTS}, table: report.md.")
    if failed:
        errors = "".join(f"\n  {key}: {error}" for key, error in failed.items())
        print(f"benchmarks.robustness: these runs failed; the same command tries them again:{errors}", file=sys.stderr)
        sys.exit(1)


def run_cells(
    cells: list[Cell], tasks: dict[str, Task], results: dict[str, Any], args: argparse.Namespace
) -> dict[str, str]:
    """Run the cells that have no results yet. Returns the errors of those that failed."""
    waiting = [cell for cell in cells if cell.key not in results["cells"]]
    running: dict[Future, Cell] = {}
    failed: dict[str, str] = {}
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="run") as progress,
        ProcessPoolExecutor(args.num_processes, context, prepare_worker) as pool,
    ):
        while True:
            out_of_time = args.minutes is not None and time.monotonic() - begin > 60 * args.minutes
            while waiting and len(running) < args.num_processes and not out_of_time:
                cell = waiting.pop(0)
                running[pool.submit(run_cell, cell, tasks[cell.task], args.model_name_or_path, args.device)] = cell
            progress.set_postfix_str(", ".join(cell.key for cell in running.values()))
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    results["cells"][cell.key] = {**asdict(cell), **future.result(), "on": device_name(args.device)}
                except Exception as error:  # the others go on
                    failed[cell.key] = f"{type(error).__name__}: {error}"
                progress.update()
                write(args.output_dir / RESULTS, json.dumps(results) + "\n")


def render(files: list[Path]) -> None:
    """Put the table of some files of results into the documentation."""
    results: dict[str, Any] = {"cells": {}}
    for file in reversed(files):
        found = json.loads(file.read_text(encoding="utf-8"))
        results = {**results, **found, "cells": {**results["cells"], **found["cells"]}}
    for cell in results["cells"].values():
        cell.pop("losses", None)
    write(DOCS / "robustness.json", json.dumps(results) + "\n")
    costs = cost_table(results["costs"]) if "costs" in results else ""
    put_into(DOCS / "robustness.md", report(results["cells"]) + "\n" + costs)


def main() -> None:
    args = parse_args()
    try:
        check_args(args)
        if args.render:
            render(args.render)
        else:
            run(args)
    except ValueError as error:
        print(f"benchmarks.robustness: {str(error).rstrip('.')}.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("benchmarks.robustness: interrupted; the same command resumes.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
