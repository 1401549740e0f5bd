# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detection data from a COCO folder or the Hub, as one small class that training and evaluation read."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


class InputError(ValueError):
    """The user's input cannot be used; the message says what, where and why."""


@dataclass
class DetectionSplit:
    """One split of a detection data set.

    Attributes:
        class_names: names of the classes; a label is an index into them.
        image_ids: an id an image, unique.
        sizes: (width, height) of each image, pixels.
        boxes: of each image a list of (x, y, width, height), pixels.
        labels: of each image a class index a box.
        crowds: of each image whether each box stands for a crowd: ignored in evaluation, left out of training.
        open_image: index -> RGB picture.
    """

    class_names: list[str]
    image_ids: list[Any]
    sizes: list[tuple[int, int]]
    boxes: list[list[tuple[float, float, float, float]]]
    labels: list[list[int]]
    crowds: list[list[bool]]
    open_image: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.image_ids)

    def as_coco(self) -> dict:
        """The split as a COCO annotation file, ids being indices."""
        annotations = []
        for image, (boxes, labels, crowds) in enumerate(zip(self.boxes, self.labels, self.crowds, strict=True)):
            for box, label, crowd in zip(boxes, labels, crowds, strict=True):
                annotations.append(
                    {
                        # COCO evaluation takes id 0 for "no match".
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": label,
                        "bbox": list(box),
                        "area": box[2] * box[3],
                        "iscrowd": int(crowd),
                    }
                )
        return {
            "images": [{"id": i, "width": w, "height": h} for i, (w, h) in enumerate(self.sizes)],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.class_names)],
        }


def load_split(dataset_name: str, split: str) -> DetectionSplit:
    """Read a split of a local COCO folder, or of a data set on the Hub.

    Args:
        dataset_name: a folder with `<split>.json` and `images/`, or a Hub id whose rows have `image` and `objects`
            (`bbox` in COCO's x, y, width, height in pixels, and `category`).
        split: "train", "val", "test", ...

    Raises:
        InputError: naming the file, image or annotation that cannot be used.
    """
    folder = Path(dataset_name)
    data = load_coco_folder(folder, split) if folder.exists() else load_hub_split(dataset_name, split)
    if not len(data):
        raise InputError(f"{dataset_name}: split {split!r} has no images.")
    if not data.class_names:
        raise InputError(f"{dataset_name}: split {split!r} has no categories; a prompt needs class names.")
    return data


def load_coco_folder(folder: Path, split: str) -> DetectionSplit:
    file = folder / f"{split}.json"
    if not file.is_file():
        raise InputError(f"{file}: no such file; a COCO folder has train.json, val.json and images/.")
    try:
        coco = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error}).") from None
    if not isinstance(coco, dict) or not {"images", "annotations", "categories"} <= coco.keys():
        raise InputError(f"{file}: not a COCO file; it needs `images`, `annotations` and `categories`.")
    position = {category["id"]: i for i, category in enumerate(coco["categories"])}
    names = [str(category.get("name", "")) for category in coco["categories"]]
    found = defaultdict(list)
    known = {image["id"] for image in coco["images"]}
    if len(known) < len(coco["images"]):
        raise InputError(f"{file}: image ids are not unique.")
    for annotation in coco["annotations"]:
        where = f"{file}: annotation {annotation.get('id')}"
        if annotation["image_id"] not in known:
            raise InputError(f"{where} is of image {annotation['image_id']!r}, which is not in `images`.")
        if annotation["category_id"] not in position:
            raise InputError(f"{where} has the unknown category_id {annotation['category_id']!r}.")
        found[annotation["image_id"]].append(annotation)
    paths = []
    for image in coco["images"]:
        path = folder / "images" / image["file_name"]
        if not path.is_file():
            raise InputError(f"{path}: no such image, but {file.name} lists it.")
        paths.append(path)
    data = DetectionSplit(
        class_names=names,
        image_ids=[image["id"] for image in coco["images"]],
        sizes=[(image["width"], image["height"]) for image in coco["images"]],
        boxes=[[tuple(map(float, a["bbox"])) for a in found[image["id"]]] for image in coco["images"]],
        labels=[[position[a["category_id"]] for a in found[image["id"]]] for image in coco["images"]],
        crowds=[[bool(a.get("iscrowd", 0)) for a in found[image["id"]]] for image in coco["images"]],
        open_image=lambda index: Image.open(paths[index]).convert("RGB"),
    )
    _check_boxes(data, str(file))
    return data


def load_hub_split(dataset_name: str, split: str) -> DetectionSplit:
    from datasets import load_dataset

    try:
        rows = load_dataset(dataset_name, split="validation" if split == "val" else split)
    except Exception as error:  # `datasets` raises many kinds for one cause: it is not there
        raise InputError(
            f"--dataset_name {dataset_name!r}, split {split!r}: no such folder, and the Hub has none ({error})."
        ) from None
    missing = {"image", "objects"} - set(rows.column_names)
    if missing:
        raise InputError(f"{dataset_name}: no column {', '.join(sorted(missing))}; it has {rows.column_names}.")
    objects = rows.features["objects"]
    category = objects["category"] if isinstance(objects, dict) else objects.feature["category"]
    names = getattr(getattr(category, "feature", category), "names", None)
    if names is None:
        raise InputError(f"{dataset_name}: `objects.category` has no class names.")
    annotations = rows["objects"]
    sizes = [rows[index]["image"].size for index in range(len(rows))]
    data = DetectionSplit(
        class_names=list(names),
        image_ids=list(range(len(rows))),
        sizes=sizes,
        boxes=[[tuple(map(float, box)) for box in entry["bbox"]] for entry in annotations],
        labels=[list(entry["category"]) for entry in annotations],
        crowds=[[False] * len(entry["bbox"]) for entry in annotations],
        open_image=lambda index: rows[index]["image"].convert("RGB"),
    )
    _check_boxes(data, f"{dataset_name} ({split})")
    return data


def _check_boxes(data: DetectionSplit, source: str) -> None:
    for image_id, (width, height), boxes in zip(data.image_ids, data.sizes, data.boxes, strict=True):
        for box in boxes:
            problem = None
            if len(box) != 4 or not all(map(math.isfinite, box)):
                problem = "must be four finite numbers x, y, width, height"
            elif box[2] <= 0 or box[3] <= 0:
                problem = "is empty; width and height must be positive"
            # One pixel of grace: annotation tools round.
            elif box[0] < -1 or box[1] < -1 or box[0] + box[2] > width + 1 or box[1] + box[3] > height + 1:
                problem = f"lies outside its image of {width} x {height} pixels"
            if problem:
                raise InputError(f"{source}: image {image_id!r}: box {box} {problem}.")
