# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Check SDPT on a GPU, and measure it there, in at most eight minutes.

    python -m benchmarks.gpu_check

The results of fusion layers are compared with float64, and those of detectors with the CPU. Then time, memory and
kernels are measured. Each section fails alone, and is stopped when its budget of seconds is used up. Results are JSON
lines in docs/gpu-<name of the GPU>.jsonl, with the strings "inf" and "nan" for numbers that are not finite. The last
line of each section says how it ended. The exit code is 1 if a section did not pass. Without a GPU, or with `--dry`,
the same code runs on the CPU with tiny shapes, and writes no file unless `--output` names one. The command needs the
extra `benchmarks`.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch

from ..results import DOCS, Help, device_name
from . import correctness, measurements
from .running import Run, Section, run_section

# Correctness comes first. The budgets sum to less than eight minutes.
SECTIONS = (
    Section("about", measurements.about, 10),
    Section("layers_against_float64", correctness.layers_against_float64, 50),
    Section("detectors", correctness.detectors, 70),
    Section("synchronisations", correctness.synchronisations, 25),
    Section("autocast", measurements.autocast, 10),
    Section("distributed", correctness.distributed, 15),
    Section("kernels", measurements.kernels, 15),
    Section("layers", measurements.layers, 75),
    Section("whole_models", measurements.whole_models, 90),
    Section("compiled", partial(correctness.compiled, dynamic=None), 30),
    Section("compiled_dynamic", partial(correctness.compiled, dynamic=True), 30),
    Section("compiled_training", correctness.compiled_training, 25),
    Section("cuda_graphs", correctness.cuda_graphs, 25),
)


# A CPU may be slow, or shared with others. Budgets are that many times as large in a dry run.
DRY_FACTOR = 20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=Help, allow_abbrev=False
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument(
        "--only", nargs="+", metavar="SECTION", choices=names, default=names,
        help="Run only these sections. Without --output, this writes no file. The sections: %(choices)s.",
    )  # fmt: skip
    parser.add_argument("--dry", action="store_true", help="Run on the CPU with tiny shapes.")
    parser.add_argument("--output", type=Path, help="File for the results, which is replaced.")
    return parser.parse_args()


def output_of(args: argparse.Namespace) -> Path | None:
    """Return the file for the results, or None."""
    if args.output is not None or args.dry or len(args.only) < len(SECTIONS):
        return args.output
    name = device_name("cuda").lower().removeprefix("nvidia ")
    return DOCS / f"gpu-{re.sub('[^a-z0-9]+', '-', name).strip('-')}.jsonl"


def check(args: argparse.Namespace, output: Path | None) -> bool:
    """Run the sections, and write their results into a file. Returns whether all passed."""
    begin = time.perf_counter()
    with contextlib.nullcontext() if output is None else output.open("w", encoding="utf-8") as file:
        run = Run("cpu" if args.dry else "cuda", args.dry, file)
        chosen = [section for section in SECTIONS if section.name in args.only]
        passed = {each.name: run_section(run, each, DRY_FACTOR if args.dry else 1) for each in chosen}
    others = [name for name, good in passed.items() if not good]
    print(f"{len(passed) - len(others)} of {len(passed)} sections passed in {time.perf_counter() - begin:.0f} s.")
    if others:
        print(f"These did not pass: {', '.join(others)}.")
    if output is not None:
        print(f"Results: {output}")
    return not others


def main() -> None:
    args = parse_args()
    # A warning of transformers about a call in PEFT, which does not affect the results.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    if not args.dry and not torch.cuda.is_available():
        print("torch sees no GPU here, so this is a dry run on the CPU with tiny shapes.")
        args.dry = True
    output = output_of(args)
    try:
        passed = check(args, output)
    except OSError as error:
        print(f"benchmarks.gpu_check: --output {output}: {error.strerror or error}.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("benchmarks.gpu_check: interrupted.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
