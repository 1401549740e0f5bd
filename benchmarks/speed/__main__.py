# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measure time, memory and size of SDPT and other methods, as ratios in one run.

    python -m benchmarks.speed

The base models have their full size and random weights. A cell is a base model, an image size, a prompt length and a
task. Its methods are measured in rounds, each method once per round, so that disturbances affect all methods. Ratios
are taken within a round. Without flags, the command measures on a CPU what two cores can do in about an hour, and lists
what it left out. On a GPU, it measures everything. Results are saved in results.json after each cell, and the same
command resumes a run that was stopped. Tables are in report.md, and a plot in report.svg. The command needs the extra
`benchmarks`.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

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
from ..runs import one_line_errors
from .cells import Cell, affordable, everything
from .epochs import measure_epochs
from .measuring import measure
from .methods import METHODS, suitable
from .plot import draw
from .report import left_out, report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAST_REPEATS = 5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-results"), help="Folder for the results.")
    parser.add_argument(
        "--only", help="Measure only cells whose names match this pattern, for instance '*-fusion-*-inference'."
    )
    parser.add_argument("--all", action="store_true", help="Measure everything on a CPU too, which takes many hours.")
    parser.add_argument(
        "--repeats", type=int, default=LEAST_REPEATS, help="Minimum number of rounds per cell. Quick cells take more."
    )
    add_device(parser)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="Dtype of the base models.")
    add_render(parser, "tables and plots of these results.json into docs/performance.md")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check the flags.

    Raises:
        ValueError: The value of a flag is not allowed.
    """
    if args.repeats < LEAST_REPEATS:
        raise ValueError(f"--repeats {args.repeats}: must be at least {LEAST_REPEATS}, for quartiles")
    check_device(args.device)
    check_render(args.render)
    if args.only is not None and not chosen(args):
        names = ", ".join(cell.key for cell in grid(args))
        raise ValueError(f"--only {args.only}: matches no cell; the cells are {names}")


def grid(args: argparse.Namespace) -> list[Cell]:
    return everything() if args.all or args.device == "cuda" else affordable()


def chosen(args: argparse.Namespace) -> list[Cell]:
    return [cell for cell in grid(args) if args.only is None or fnmatch.fnmatch(cell.key, args.only)]


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that all results in a file must have in common."""
    return {
        "device": args.device,
        "name": device_name(args.device),
        **versions(),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "repeats": args.repeats,
    }


def is_done(cell: Cell, results: dict[str, Any]) -> bool:
    wanted = set(cell.methods or suitable(cell.task, cell.is_fusion)) & set(suitable(cell.task, cell.is_fusion))
    return wanted <= results["cells"].get(cell.key, {"methods": {}})["methods"].keys()


def run(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = earlier(args.output_dir / RESULTS, machine(args))
    cells = [cell for cell in chosen(args) if not is_done(cell, results)]
    done = len(chosen(args)) - len(cells)
    with tqdm(total=done + len(cells), initial=done, unit="cell") as progress:
        for cell in cells:
            calls = 0

            def tick(method: str, cell: Cell = cell) -> None:
                nonlocal calls
                calls += 1
                progress.set_postfix_str(f"{cell.key}, call {calls}: {METHODS[method].label}")

            if cell.task == "epoch":
                measured = measure_epochs(args.repeats, args.device, tick)
            else:
                measured = measure(cell, args.repeats, args.device, DTYPES[args.dtype], tick)
            results["cells"][cell.key] = {
                "host": cell.host,
                "label": cell.label,
                "task": cell.task,
                "is_fusion": cell.is_fusion,
                "methods": measured,
            }
            write(args.output_dir / RESULTS, json.dumps(results, indent=1) + "\n")
            progress.update()
            # Frees the base model of this cell before the next one is made.
            del measured
            gc.collect()
    write(args.output_dir / "report.md", report(results, "report.svg"))
    write(args.output_dir / "report.svg", draw(results))
    print(f"Results: {args.output_dir}/{RESULTS}, tables: report.md, plot: report.svg. Not measured:")
    print(left_out(results), end="")


def render(files: list[Path]) -> None:
    """Put the tables and plots of some results into the page on performance."""
    texts = []
    for file in files:
        results = json.loads(file.read_text(encoding="utf-8"))
        plot = f"performance-{results['machine']['device']}.svg"
        (DOCS / plot).write_text(draw(results), encoding="utf-8")
        texts.append(report(results, plot))
    put_into(DOCS / "performance.md", "\n".join(texts))


def main() -> None:
    args = parse_args()
    # A warning of transformers about a call in PEFT, which does not affect the results.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    with one_line_errors("benchmarks.speed"):
        check_args(args)
        if args.render:
            render(args.render)
        else:
            run(args)


if __name__ == "__main__":
    main()
