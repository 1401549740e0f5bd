# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Copies results from a GPU. Each copy waits for the GPU, so several tensors are copied together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the CPU in one copy.

    Args:
        tensors: Tensors of any shapes on one device. They are copied in single precision, which holds booleans, and
            integers below 2**24, without loss.

    Returns:
        The tensors, with their dtypes.
    """
    values = torch.cat([tensor.detach().flatten().float() for tensor in tensors]).cpu()
    parts = values.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]
