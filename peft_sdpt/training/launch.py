# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Starting a training script: its `Accelerator`, and the cores that each process may use."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import InputError


def make_accelerator(mixed_precision: str | None = None, **options: Any) -> Accelerator:
    """Make the `Accelerator` of a script, and check that it sees all processes that were launched.

    Args:
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`; None for what `accelerate config` says.
        options: Other arguments of `Accelerator`.

    Raises:
        InputError: The device does not support `mixed_precision`, or the launcher started more processes than
            Accelerate sees.
    """
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, **options)
    except ValueError as error:
        raise InputError(f"mixed_precision={mixed_precision!r}: {error}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > accelerator.num_processes:
        raise InputError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, and Accelerate sees "
            f"{accelerator.num_processes}: on the CPU, set ACCELERATE_USE_CPU=true."
        )
    launched = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if launched and accelerator.device.type == "cpu":
        # accelerate 1.15 has no launcher for several processes on the CPU of one machine.
        print(
            "`accelerate launch --cpu --num_processes N` starts one process. For N on the CPU: "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node N {sys.argv[0]}",
            file=sys.stderr,
        )
    use_all_cores(accelerator)
    return accelerator


def use_all_cores(accelerator: Accelerator) -> None:
    """Share the cores of this machine among its processes, if the launcher gave each a single thread.

    `accelerate launch` (1.15) sets one thread unless `--num_cpu_threads_per_process` is given. A user who asks for
    exactly one thread looks the same, and gets all cores too.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(cores_per_process(accelerator))


def cores_per_process(accelerator: Accelerator) -> int:
    """Number of cores of this machine for each of its processes, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
