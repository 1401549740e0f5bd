# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The built-in task with few pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pictograms import tasks


def write_small_task(folder: Path, **pictures: int) -> Path:
    """Write "twemoji" as a COCO folder, with so many pictures of each split."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "twemoji", dataclasses.replace(tasks.TASKS["twemoji"], **pictures))
        tasks.write_task("twemoji", folder, disable_progress=True)
    return folder
