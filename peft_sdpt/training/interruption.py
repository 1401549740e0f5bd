# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Handling Ctrl-C and SIGTERM in a training loop, after the current step is completed.

Schedulers and launchers stop a program with SIGTERM.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
from types import FrameType

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


def leave_signals_to_the_main_process(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM: a `worker_init_fn` for DataLoader workers.

    A signal to the whole process group also reaches the workers, but the current step still needs their images.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kill DataLoader workers that are left after a failed run.

    At exit, `multiprocessing` sends them SIGTERM, which they ignore, and would wait for them forever.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        # The handler of torch would report the killed workers as an error.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
