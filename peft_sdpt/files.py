# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reading JSON, and writing files and folders completely or not at all.

A file or folder gets its final name only after all of it is on the disk. So a process may be killed at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import InputError
from .wording import printable

# The names of unfinished files and folders end with this.
UNFINISHED = ".unfinished"
# The errors of torch, safetensors and Pillow if the disk is full or a file cannot be written.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
# The escape of half of a surrogate pair, which is valid in JSON and in no text.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(file: str | os.PathLike) -> Any:
    """Read a JSON file.

    Args:
        file: Path of the file.

    Returns:
        Its content. All strings in it can be encoded.

    Raises:
        InputError: The file cannot be read, is not JSON, is nested too deeply, or has half of a surrogate pair.
    """
    try:
        content = Path(file).read_bytes()
    except (OSError, ValueError) as error:  # the name is too long, or has a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{_named(file)}: cannot be read ({reason}).") from None
    try:
        value = json.loads(content)
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except (RecursionError, ValueError) as error:  # also half of a surrogate pair
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else printable(str(error), 200)
        raise InputError(f"{_named(file)}: not JSON ({reason}).") from None
    return value


def _named(file: str | os.PathLike) -> str:
    return printable(os.fspath(file), 300)


def check_writable(folder: str | os.PathLike, argument: str = "folder") -> None:
    """Check that files can be written to a folder. Several processes may do this at the same time.

    Args:
        folder: The folder. It is made if it does not exist.
        argument: Name of the argument that the message names.

    Raises:
        InputError: The folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{argument}={str(folder)!r}: cannot be written ({error}).") from error


def output_folder(value: str) -> Path:
    """Convert the value of a flag to a folder, as the `type` of an argument of `argparse`.

    Args:
        value: The value. An empty one would be the current folder.

    Returns:
        The folder, which may not exist yet.

    Raises:
        argparse.ArgumentTypeError: The value is empty.
    """
    if not value:
        raise argparse.ArgumentTypeError("is empty")
    return Path(value)


def _cannot_be_written(path: str | os.PathLike, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be written ({error}).")


@contextlib.contextmanager
def whole_file(file: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path, and move what is written there to `file` at the end.

    If two processes write the same file, the later one wins.

    Args:
        file: Path of the file. Its folder is made if it does not exist.
        durable: Whether to wait until the file is on the disk. False is faster, but a power cut may leave the file
            empty.

    Raises:
        InputError: The file cannot be written.
    """
    file = Path(file)
    unfinished = file.with_name(f"{file.name}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        follow_umask(unfinished)
        if durable:
            flush(unfinished)
        os.replace(unfinished, file)
    except WRITE_ERRORS as error:
        raise _cannot_be_written(file, error) from error
    finally:
        # Remove the file that an error or Ctrl-C left.
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder, and move the files that are written there into `folder` at the end.

    Files with the same name are replaced. Other files in `folder` stay.

    Args:
        folder: The folder. It is made if it does not exist.

    Raises:
        InputError: A file cannot be written.
    """
    folder = Path(folder)
    unfinished = folder / f"files{UNFINISHED}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        follow_umask(*unfinished.iterdir())
        flush(unfinished)
        for file in sorted(unfinished.iterdir()):
            os.replace(file, folder / file.name)
        unfinished.rmdir()
    except WRITE_ERRORS as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise _cannot_be_written(folder, error) from error


def publish_folder(unfinished: Path, folder: Path) -> None:
    """Rename a complete folder to its final name.

    Args:
        unfinished: The complete folder, on the same file system as `folder`.
        folder: The final name. It must not exist, or be an empty folder.

    Raises:
        OSError: The folder cannot be flushed or renamed.
    """
    follow_umask(*unfinished.iterdir())
    flush(unfinished)
    if folder.is_dir():
        folder.rmdir()  # on Windows, renaming does not replace an empty folder
    os.replace(unfinished, folder)


def follow_umask(*files: Path) -> None:
    """Give files that only their owner can read the permissions that a new file has in their folder.

    safetensors 0.8 gives its files the mode 0600, whatever the umask of the user says.

    Args:
        files: Paths of new files. Paths of anything else are ignored.

    Raises:
        OSError: The permissions cannot be changed.
    """
    for file in files:
        # On Windows, files have no such permissions.
        if os.name == "posix" and file.is_file() and not file.stat().st_mode & 0o077:
            # A new file shows the umask. Reading the umask itself would change it for other threads for a moment.
            example = file.with_name(f"{secrets.token_hex(8)}{UNFINISHED}")
            try:
                example.touch(exist_ok=False)
                file.chmod(stat.S_IMODE(example.stat().st_mode))
            finally:
                example.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with the files in it, is on the disk."""
    for each in (*path.iterdir(), path) if path.is_dir() else (path,):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
