# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Handling Ctrl-C and SIGTERM in a training loop, after the current step is completed.

Schedulers and launchers stop a program with SIGTERM.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context that notes the first signal. A second signal ends the program at once.

    Args:
        accelerator: The accelerator of the launch.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = False

    def __enter__(self) -> Interruption:
        self._handlers_before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.__exit__()
        if self.accelerator.is_local_main_process:
            print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    def asked_for(self) -> bool:
        """Return whether any process of the launch has received a signal. All processes call this together."""
        if self.accelerator.num_processes == 1:
            return self.received
        received = torch.tensor(int(self.received), device=self.accelerator.device)
        return bool(self.accelerator.reduce(received, reduction="sum"))


def make_worker_init_fn(num_workers: int) -> Callable[[int], None] | None:
    """Make a `worker_init_fn` for a DataLoader whose workers leave Ctrl-C and SIGTERM to the main process.

    A signal to the whole process group also reaches the workers, but the current step still needs their images. At the
    exit of the main process, the workers that are left end at SIGTERM, which `multiprocessing` then sends. Otherwise
    it would wait for them forever.

    Args:
        num_workers: Number of workers of the DataLoader.

    Returns:
        The function, for this process only. None without workers.
    """
    return functools.partial(_ignore_signals, _exit_flag(os.getpid())) if num_workers else None


def _ignore_signals(main_process_exits: Any, worker: int) -> None:
    """Ignore signals in a DataLoader worker until the main process exits."""

    def receive(number: int, frame: FrameType | None) -> None:
        if main_process_exits.value:
            # With exit code 0, the main process does not report a failed worker.
            os._exit(0)

    for number in SIGNALS:
        signal.signal(number, receive)


@functools.cache
def _exit_flag(process: int) -> Any:
    """Return the flag, shared with the workers, that tells whether this process, which has the given id, exits."""
    # Without a lock, because a worker that was killed could hold it.
    flag = multiprocessing.RawValue("b", 0)
    atexit.register(_set_exit_flag, flag, process)
    return flag


def _set_exit_flag(flag: Any, process: int) -> None:
    # A fork of the main process inherits its exit handlers.
    if os.getpid() == process:
        flag.value = 1
