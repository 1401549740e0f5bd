# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The built-in downstream tasks: generated scenes in another vendor's drawing style, as COCO folders.

python examples/pictograms/tasks.py twemoji path/to/folder
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pictograms import SceneStyle, make_scene, read_categories


@dataclass(frozen=True)
class Task:
    """Scenes of every `every`-th category of the host's pre-training, drawn in `look`."""

    look: SceneStyle
    every: int
    train: int = 600
    val: int = 200
    test: int = 300


TASKS = {
    # Known names in another vendor's style.
    "twemoji": Task(SceneStyle("twemoji"), every=9),
    # The same style without its colours, smaller and more of them.
    "twemoji-small-grey": Task(SceneStyle("twemoji", smallest=0.1, largest=0.3, most=10, grey=True), every=9),
}


def write_task(name: str, folder: Path, size: int = 96, disable_progress: bool = False) -> None:
    """Write a task as a COCO folder: `train.json`, `val.json`, `test.json` and `images/`. Always the same files.

    A folder that is complete is left as it is.
    """
    splits = ("train", "val", "test")
    if all((folder / f"{split}.json").is_file() for split in splits):
        return
    task = TASKS[name]
    categories = read_categories()
    classes = [i for i, category in enumerate(categories) if category.seen][:: task.every]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split in splits:
        images, annotations = [], []
        for index in tqdm(range(getattr(task, split)), desc=f"drawing {name} {split}", disable=disable_progress):
            seed = (zlib.crc32(name.encode()), splits.index(split), index)
            picture, labels, boxes = make_scene(seed, classes, size, task.look)
            file_name = f"{split}_{index:04d}.png"
            picture.save(folder / "images" / file_name, compress_level=1)
            images.append({"id": index, "file_name": file_name, "width": size, "height": size})
            for label, box in zip(labels, boxes, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": label,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        coco = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": categories[i].name} for i in classes],
        }
        # Last and in one move: a split whose file is there has all its images.
        unfinished = folder / f"{split}.json.unfinished"
        unfinished.write_text(json.dumps(coco))
        os.replace(unfinished, folder / f"{split}.json")


if __name__ == "__main__":
    write_task(sys.argv[1], Path(sys.argv[2]))
