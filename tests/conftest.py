# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""All tests run with one thread."""

import torch

torch.set_num_threads(1)
