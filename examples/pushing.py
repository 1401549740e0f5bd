# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Pushing the results of a run to the Hub: whether it can be done, before any work, and the upload after it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token

from errors import InputError


def prepare_push(repo_id: str, token: str | None) -> HfApi:
    """Make the repository, unless it is there, and see that it can be written.

    Args:
        repo_id: `user/name`.
        token: None for the one that the user is logged in with.

    Returns:
        The client to push with.

    Raises:
        InputError: there is no token, or none that may write there; or the Hub cannot be reached.
    """
    token = token or get_token()
    if not token:
        raise InputError("--push_to_hub: there is no token; log in with `hf auth login`, or give --hub_token.")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, exist_ok=True)
        # A repository that is there already may be somebody else's, or the token one for reading.
        api.auth_check(repo_id, write=True)
    except Exception as error:  # `huggingface_hub` and its HTTP client raise many kinds
        raise InputError(f"--hub_model_id {repo_id}: cannot be pushed to ({error}).") from None
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
            f"--push_to_hub: the upload to {repo_id} failed ({error}). Nothing is lost, all is in {folder}; to try "
            f'again: hf upload {repo_id} {folder} . --exclude "step_*/*" --exclude "data/*"'
        ) from None
    return f"{api.endpoint}/{repo_id}"
