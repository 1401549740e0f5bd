# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Tune a detector to downstream tasks by SDPT and by other methods, and compare them.

    python -m benchmarks.transfer

Without flags, the command uses the small base model in `examples/host` and the built-in tasks: pictograms in another
drawing style, as line art, small and crowded, and with new names. --folders adds photos in COCO format. The learning
rate of each method is the best of four, chosen on the validation split of the first task with ten images per class.
Then every method is tuned to every task with three seeds. Four methods are also tuned with other numbers of images, and
SDPT with one setting changed at a time. Results are saved in results.json after each run, and the same command resumes
a suite that was stopped. Tables are in report.md, with the plots next to it.

On a GPU, with the Hub:

    python -m benchmarks.transfer --model_name_or_path IDEA-Research/grounding-dino-tiny \\
        --folders path/to/odinw/* --no_built_in
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .. import EXAMPLES
from ..results import DOCS, RESULTS, Help, add_device, check_device, check_render, earlier, put_into, versions, write
from ..runs import add_runs, check_runs, exit_if_failed, one_line_errors, run_cells
from .grid import plan
from .methods import METHODS
from .plots import plots
from .report import report
from .retention import has_known_names
from .running import run_cell
from .tasks import Task, built_in


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=Path("transfer-results"), help="Folder for the results.")
    parser.add_argument(
        "--model_name_or_path", default=str(EXAMPLES / "host"), help="Folder or Hub id of the base model."
    )
    parser.add_argument(
        "--folders", type=Path, nargs="+", default=[], help="Folders of more tasks in COCO format, with val.json."
    )
    parser.add_argument("--image_size", type=int, help="Shorter side of the images in --folders, in pixels.")
    parser.add_argument("--no_built_in", action="store_true", help="Use only the tasks in --folders.")
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="Methods to compare."
    )
    add_device(parser)
    add_runs(parser)
    parser.add_argument(
        "--render", type=Path, metavar="FILE",
        help="Tune nothing. Put the tables and plots of this results.json into docs/transfer.md, and their data into "
        "docs/transfer.json.",
    )  # fmt: skip
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check the flags.

    Raises:
        ValueError: The value of a flag is not allowed.
    """
    check_runs(args)
    if args.image_size is not None and args.image_size < 1:
        raise ValueError(f"--image_size {args.image_size}: must be at least 1")
    check_device(args.device)
    for folder in args.folders:
        if not folder.is_dir():
            raise ValueError(f"--folders {folder}: is not a folder")
    if args.no_built_in and not args.folders:
        raise ValueError("--no_built_in: needs tasks in --folders")
    check_render([args.render] if args.render else None)


def find_tasks(args: argparse.Namespace) -> list[Task]:
    """Return the tasks that the flags select.

    Raises:
        ValueError: Two tasks have the same name, or the data of a task cannot be used.
    """
    tasks = [] if args.no_built_in else built_in(args.output_dir)
    tasks += [Task(folder.resolve().name, folder.resolve(), args.image_size) for folder in args.folders]
    names = [task.name for task in tasks]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"--folders: several tasks are called {twice.pop()}")
    for task in tasks:
        for split in ("train", "val", "test"):
            task.load(split)  # so that errors are raised now, not after hours
    return tasks


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that all results in a file must have in common.

    The name of the CPU or GPU is not part of it, because it changes only rounding. Each run records it.
    """
    folder = Path(args.model_name_or_path)
    return {
        "host": folder.resolve().name if folder.exists() else args.model_name_or_path,
        "image_size": args.image_size,
        "device": args.device,
        **versions(),
    }


def run(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = earlier(args.output_dir / RESULTS, machine(args))
    tasks = {task.name: task for task in find_tasks(args)}
    results["tasks"], results["seeds"] = list(tasks), args.seeds
    results["methods"] = args.methods
    results["retention"] = has_known_names(args.model_name_or_path)

    failed = run_cells(
        lambda found: plan(results["tasks"], args.methods, args.seeds, found, results["retention"]),
        run_cell,
        lambda cell: (cell, tasks[cell.task], args.model_name_or_path, args.device),
        results,
        args.output_dir / RESULTS,
        device=args.device,
        num_processes=args.num_processes,
        minutes=args.minutes,
    )
    write(args.output_dir / "report.md", report(results))
    for name, plot in plots(results).items():
        write(args.output_dir / name, plot)
    print(f"Results: {args.output_dir}/{RESULTS}, tables: report.md.")
    exit_if_failed("benchmarks.transfer", failed)


def render(file: Path) -> None:
    """Put the tables and plots of a file of results into the documentation."""
    results = json.loads(file.read_text(encoding="utf-8"))
    results["cells"] = {key: shortened(cell) for key, cell in results["cells"].items()}
    write(DOCS / "transfer.json", json.dumps(results) + "\n")
    for name, plot in plots(results).items():
        (DOCS / name).write_text(plot, encoding="utf-8")
    put_into(DOCS / "transfer.md", report(results))


def shortened(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a run that tables need, rounded to four digits."""
    return json.loads(
        json.dumps({name: value for name, value in cell.items() if name not in ("losses", "seconds", "pictures")}),
        parse_float=lambda digits: float(f"{float(digits):.4g}"),
    )


def main() -> None:
    args = parse_args()
    with one_line_errors("benchmarks.transfer"):
        check_args(args)
        if args.render:
            render(args.render)
        else:
            run(args)


if __name__ == "__main__":
    main()
