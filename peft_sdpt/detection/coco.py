# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Folders in COCO format: where the files of a split lie, what is in them, and the pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError
from .images import read_image

# Where an annotation file and its images lie in a folder; the first that is there is read.
ROBOFLOW_FILE = "{split}/_annotations.coco.json"
LAYOUTS = (
    ("{split}.json", "images"),
    # ODinW, which keeps Roboflow's file beside this one; this one has no root category.
    ("{split}/annotations_without_background.json", "{split}"),
    (ROBOFLOW_FILE, "{split}"),
    # COCO itself
    ("annotations/instances_{split}.json", "{split}"),
)
# Names of one and the same split.
VALIDATION_NAMES = ("val", "valid", "validation")
Id = int | float | str
# What is read of each entry of a COCO file; boxes and names are checked where they are made sense of.
COCO_FIELDS = {
    "images": {"id": Id, "file_name": str, "width": int | float, "height": int | float},
    "annotations": {"image_id": Id, "category_id": Id, "bbox": object},
    "categories": {"id": Id, "name": object},
}


def split_names(split: str) -> tuple[str, ...]:
    """The names that a split may go by, the one asked for first."""
    return (split, *(name for name in VALIDATION_NAMES if split in VALIDATION_NAMES and name != split))


def find_layout(folder: Path, split: str) -> tuple[Path, Path, str] | None:
    """The annotation file of a split, the folder of its images, and the pattern that found them, if any did."""
    for name in split_names(split):
        for file, images in LAYOUTS:
            if (folder / file.format(split=name)).is_file():
                return folder / file.format(split=name), folder / images.format(split=name), file
    return None


def load_coco_folder(folder: Path, split: str, class_names_column: str | None) -> tuple[dict[str, Any], str]:
    """The fields of a `DetectionSplit`, boxes being as they are in the file; and the file's name."""
    found = find_layout(folder, split)
    if found is None:
        looked_for = ", ".join(file.format(split=split) for file, _ in LAYOUTS)
        there = sorted(
            str(path.relative_to(folder)) for file, _ in LAYOUTS for path in folder.glob(file.format(split="*"))
        )
        raise InputError(
            f"{folder}: no split {split!r}; looked for {looked_for}. There is {', '.join(there) or 'none'}."
        )
    file, images, pattern = found
    coco = read_coco(file)
    roots = _unused_roots(coco, folder) if pattern == ROBOFLOW_FILE else set()
    categories = [category for category in coco["categories"] if category["id"] not in roots]
    position = {category["id"]: i for i, category in enumerate(categories)}
    objects: dict[Any, list[dict]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    sizes = [(image["width"], image["height"]) for image in coco["images"]]
    field = class_names_column or "name"
    for category in categories:
        if field not in category:
            raise InputError(f"{file}: category {category['id']!r} ({category['name']!r}) has no `{field}`.")
    fields = {
        "class_names": [
            one_name(category[field], f"{file}: `{field}` of category {category['id']!r}") for category in categories
        ],
        "image_ids": list(objects),
        "sizes": sizes,
        "boxes": [[a["bbox"] for a in group] for group in objects.values()],
        "labels": [[position[a["category_id"]] for a in group] for group in objects.values()],
        "crowds": [
            [is_crowd(a.get("iscrowd"), f"{file}: annotation {a.get('id')}") for a in group]
            for group in objects.values()
        ],
        "open_image": CocoPictures(images, [image["file_name"] for image in coco["images"]], sizes, file.name),
    }
    return fields, str(file)


def read_coco(file: Path) -> dict:
    """A COCO annotation file, every entry of which has what is read of it."""
    coco = read_json(file)
    if not isinstance(coco, dict) or not COCO_FIELDS.keys() <= coco.keys():
        raise InputError(f"{file}: not a COCO file; it needs `images`, `annotations` and `categories`.")
    for part, fields in COCO_FIELDS.items():
        if not isinstance(coco[part], list):
            raise InputError(f"{file}: `{part}` is not a list.")
        for index, entry in enumerate(coco[part]):
            where = f"{file}: {part}[{index}]"
            if not isinstance(entry, dict):
                raise InputError(f"{where} is not an object but {entry!r}.")
            for field, kind in fields.items():
                if field not in entry:
                    raise InputError(f"{where} has no `{field}`.")
                if not isinstance(entry[field], kind):
                    raise InputError(
                        f"{where} has the `{field}` {entry[field]!r}; must be {getattr(kind, '__name__', kind)}."
                    )
    for part, word in (("images", "image"), ("categories", "category")):
        seen = set()
        for entry in coco[part]:
            if entry["id"] in seen:
                raise InputError(f"{file}: {word} ids are not unique; {entry['id']!r} is there twice.")
            seen.add(entry["id"])
    images, categories = ({entry["id"] for entry in coco[part]} for part in ("images", "categories"))
    for annotation in coco["annotations"]:
        where = f"{file}: annotation {annotation.get('id')}"
        if annotation["image_id"] not in images:
            raise InputError(f"{where} is of image {annotation['image_id']!r}, which is not in `images`.")
        if annotation["category_id"] not in categories:
            raise InputError(f"{where} has the unknown category_id {annotation['category_id']!r}.")
    return coco


def _unused_roots(coco: dict, folder: Path) -> set[Any]:
    """Ids of the categories that Roboflow adds as a root of the others and that no split's file annotates."""
    roots = _roots(coco)
    if roots:
        # All splits' files, so that all splits drop the same.
        for file in sorted(folder.glob(ROBOFLOW_FILE.format(split="*"))):
            other = read_coco(file)
            theirs = _roots(other)
            used = {theirs.get(annotation["category_id"]) for annotation in other["annotations"]}
            roots = {id: name for id, name in roots.items() if name not in used}
    return set(roots)


def _roots(coco: dict) -> dict[Any, str]:
    parents = {category.get("supercategory") for category in coco["categories"]} - {"none"}
    return {
        category["id"]: category["name"]
        for category in coco["categories"]
        if category.get("supercategory") == "none" and category["name"] in parents
    }


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error}).") from None


def one_name(value: Any, where: str) -> str:
    """A class name, or the first of a list of them as LVIS's `synonyms`."""
    name = value[0] if isinstance(value, list) and value else value
    if not isinstance(name, str):
        raise InputError(f"{where} is {value!r}; it must be a name or a list of names.")
    return name


def is_crowd(value: Any, where: str) -> bool:
    """Whether a box is of a crowd. Tools write flags as numbers, booleans or strings, or leave them out."""
    text = str(value).lower()
    if text not in ("0", "1", "0.0", "1.0", "false", "true", "none"):
        raise InputError(f"{where}: `iscrowd` is {value!r}; it must be 0 or 1.")
    return text in ("1", "1.0", "true")


@dataclass(frozen=True)
class CocoPictures:
    """index -> RGB picture of a COCO file, checked each time: it may vanish or change in mid-run.

    Attributes:
        folder: where the images lie.
        names: path of each image, relative to `folder`.
        sizes: (width, height) of each image, pixels.
        annotations: name of the COCO file, for errors.
    """

    folder: Path
    names: list[str]
    sizes: list[tuple[int, int]]
    annotations: str

    def __call__(self, index: int) -> Image.Image:
        path, size = self.folder / self.names[index], self.sizes[index]
        if not path.is_file():
            raise InputError(f"{path}: no such image, but {self.annotations} lists it.")
        picture = read_image(path, str(path), size)
        if picture.size != size:
            raise InputError(f"{path}: {picture.size} pixels, but {self.annotations} says {size}.")
        return picture
