# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, and the SIGTERM of schedulers and launchers, in a training loop: heard when a step is complete."""

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
    """A context in which the first signal is noted, to be asked for, and a second one ends the program at once."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.heard = accelerator, False

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        self.__exit__()
        if self.accelerator.is_local_main_process:
            print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    def asked_for(self) -> bool:
        """Whether any process of the launch has heard a signal. All must ask together."""
        if self.accelerator.num_processes == 1:
            return self.heard
        heard = torch.tensor(int(self.heard), device=self.accelerator.device)
        return bool(self.accelerator.reduce(heard, reduction="sum"))


def leave_signals_to_the_main_process(worker: int) -> None:
    """For DataLoader workers: signals to the whole group reach them as well, and the step at hand needs its images."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Of a run that failed, workers may be left at the end. `multiprocessing` ends them by SIGTERM, which they leave
    to the main process, and waits for them: for ever."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        # By this torch tells of workers that died when they should not have.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
