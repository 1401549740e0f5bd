# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Parts of a training script around its loop: launching, checkpoints, interruption, moving averages and pushing."""

from .averaging import LORA_LEARNING_RATE, averaged, parameter_groups, trained_parameters
from .checkpoints import Checkpoints, Progress, claim_output_dir, latest
from .interruption import Interruption, make_worker_init_fn
from .launch import cores_per_process, from_main_process, make_accelerator
from .pushing import prepare_push, push

__all__ = [
    "LORA_LEARNING_RATE",
    "Checkpoints",
    "Interruption",
    "Progress",
    "averaged",
    "claim_output_dir",
    "cores_per_process",
    "from_main_process",
    "latest",
    "make_accelerator",
    "make_worker_init_fn",
    "parameter_groups",
    "prepare_push",
    "push",
    "trained_parameters",
]
