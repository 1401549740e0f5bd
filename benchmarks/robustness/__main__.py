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
from pathlib import Path
from typing import Any

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
from ..runs import add_runs, check_runs, exit_if_failed, one_line_errors, run_cells
from ..transfer.tasks import Task, built_in
from .cost import step_costs
from .grid import TASKS, plan
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
    add_device(parser)
    add_runs(parser)
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
    check_runs(args)
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
    cells = plan(tasks, args.seeds)
    failed = run_cells(
        lambda _: cells,
        run_cell,
        lambda cell: (cell, tasks[cell.task], args.model_name_or_path, args.device),
        results,
        args.output_dir / RESULTS,
        device=args.device,
        num_processes=args.num_processes,
        minutes=args.minutes,
    )
    write(args.output_dir / "report.md", report(results["cells"]))
    print(f"Results: {args.output_dir}/{RESULTS}, table: report.md.")
    exit_if_failed("benchmarks.robustness", failed)


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
    with one_line_errors("benchmarks.robustness"):
        check_args(args)
        if args.render:
            render(args.render)
        else:
            run(args)


if __name__ == "__main__":
    main()
