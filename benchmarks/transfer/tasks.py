# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Downstream tasks: the built-in ones, and folders of photos in COCO format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from examples.pictograms.tasks import TASKS, write_task
from peft_sdpt.detection.data import DetectionSplit
from peft_sdpt.detection.loading import load_split

# How each task differs from the pre-training of examples/host, which uses Noto's pictograms with 355 names.
DIFFERENCES = {
    "twemoji": "known categories in another drawing style",
    "twemoji-line-art": "known categories as line art without colours",
    "noto-new": "new categories in a known style",
    "twemoji-crowded": "known categories in another style, small and crowded",
    "bccd": "photographs of blood cells under a microscope",
    "boards": "photographs of microcontroller boards",
}


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: Name for tables.
        folder: Folder in COCO format with train.json, val.json and test.json.
        image_size: Shorter side of the resized images in pixels. None for that of the processor.
    """

    name: str
    folder: Path
    image_size: int | None = None

    def load(self, split: str) -> DetectionSplit:
        return load_split(str(self.folder), split)


def built_in(output_dir: Path, names: Iterable[str] = DIFFERENCES) -> list[Task]:
    """Return the built-in tasks with these names. Their files are generated, unless they exist."""
    tasks = [Task(name, output_dir / "tasks" / name) for name in names if name in TASKS]
    for task in tasks:
        write_task(task.name, task.folder)
    return tasks
