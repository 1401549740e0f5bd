# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Launching a training script: its `Accelerator`, and the CPU cores of each process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..errors import InputError


def make_accelerator(mixed_precision: str | None = None, **options: Any) -> Accelerator:
    """Make the `Accelerator` of a script, and check that it knows all processes that were launched.

    Args:
        mixed_precision: "no", "fp16" or "bf16". None for the setting of `accelerate config`.
        options: Other arguments of `Accelerator`.

    Returns:
        The accelerator.

    Raises:
        InputError: The device does not support `mixed_precision`, or the launcher started more processes than
            Accelerate knows.
    """
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, **options)
    except ValueError as error:
        raise InputError(f"mixed_precision={mixed_precision!r}: {error}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > accelerator.num_processes:
        raise InputError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes, but Accelerate knows only "
            f"{accelerator.num_processes}; on the CPU, set ACCELERATE_USE_CPU=true."
        )
    launched = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if launched and accelerator.device.type == "cpu":
        # accelerate 1.15 cannot launch several processes on the CPU of one machine.
        print(
            "`accelerate launch --cpu --num_processes N` starts only one process. To start N processes on the CPU: "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N SCRIPT",
            file=sys.stderr,
        )
    use_all_cores(accelerator)
    return accelerator


def from_main_process(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call a function in the main process only. All processes of a launch call this together.

    Args:
        accelerator: The accelerator of the launch.
        function: The function. Its result can be pickled.

    Returns:
        Its result, in all processes.

    Raises:
        InputError: The function raised it. All processes raise it.
    """
    result: Any = None
    problem: str | None = None
    if accelerator.is_main_process:
        try:
            result = function()
        except InputError as error:
            problem = str(error)
    result, problem = broadcast_object_list([result, problem])
    if problem is not None:
        raise InputError(problem)
    return result


def use_all_cores(accelerator: Accelerator) -> None:
    """Divide the cores of this machine among its processes, if their launcher chose a single thread by itself.

    `accelerate launch` (1.15) and `torchrun` with several processes (torch 2.13) set OMP_NUM_THREADS to 1 unless the
    user set it. A user may also have set it to 1. Only the launcher's own environment and flags show who set it.
    """
    launched = not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ)
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and not user_chose_threads():
        torch.set_num_threads(cores_per_process(accelerator))


def user_chose_threads() -> bool:
    """Return whether the user chose a number of threads for the launcher. False if the launcher cannot be inspected."""
    try:
        launcher = psutil.Process(os.getppid())
        # `accelerate launch` also accepts dashes in the names of flags.
        flags = {argument.partition("=")[0].replace("-", "_") for argument in launcher.cmdline()}
        # The environment is the one that the launcher was started with, without its own changes.
        return "OMP_NUM_THREADS" in launcher.environ() or "__num_cpu_threads_per_process" in flags
    except psutil.Error:
        return False


def cores_per_process(accelerator: Accelerator) -> int:
    """Count the CPU cores of this machine for each of its processes.

    Args:
        accelerator: The accelerator of the launch.

    Returns:
        The number of cores per process, at least 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
