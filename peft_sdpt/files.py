# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written whole or not at all.

Each gets its name only when all of it is on the disk, so a process can be killed at any time.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import InputError

# Ends the name of everything that is still being written.
UNFINISHED = ".unfinished"
# What torch, safetensors and Pillow raise for a full disk or a file that cannot be written.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@contextlib.contextmanager
def whole_file(file: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path, and move what is written there to `file` at the end.

    Of two processes that write the same file, the later one wins.

    Args:
        file: Path of the file. Its folder is made if it does not exist.
        durable: Whether to wait until the disk has the file. False is faster; after a power cut the file may be empty.

    Raises:
        InputError: The file cannot be written.
    """
    file = Path(file)
    unfinished = file.with_name(f"{file.name}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        if durable:
            flush(unfinished)
        os.replace(unfinished, file)
    except WRITE_ERRORS as error:
        raise InputError(f"{file}: cannot be written ({error}).") from error
    finally:
        # After an error and after Ctrl-C.
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder, and move each file that is written there into `folder` at the end.

    Files of the same name are replaced, and other files in `folder` stay.

    Raises:
        InputError: A file cannot be written.
    """
    folder = Path(folder)
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
        raise InputError(f"{folder}: cannot be written ({error}).") from error


def publish_folder(unfinished: Path, folder: Path) -> None:
    """Give a folder that is complete its name.

    Args:
        unfinished: The folder, on the same file system as `folder`.
        folder: The new name. It must not exist, or be an empty folder.

    Raises:
        OSError: The folder cannot be flushed or renamed.
    """
    flush(unfinished)
    if folder.is_dir():
        folder.rmdir()  # Windows does not replace an empty folder
    os.replace(unfinished, folder)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or a folder and the files in it."""
    for each in (*path.iterdir(), path) if path.is_dir() else (path,):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
