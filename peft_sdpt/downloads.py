# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Downloads files from the Hub, and removes damaged files from its cache.

`huggingface_hub` compares only the length of a file with the length that the Hub announces. A file whose content was
damaged during the download would stay in the cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .wording import enumerated

# Seconds that a command waits for an answer of the Hub. Downloads of files have a shorter limit.
MAX_WAIT = 60.0


class DamagedFileError(OSError):
    """A file in the cache of the Hub is damaged. It was removed, so that the next try downloads it again."""


def limit_waiting() -> None:
    """Set a time limit of a minute for each request to the Hub in this process.

    huggingface_hub 2.4 has a time limit for downloads of files, but waits forever for other answers. The commands call
    this function. The library does not, because the HTTP client belongs to the program that uses it.
    """
    hooks = get_session().event_hooks
    if _limit_waiting not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _limit_waiting]}


def _limit_waiting(request: Any) -> None:
    # A limit of the client would have no effect, because most functions of huggingface_hub pass `timeout=None`.
    limits = request.extensions.get("timeout") or {}
    for name in ("connect", "read", "write", "pool"):
        if limits.get(name) is None:
            limits = {**limits, name: MAX_WAIT}
    request.extensions = {**request.extensions, "timeout": limits}


def download(repository: str, names: Sequence[str], subfolder: str | None = None) -> Path | None:
    """Download files of a repository, all of the same commit, and check their content.

    `snapshot_download` of huggingface_hub 2.4 first asks for the list of files, and waits forever for the answer. The
    download of a single file has a time limit.

    Args:
        repository: Id of the repository.
        names: Names of the files. Files that the repository does not have are left out, except the first one.
        subfolder: Folder in the repository.

    Returns:
        The folder of the files in the cache. None if the repository does not have the first file.

    Raises:
        OSError: A file cannot be downloaded, and the cache does not have it either.
        DamagedFileError: A file is damaged. It was removed from the cache.
    """
    files: list[Path] = []
    for name in names:
        path = f"{subfolder}/{name}" if subfolder else name
        commit = _commit(files[0], path_depth=path.count("/")) if files else None
        try:
            files.append(Path(hf_hub_download(repository, path, revision=commit)))
        except LocalEntryNotFoundError:  # the Hub cannot be reached
            # The file can be left out if the cache knows that it does not exist, or if the user works offline.
            known = try_to_load_from_cache(repository, path, revision=commit)
            if not files or not (constants.HF_HUB_OFFLINE or (known is not None and not isinstance(known, str))):
                raise
        except EntryNotFoundError:
            if not files:
                return None
    remove_damaged(files)
    return files[0].parent


def _commit(file: Path, path_depth: int) -> str:
    """Return the commit of a file in the cache, whose path is `snapshots/<commit>/<path in the repository>`."""
    return file.parents[path_depth].name


def check_cache(repository: str) -> None:
    """Remove the damaged files of a repository from the cache. Call this if one of its files could not be loaded.

    Args:
        repository: A Hub id. For any other text, the function does nothing.

    Raises:
        DamagedFileError: A file was damaged.
    """
    try:
        config = try_to_load_from_cache(repository, "config.json")
    except ValueError:  # not a Hub id
        return
    if isinstance(config, str):
        remove_damaged(path for path in Path(config).parent.rglob("*") if path.is_file())


def remove_damaged(files: Iterable[Path]) -> None:
    """Remove files from the cache of the Hub if their content is not what the Hub announced.

    In the cache, each path is a link to a file whose name is the ETag. It is the SHA-256 for files of git LFS, and
    the SHA-1 of the git object for other files. If a mirror of the Hub uses other ETags, or the cache has no links, the
    file is not checked.

    Args:
        files: Paths in the cache.

    Raises:
        DamagedFileError: At least one file is damaged. All damaged files have been removed.
    """
    damaged = [file for file in files if not _is_intact(file.resolve())]
    for file in damaged:
        content = file.resolve()
        file.unlink(missing_ok=True)
        content.unlink(missing_ok=True)
    if damaged:
        names = enumerated(sorted(file.name for file in damaged))
        raise DamagedFileError(f"the downloaded {names} had another content than on the Hub and was removed; try again")


def _is_intact(content: Path) -> bool:
    match = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", content.name)
    if match is None or not content.is_file():
        return True
    # The second SHA-1 is that of the content alone, which a mirror may use.
    digests = [hashlib.sha256()] if len(match[0]) == 64 else [hashlib.sha1(), hashlib.sha1()]
    if len(digests) == 2:
        digests[0].update(f"blob {content.stat().st_size}\0".encode())
    with content.open("rb") as file:
        while part := file.read(2**20):
            for digest in digests:
                digest.update(part)
    return match[0] in [digest.hexdigest() for digest in digests]
