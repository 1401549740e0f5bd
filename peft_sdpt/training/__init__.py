# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Parts of a training script around its loop: launching, checkpoints, interruption, moving averages and pushing."""

from .averaging import averaged, trained_parameters
from .checkpoints import Checkpoints, Progress, check_writable, claim_output_dir, latest
from .interruption import Interruption, leave_signals_to_the_main_process
from .launch import cores_per_process, make_accelerator
from .pushing import prepare_push, push

__all__ = [
    "Checkpoints",
    "Interruption",
    "Progress",
    "averaged",
    "check_writable",
    "claim_output_dir",
    "cores_per_process",
    "latest",
    "leave_signals_to_the_main_process",
    "make_accelerator",
    "prepare_push",
    "push",
    "trained_parameters",
]
