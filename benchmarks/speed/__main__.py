# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measure time, memory and size of SDPT and its peers, as ratios in one run.

    python -m benchmarks.speed

Hosts have their full size and random weights. Each cell (a host, an image size, a length of prompt and a task) is
measured in turns: every method once a round, so that what disturbs one disturbs all, and ratios are taken within a
round. With no flags it takes what a CPU of two cores can do in about an hour, and says what it left out; on a GPU, all.
Results go to results.json after each cell; the same command goes on where it was stopped. Tables are in report.md,
the picture in report.svg. It needs the extra `benchmarks`.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..results import DOCS, RESULTS, Help, add_device, check_device, device_name, earlier, put_into, versions, write
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
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-results"), help="Where results go.")
    parser.add_argument("--only", help="Measure the cells whose names match, for instance '*-fusion-*-inference'.")
    parser.add_argument("--all", action="store_true", help="The whole grid on a CPU too: many hours.")
    parser.add_argument("--repeats", type=int, default=LEAST_REPEATS, help="Rounds of a cell; quick cells take more.")
    add_device(parser)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="Of the hosts.")
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="FILE",
        help="Measure nothing: put the tables and pictures of these results.json into docs/performance.md.",
    )  # fmt: skip
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a flag asks for what cannot be.
    """
    if args.repeats < LEAST_REPEATS:
        raise ValueError(f"--repeats {args.repeats}: is below {LEAST_REPEATS}, too few for a median with a spread")
    check_device(args.device)
    for file in args.render or ():
        if not file.is_file():
            raise ValueError(f"--render {file}: is not there")
    if args.only is not None and not chosen(args):
        there = ", ".join(cell.key for cell in grid(args))
        raise ValueError(f"--only {args.only}: matches no cell; there are {there}")


def grid(args: argparse.Namespace) -> list[Cell]:
    return everything() if args.all or args.device == "cuda" else affordable()


def chosen(args: argparse.Namespace) -> list[Cell]:
    return [cell for cell in grid(args) if args.only is None or fnmatch.fnmatch(cell.key, args.only)]


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What results depend on, which must not differ within a file."""
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
            # A host of the next cell comes before that of this one is gone, otherwise.
            del measured
            gc.collect()
    write(args.output_dir / "report.md", report(results, "report.svg"))
    write(args.output_dir / "report.svg", draw(results))
    print(f"Results: {args.output_dir}/{RESULTS}, tables: report.md, picture: report.svg. Not measured:")
    print(left_out(results), end="")


def render(files: list[Path]) -> None:
    """Tables and pictures of some results into the page on performance."""
    texts = []
    for file in files:
        results = json.loads(file.read_text(encoding="utf-8"))
        picture = f"performance-{results['machine']['device']}.svg"
        (DOCS / picture).write_text(draw(results), encoding="utf-8")
        texts.append(report(results, picture))
    put_into(DOCS / "performance.md", "\n".join(texts))


def main() -> None:
    args = parse_args()
    # Of transformers, at what PEFT asks of a host; nothing to do with what is measured.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        check_args(args)
        if args.render:
            render(args.render)
        else:
            run(args)
    except ValueError as error:
        print(f"benchmarks.speed: {error}.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("benchmarks.speed: interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
