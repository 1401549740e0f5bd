# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detection data from a COCO folder or the Hub, as one small class that training and evaluation read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image, ImageOps

from errors import InputError
from peft_sdpt.grounding import class_prompt

# What is read of each entry of a COCO file.
COCO_FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


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


def centre_boxes(boxes: list[tuple[float, float, float, float]], size: tuple[int, int]) -> torch.Tensor:
    """Boxes (x, y, width, height) in pixels as a detector takes them: centre, width and height as shares of the image.

    Args:
        boxes: n boxes, perhaps none.
        size: (width, height) of the image, pixels.

    Returns:
        (n, 4), float32.
    """
    shares = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / torch.tensor([*size, *size])
    return torch.cat([shares[:, :2] + shares[:, 2:] / 2, shares[:, 2:]], dim=1)


def has_test_split(dataset_name: str) -> bool:
    """Whether a local folder or a data set on the Hub has a split "test"."""
    folder = Path(dataset_name)
    if folder.exists():
        return (folder / "test.json").is_file()
    from datasets import get_dataset_split_names

    try:
        return "test" in get_dataset_split_names(dataset_name)
    except Exception:  # Not there at all: `load_split` says so.
        return False


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
    try:
        data = load_coco_folder(folder, split) if folder.exists() else load_hub_split(dataset_name, split)
    except (TypeError, KeyError, AttributeError) as error:  # a list where a number should be, and the like
        raise InputError(f"{dataset_name}: split {split!r} is not in COCO format ({error!r}).") from None
    if not len(data):
        raise InputError(f"{dataset_name}: split {split!r} has no images.")
    if not data.class_names:
        raise InputError(f"{dataset_name}: split {split!r} has no categories; a prompt needs class names.")
    phrases = [class_prompt([name]) for name in data.class_names if name.strip(" .?")]
    twice = {phrase for phrase in phrases if phrases.count(phrase) > 1}
    if twice:
        raise InputError(f"{dataset_name}: split {split!r} has several categories named {', '.join(sorted(twice))}.")
    if all(crowd for crowds in data.crowds for crowd in crowds):
        raise InputError(f"{dataset_name}: split {split!r} has no boxes but those of crowds.")
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
    for part, fields in COCO_FIELDS.items():
        for index, entry in enumerate(coco[part]):
            for field in fields:
                if field not in entry:
                    raise InputError(f"{file}: {part}[{index}] has no `{field}`.")
    position = {category["id"]: i for i, category in enumerate(coco["categories"])}
    if len(position) < len(coco["categories"]):
        raise InputError(f"{file}: category ids are not unique.")
    found = {image["id"]: [] for image in coco["images"]}
    if len(found) < len(coco["images"]):
        raise InputError(f"{file}: image ids are not unique.")
    for annotation in coco["annotations"]:
        where = f"{file}: annotation {annotation.get('id')}"
        if annotation["image_id"] not in found:
            raise InputError(f"{where} is of image {annotation['image_id']!r}, which is not in `images`.")
        if annotation["category_id"] not in position:
            raise InputError(f"{where} has the unknown category_id {annotation['category_id']!r}.")
        found[annotation["image_id"]].append(annotation)
    paths = []
    for image in coco["images"]:
        path = folder / "images" / image["file_name"]
        if not path.is_file():
            raise InputError(f"{path}: no such image, but {file.name} lists it.")
        _check_picture(path, (image["width"], image["height"]), file)
        paths.append(path)
    sizes = [(image["width"], image["height"]) for image in coco["images"]]
    return DetectionSplit(
        class_names=[str(category["name"]) for category in coco["categories"]],
        image_ids=[image["id"] for image in coco["images"]],
        sizes=sizes,
        boxes=[
            [_box(a["bbox"], size, f"{file}: image {image['id']!r}") for a in found[image["id"]]]
            for image, size in zip(coco["images"], sizes, strict=True)
        ],
        labels=[[position[a["category_id"]] for a in found[image["id"]]] for image in coco["images"]],
        crowds=[[bool(a.get("iscrowd", 0)) for a in found[image["id"]]] for image in coco["images"]],
        open_image=lambda index: _open_picture(paths[index], sizes[index]),
    )


def _check_picture(path: Path, size: tuple[int, int], file: Path) -> None:
    """Refuse a picture that does not open or whose boxes are in pixels of another size; reads its header only."""
    try:
        with Image.open(path) as picture:
            # Cameras store a turned picture as it left the sensor; annotations may be of either.
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            sizes = {picture.size, picture.size[::-1] if turned else picture.size}
    except OSError as error:
        raise InputError(f"{path}: not a picture that opens ({error}).") from None
    if size not in sizes:
        raise InputError(f"{path}: {sorted(sizes)[0]} pixels, but {file.name} says {size}.")


def _open_picture(path: Path, size: tuple[int, int]) -> Image.Image:
    picture = Image.open(path)
    return (picture if picture.size == size else ImageOps.exif_transpose(picture)).convert("RGB")


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
    # A dict of lists, as `datasets` keeps a Sequence of a dict, or a list of dicts.
    feature = rows.features["objects"]
    is_list = not isinstance(feature, dict)
    fields = feature.feature if is_list else feature
    for field in ("bbox", "category"):
        if field not in fields:
            raise InputError(f"{dataset_name}: `objects` has no `{field}`; it has {sorted(fields)}.")
    category = fields["category"] if is_list else fields["category"].feature
    names = getattr(category, "names", None)
    if names is None:
        raise InputError(f"{dataset_name}: `objects.category` has no class names.")
    boxes, labels = (
        [[item[field] for item in entry] if is_list else entry[field] for entry in rows["objects"]]
        for field in ("bbox", "category")
    )
    sizes = [rows[index]["image"].size for index in range(len(rows))]
    return DetectionSplit(
        class_names=list(names),
        image_ids=list(range(len(rows))),
        sizes=sizes,
        boxes=[
            [_box(box, size, f"{dataset_name} ({split}): image {index}") for box in image]
            for index, (image, size) in enumerate(zip(boxes, sizes, strict=True))
        ],
        labels=[list(image) for image in labels],
        crowds=[[False] * len(image) for image in labels],
        open_image=lambda index: rows[index]["image"].convert("RGB"),
    )


def _box(box: Any, size: tuple[int, int], where: str) -> tuple[float, float, float, float]:
    """A box of an image of `size`, or an InputError that says what is wrong with it."""
    problem = None
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        x = y = width = height = math.nan
    if not all(map(math.isfinite, (x, y, width, height))):
        problem = "must be four finite numbers x, y, width, height"
    elif width <= 0 or height <= 0:
        problem = "is empty; width and height must be positive"
    # One pixel of grace: annotation tools round.
    elif x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
        problem = f"lies outside its image of {size[0]} x {size[1]} pixels"
    if problem:
        raise InputError(f"{where}: box {box!r} {problem}.")
    return x, y, width, height
