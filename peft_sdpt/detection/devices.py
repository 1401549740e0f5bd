# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Copies between the CPU and a GPU that wait for the GPU as seldom as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def to_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the CPU in one copy, because each copy waits for the GPU.

    Args:
        tensors: Tensors on one device, of any shapes and dtypes.

    Returns:
        The tensors, without gradients. For a tensor that `to_device` made, this is the tensor on the CPU that it was
        copied from, without a new copy.
    """
    known = {id(tensor): tensor.source for tensor in tensors if hasattr(tensor, "source")}
    rest = [tensor.detach() for tensor in tensors if id(tensor) not in known]
    if not rest:
        return [known[id(tensor)] for tensor in tensors]
    values = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in rest]).cpu()
    parts = values.split([tensor.numel() * tensor.element_size() for tensor in rest])
    # Cloned, because the memory of a dtype must start at a multiple of its size.
    copies = (part.clone().view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, rest, strict=True))
    return [known[id(tensor)] if id(tensor) in known else next(copies) for tensor in tensors]


def to_device(values: Any, device: torch.device) -> Any:
    """Copy inputs or labels to a device.

    Args:
        values: A tensor, or tensors in dicts and lists.
        device: The device.

    Returns:
        The same in plain dicts and lists. Change neither the tensors in `values` nor the returned ones later: `to_cpu`
        takes both for equal. It gives back the tensor in `values` for the returned one.
    """
    if isinstance(values, Mapping):
        return {name: to_device(value, device) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [to_device(value, device) for value in values]
    # From the pinned memory of a DataLoader, the copy does not wait for the GPU.
    moved = values.to(device, non_blocking=True)
    if moved is not values:
        moved.source = values
    return moved
