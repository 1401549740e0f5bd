# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Downstream tasks: the built-in ones, and folders of photographs in COCO format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.pictograms.tasks import TASKS, write_task
from peft_sdpt.detection.data import DetectionSplit
from peft_sdpt.detection.loading import load_split

# What a task asks of a host that knows Noto's pictograms of 355 names.
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
    """
    Attributes:
        name: for tables.
        folder: in COCO format, with train.json, val.json and test.json.
        image_size: shorter side of pictures, in pixels; None for the processor's own.
    """

    name: str
    folder: Path
    image_size: int | None = None

    def load(self, split: str) -> DetectionSplit:
        return load_split(str(self.folder), split)


def built_in(output_dir: Path) -> list[Task]:
    """The tasks that are generated, written where they are not there yet."""
    tasks = [Task(name, output_dir / "tasks" / name) for name in DIFFERENCES if name in TASKS]
    for task in tasks:
        write_task(task.name, task.folder)
    return tasks
