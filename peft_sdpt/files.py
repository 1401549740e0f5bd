# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reads JSON, writes files and folders completely or not at all, checks their digests, and locks folders.

A file or folder gets its final name only after all of it is on the disk. So a process may be killed at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .errors import InputError, is_full_disk
from .wording import printable, shown_path

# The names of unfinished files and folders end with this.
UNFINISHED = ".unfinished"
# The command that writes to a folder holds a lock on this file.
LOCK = ".sdpt.lock"
# The file with the SHA-256 of all other files of a folder. `sha256sum -c SHA256SUMS` reads it too.
DIGESTS = "SHA256SUMS"
# The escape of half of a surrogate pair. JSON allows it, but the text cannot be encoded.
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
    except (OSError, ValueError) as error:  # a name with a null character raises a ValueError
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{shown_path(file)}: cannot be read ({reason}).") from None
    try:
        value = json.loads(content)
        if _SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        letter = printable(error.object[error.start])
        raise InputError(f"{shown_path(file)}: has {letter}, half of a surrogate pair, which is not text.") from None
    except (RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else printable(str(error), 200)
        raise InputError(f"{shown_path(file)}: not JSON ({reason}).") from None
    return value


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


def write_problem(error: Exception) -> str | None:
    """Return the reason why a file cannot be written, from an exception that was raised during writing.

    Args:
        error: An exception of any class. Python and Pillow raise `OSError`, torch `RuntimeError`, safetensors its own
            class, and tokenizers a plain `Exception`.

    Returns:
        The reason. None if the exception has another cause, or is an `InputError`, which already names the file.
    """
    if isinstance(error, InputError):
        return None
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        # The message of torch 2.13 has only the expected number of bytes.
        return "torch could not write all bytes; the disk is full or out of order"
    if isinstance(error, OSError | RuntimeError | SafetensorError) or is_full_disk(error):
        return str(error)
    return None


@contextlib.contextmanager
def _writing(path: str | os.PathLike) -> Iterator[None]:
    """Raise an `InputError` that names the path if it cannot be written in this context."""
    try:
        yield
    except Exception as error:
        if (problem := write_problem(error)) is None:
            raise
        raise InputError(f"{path}: cannot be written ({problem}).") from error


@contextlib.contextmanager
def only_writer(folder: str | os.PathLike, argument: str = "folder") -> Iterator[None]:
    """Prevent other commands from writing to a folder in this context.

    The operating system removes the lock when the process ends or is killed. On a file system without locks, the
    function prints on stderr that it cannot lock the folder, and goes on.

    Args:
        folder: An existing folder.
        argument: Name of the argument for the message.

    Raises:
        InputError: Another process, or another part of this process, is in this context with the same folder.
    """
    file = Path(folder) / LOCK
    # A soft lock is only a file, which a killed process would leave.
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{argument}={str(folder)!r}: another command is writing to this folder; wait until it ends, or choose "
            "another folder."
        ) from None
    except OSError as error:
        print(f"{folder}: cannot be locked ({error}). Let no other command write to it.", file=sys.stderr)
    try:
        yield
    finally:
        if lock.is_locked:
            # Removed before the lock is released. After that, it could be the file of another process.
            with contextlib.suppress(OSError):
                file.unlink()
            lock.release()


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
    # The name of the file itself may have the greatest length that a file system allows.
    unfinished = file.with_name(f"{secrets.token_hex(8)}{UNFINISHED}")
    try:
        with _writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            follow_umask(unfinished)
            if durable:
                flush(unfinished)
            os.replace(unfinished, file)
    finally:
        # Remove the file that an error or Ctrl-C left.
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the files that killed processes have left in `whole_file`. No other process may write to the folder."""
    for file in Path(folder).glob(f"*{UNFINISHED}"):
        if re.fullmatch(r"[0-9a-f]{16}", file.stem) and file.is_file():
            file.unlink(missing_ok=True)


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
    is_new = not folder.exists()
    try:
        with _writing(folder):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            yield unfinished
            follow_umask(*unfinished.iterdir())
            flush(unfinished)
            for file in sorted(unfinished.iterdir()):
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # it has files
                folder.rmdir()


def publish_folder(unfinished: Path, folder: Path) -> None:
    """Rename a complete folder to its final name.

    Args:
        unfinished: The complete folder, on the same file system as `folder`.
        folder: The final name. It must not exist, or be an empty folder.

    Raises:
        OSError: The folder cannot be flushed or renamed.
    """
    follow_umask(*unfinished.rglob("*"))
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
    """Wait until a file, or a folder with everything in it, is on the disk."""
    for each in (*path.rglob("*"), path):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of each file of a folder into the file `SHA256SUMS` of this folder.

    Args:
        folder: The folder. Files in subfolders are included.

    Raises:
        OSError: A file cannot be read or written.
    """
    lines = [f"{_digest(file)}  {name}\n" for name, file in sorted(_files(folder).items())]
    # With the number of files, `check_digests` notices if the end of `SHA256SUMS` is missing.
    (folder / DIGESTS).write_text(f"# {len(lines)} files\n{''.join(lines)}", encoding="utf-8")


def check_digests(folder: Path) -> bool:
    """Compare the files of a folder with the digests that `write_digests` has written.

    Args:
        folder: The folder. Files that were added later are not checked.

    Returns:
        True if all digests match, False if the folder has no digests.

    Raises:
        InputError: A file is missing or has changed, or `SHA256SUMS` is damaged. The message names the file.
        OSError: A file cannot be read.
    """
    digests = folder / DIGESTS
    if not digests.is_file():
        return False
    files = _files(folder)
    first, *lines = digests.read_bytes().decode(errors="replace").split("\n")
    found = [re.fullmatch(r"(?P<digest>[0-9a-f]{64})  (?P<name>.+)", line) for line in lines[:-1]]
    if first != f"# {len(found)} files" or lines[-1:] != [""] or None in found:
        raise InputError(f"{shown_path(digests)}: is damaged.")
    for match in filter(None, found):
        # A name that leads out of the folder is not opened.
        file = files.get(match["name"])
        if file is None:
            raise InputError(f"{shown_path(folder / match['name'])}: is missing.")
        if _digest(file) != match["digest"]:
            raise InputError(f"{shown_path(file)}: is damaged, because its SHA-256 is not the one in {DIGESTS}.")
    return True


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder except `SHA256SUMS`, by their path relative to the folder."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: file for name, file in files.items() if name != DIGESTS}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()
