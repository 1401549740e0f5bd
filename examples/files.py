# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Files that get their names only once all of them is on the disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from errors import InputError

UNFINISHED = ".unfinished"
# What torch, safetensors and Pillow make of a disk that is full or a file that cannot be written.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder to write files in, which are moved into `folder` at the end, each in one move.

    Raises:
        InputError: if one cannot be written.
    """
    unfinished = folder / f"files{UNFINISHED}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        flush(unfinished)
        for file in sorted(unfinished.iterdir()):
            os.replace(file, folder / file.name)
        unfinished.rmdir()
    except WRITE_ERRORS as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(f"{folder}: cannot be written ({error}).") from None


def flush(folder: Path) -> None:
    """Bring all files of a folder to the disk: after a power cut, a name must not stand for less than its file."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
