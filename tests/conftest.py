# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""One thread, and the checkout's own package and test helpers on the path."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

torch.set_num_threads(1)
