# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Pushing the results of a run to the Hub: whether it can be done, before any work, and the upload after it."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, get_token

from ..errors import InputError


def prepare_push(repo_id: str, token: str | None, accelerator: Accelerator) -> HfApi | None:
    """Make a repository, unless it exists, and check before any work that it can be written.

    All processes of a launch call this together.

    Args:
        repo_id: The repository, `user/name`.
        token: Token to push with. None for that of `hf auth login`.
        accelerator: The accelerator of the launch.

    Returns:
        The client to push with in the main process, None in the others.

    Raises:
        InputError: There is no token, it does not allow writing there, or the Hub cannot be reached.
    """
    api, problem = None, None
    if accelerator.is_main_process:
        token = token or get_token()
        if not token:
            problem = "token=...: there is no token; log in with `hf auth login`, or give one."
        else:
            api = HfApi(token=token)
            try:
                api.create_repo(repo_id, exist_ok=True)
                # An existing repository may belong to somebody else, and the token may be one for reading.
                api.auth_check(repo_id, write=True)
            except Exception as error:  # `huggingface_hub` and its HTTP client raise many kinds
                problem = f"repo_id={repo_id!r}: cannot be pushed to ({error})."
    if problem := broadcast_object_list([problem])[0]:
        raise InputError(problem)
    return api


def push(api: HfApi, repo_id: str, folder: Path, names: list[str]) -> str:
    """Upload files of a folder, as one commit.

    Args:
        names: paths within the folder.

    Returns:
        Where they are now.

    Raises:
        InputError: the upload failed; the folder is as it was.
    """
    try:
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message="Upload an SDPT adapter"
        )
    except Exception as error:  # as above
        raise InputError(
            f"repo_id={repo_id!r}: the upload failed ({error}). Nothing is lost, all is in {folder}; to try "
            f'again: hf upload {repo_id} {folder} . --exclude "step_*/*" --exclude "data/*"'
        ) from None
    return f"{api.endpoint}/{repo_id}"
