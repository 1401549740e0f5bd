# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the weights of a saved adapter can be had and are its own, found out before a host is touched.

PEFT attaches an adapter first and fetches and reads its weights afterwards: whatever goes wrong then leaves the host
with an adapter of random numbers on it.
"""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights


def check_saved_weights(
    model_id: str | os.PathLike, subfolder: str | None, shapes: dict[str, tuple[int, ...]], **download: Any
) -> None:
    """Read the weights of an adapter as PEFT will, and drop them. Where there are none, there is nothing to check.

    Args:
        model_id: folder, or repository of the Hub; what is fetched from there stays in the cache for PEFT.
        subfolder: within it.
        shapes: name of a fusion layer to shape of its prompts, from the adapter's config; empty if it does not say.
        download: for `huggingface_hub.hf_hub_download`: `revision`, `token`, `cache_dir` and so on.

    Raises:
        ValueError: the weights cannot be fetched or read, or prompts are missing, surplus or of another shape.
    """
    path = os.path.join(model_id, subfolder or "")
    if os.path.isdir(path) and not any(
        os.path.exists(os.path.join(path, name)) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    ):
        return
    try:
        weights = load_peft_weights(model_id, device="cpu", subfolder=subfolder, **download)
    except Exception as error:  # of safetensors, pickle, the file system, HTTP
        cause = error.__context__ if isinstance(error, ValueError) else None
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return  # a repository with a config alone
        raise ValueError(
            f"The weights of the SDPT adapter {path!r} cannot be loaded, and nothing was put on the host: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not shapes:
        return
    prefix, suffix = "base_model.model.", ".sdpt_prompts"
    found = {
        key.removeprefix(prefix).removesuffix(suffix): tuple(v.shape) for key, v in weights.items() if suffix in key
    }
    if differences := differing_shapes(found, shapes):
        raise ValueError(
            f"The weights of the SDPT adapter {path!r} are not those of its config, and nothing was put on the host "
            f"(expected: prompts that the config tells of, found: prompts of the weights). {differences}."
        )


def differing_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    """Every fusion layer whose prompts are not as expected, with both shapes, for a message; empty if all are."""
    return "; ".join(
        f"layer '{name}': expected {expected.get(name, 'no such fusion layer')}, found {found.get(name, 'no prompts')}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    )
