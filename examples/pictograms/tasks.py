# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The built-in downstream tasks: COCO folders of generated scenes that pre-training does not use.

python -m examples.pictograms.tasks twemoji path/to/folder
"""

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from peft_sdpt.errors import InputError, one_line_errors
from peft_sdpt.files import UNFINISHED, whole_file

from . import SceneStyle, read_categories, scene_split


@dataclass(frozen=True)
class Task:
    """A downstream task.

    Attributes:
        look: How the scenes look.
        every: The task uses every `every`-th category.
        seen: Whether its categories are those of pre-training or the others.
        train, val, test: Number of images in each split.
    """

    look: SceneStyle
    every: int
    seen: bool = True
    train: int = 600
    val: int = 200
    test: int = 300

    def classes(self) -> list[int]:
        """Indices into `read_categories()`."""
        return [i for i, category in enumerate(read_categories()) if category.seen == self.seen][:: self.every]


TASKS = {
    # Known names in the style of another vendor.
    "twemoji": Task(SceneStyle("twemoji"), every=9),
    # The same style without colours, with smaller and more pictograms.
    "twemoji-small-grey": Task(SceneStyle("twemoji", smallest=0.1, largest=0.3, most=10, grey=True), every=9),
    # Small and crowded pictograms only, and line drawings without colours.
    "twemoji-crowded": Task(SceneStyle("twemoji", smallest=0.1, largest=0.3, most=12), every=9),
    "twemoji-line-art": Task(SceneStyle("twemoji", grey=True, line_art=True), every=9),
    # Names that pre-training does not use, in its style.
    "noto-new": Task(SceneStyle("noto"), every=1, seen=False),
}


def write_task(name: str, folder: Path, disable_progress: bool = False, size: int = 96) -> None:
    """Write a task as a COCO folder: `train.json`, `val.json`, `test.json` and `images/`.

    A complete folder is not changed.

    Args:
        name: A key of `TASKS`.
        folder: Folder to write to.
        disable_progress: Whether to hide the progress bar.
        size: Width and height of the images in pixels.
    """
    splits = ("train", "val", "test")
    if all((folder / f"{split}.json").is_file() for split in splits):
        return
    task = TASKS[name]
    classes = task.classes()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f"*{UNFINISHED}"):  # left by a process that was killed
        unfinished.unlink()
    for split in splits:
        seeds = [(zlib.crc32(name.encode()), splits.index(split), index) for index in range(getattr(task, split))]
        data = scene_split(seeds, classes, size, task.look)
        coco = data.as_coco()
        for image in tqdm(coco["images"], desc=f"drawing {name} {split}", disable=disable_progress):
            image["file_name"] = f"{split}_{image['id']:04d}.png"
            data.open_image(image["id"]).save(folder / "images" / image["file_name"], compress_level=1)
        # Written last, so that a split with this file has all its images.
        with whole_file(folder / f"{split}.json") as unfinished:
            unfinished.write_text(json.dumps(coco))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.pictograms.tasks", description="Write a built-in task as a COCO folder."
    )
    parser.add_argument("task", choices=TASKS, help="Name of the task.")
    parser.add_argument("folder", type=Path, help="Folder to write to. It is made if it does not exist.")
    args = parser.parse_args()
    with one_line_errors("pictograms.tasks"):
        try:
            write_task(args.task, args.folder)
        except OSError as error:
            raise InputError(f"{args.folder}: cannot be written ({error}).") from None


if __name__ == "__main__":
    main()
