# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Files of tensors that are found again by a hash of everything that determines them."""

from __future__ import annotations

import errno
import hashlib
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..files import whole_file

# Bytes that stored tensors leave free on the disk for the adapter and the results.
RESERVE = 2**28


def weights_of(module: nn.Module) -> Iterator[str | Tensor]:
    """Yield the name of each parameter and buffer, and its value on the CPU, for `digest`."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield name
        yield tensor.detach().cpu()


def digest(parts: Iterable[str | Tensor]) -> str:
    """Compute a hash of texts and tensors on the CPU, as 64 hex digits."""
    result = hashlib.sha256()
    for part in parts:
        kind, data = ("text", part.encode()) if isinstance(part, str) else (_kind(part), _bytes(part))
        # Kind and length are hashed too, so that the end of one part cannot be taken for the start of the next.
        result.update(f"{kind} {len(data)} ".encode())
        result.update(data)
    return result.hexdigest()


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _bytes(tensor: Tensor) -> Any:
    """Return the memory of a tensor on the CPU as an array of uint8, for a hash or a checksum."""
    # Viewed as uint8, because NumPy has no bfloat16.
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _about(key: str, tensors: list[Tensor]) -> dict[str, str]:
    """Return the metadata of an entry: its key and a checksum of its tensors."""
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(_bytes(tensor), zlib.crc32(_kind(tensor).encode(), checksum))
    # A single value, because the order of several is random and the same tensors should give the same file.
    return {"entry": f"{key} {checksum}"}


def read_tensors(file: Path, key: str) -> list[Tensor] | None:
    """Read tensors that `write_tensors` wrote with this key, mapped into memory.

    Returns:
        The tensors. None if the file does not exist, is damaged or has another key.
    """
    try:
        with safe_open(file, framework="pt") as entry:
            about = entry.metadata()
            tensors = [entry.get_tensor(str(level)) for level in range(len(entry.keys()))]
    except (OSError, ValueError, RuntimeError, SafetensorError):
        return None
    # The checksum also detects an entry of the right length whose blocks never reached the disk.
    return tensors if tensors and about == _about(key, tensors) else None


def write_tensors(file: Path, key: str, tensors: list[Tensor]) -> None:
    """Write tensors on the CPU, completely or not at all.

    Raises:
        InputError: They cannot be written, or the disk would have less than `RESERVE` left.
    """
    data = save({str(level): tensor for level, tensor in enumerate(tensors)}, metadata=_about(key, tensors))
    # `durable` is not needed, because the checksum detects an entry that a power cut has damaged.
    with whole_file(file, durable=False) as unfinished:
        disk = shutil.disk_usage(unfinished.parent)
        # Some network drives report a size of 0.
        if disk.total and disk.free < RESERVE + len(data):
            raise OSError(errno.ENOSPC, f"less than {RESERVE // 2**20} MB would be left on the disk")
        unfinished.write_bytes(data)
