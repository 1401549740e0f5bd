# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Pushing the results of a run to the Hub: a check before the run, and the upload after it."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, get_token

from ..errors import InputError, reason
from ..wording import quoted


def prepare_push(repo_id: str, token: str | None, accelerator: Accelerator) -> HfApi | None:
    """Make a repository, if it does not exist, and check that it can be written.

    All processes of a launch call this together, before the run does any work.

    Args:
        repo_id: Id of the repository, `user/name`.
        token: Token with write access. None for the token of `hf auth login`.
        accelerator: The accelerator of the launch.

    Returns:
        In the main process, the client for `push`. None in the other processes.

    Raises:
        InputError: There is no token, it does not have write access, or the Hub cannot be reached.
    """
    api, problem = None, None
    if accelerator.is_main_process:
        token = token or get_token()
        if not token:
            problem = "token=...: there is no token; log in by `hf auth login` or pass one."
        else:
            api = HfApi(token=token)
            try:
                api.create_repo(repo_id, exist_ok=True)
                # An existing repository may belong to somebody else, and the token may allow reading only.
                api.auth_check(repo_id, write=True)
            except Exception as error:  # `huggingface_hub` and its HTTP client raise many kinds of errors
                problem = f"repo_id={quoted(repo_id, 120)}: cannot be pushed to ({reason(error)})."
    if problem := broadcast_object_list([problem])[0]:
        raise InputError(problem)
    return api


def push(api: HfApi, repo_id: str, folder: Path, names: list[str]) -> str:
    """Upload files to the Hub in one commit.

    Args:
        api: The client from `prepare_push`.
        repo_id: Id of the repository, `user/name`.
        folder: Folder of the files.
        names: Paths of the files, relative to the folder.

    Returns:
        The URL of the repository.

    Raises:
        InputError: The upload failed. The folder has not changed.
    """
    try:
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message="Upload an SDPT adapter"
        )
    except Exception as error:  # as in `prepare_push`
        raise InputError(
            f"repo_id={quoted(repo_id, 120)}: the upload failed ({reason(error)}). All files are still in {folder}."
        ) from None
    return f"{api.endpoint}/{repo_id}"
