# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reading a split from a folder in COCO format: the annotation file and the images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image

from ..errors import InputError
from .images import read_image

# Where a folder may have the annotation file and the images of a split. The first layout that matches is used.
ROBOFLOW_FILE = "{split}/_annotations.coco.json"
LAYOUTS = (
    ("{split}.json", "images"),
    # ODinW. It also has Roboflow's file, but this one lacks the unused root category.
    ("{split}/annotations_without_background.json", "{split}"),
    (ROBOFLOW_FILE, "{split}"),
    # COCO itself
    ("annotations/instances_{split}.json", "{split}"),
)
# Different names of the same split.
VALIDATION_NAMES = ("val", "valid", "validation")
NUMBER = (int, float)
ID = (int, float, str)
# The fields that are read from each entry of a COCO file, and their types. Boxes and names are checked later.
COCO_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": ID, "file_name": (str,), "width": NUMBER, "height": NUMBER},
    "annotations": {"image_id": ID, "category_id": ID, "bbox": (object,)},
    "categories": {"id": ID, "name": (object,)},
}


class SplitFields(TypedDict):
    """The arguments of a `DetectionSplit`, with boxes as the data set stores them, not checked yet."""

    class_names: list[str]
    image_ids: list[Any]
    sizes: list[tuple[int, int]]
    boxes: list[list[Any]]
    labels: list[list[int]]
    crowds: list[list[bool]]
    open_image: Callable[[int], Image.Image]


def split_names(split: str) -> tuple[str, ...]:
    """Return all names of a split, starting with the given one."""
    return (split, *(name for name in VALIDATION_NAMES if split in VALIDATION_NAMES and name != split))


def find_layout(folder: Path, split: str) -> tuple[Path, Path, str] | None:
    """Find a split in a folder.

    Returns:
        The annotation file, the folder of the images, and the pattern from `LAYOUTS` that matched. None if none did.
    """
    for name in split_names(split):
        for file, images in LAYOUTS:
            if (folder / file.format(split=name)).is_file():
                return folder / file.format(split=name), folder / images.format(split=name), file
    return None


def load_coco_folder(folder: Path, split: str, class_names_column: str | None) -> tuple[SplitFields, str]:
    """Read a split of a folder. No image is opened.

    Returns:
        The fields of a `DetectionSplit`, and the path of the annotation file for error messages.

    Raises:
        InputError: The folder has no such split, or its annotation file is not a COCO file.
    """
    layout = find_layout(folder, split)
    if layout is None:
        looked_for = ", ".join(file.format(split=split) for file, _ in LAYOUTS)
        existing = sorted(
            str(path.relative_to(folder)) for file, _ in LAYOUTS for path in folder.glob(file.format(split="*"))
        )
        raise InputError(
            f"{folder}: no split {split!r}; looked for {looked_for}. The folder has {', '.join(existing) or 'none'}."
        )
    file, images, pattern = layout
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
    fields: SplitFields = {
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
        "open_image": CocoImages(images, [image["file_name"] for image in coco["images"]], sizes, file.name),
    }
    return fields, str(file)


def read_coco(file: Path) -> dict:
    """Read a COCO annotation file, and check that its entries have the fields in `COCO_FIELDS`.

    Raises:
        InputError: A field is missing or has the wrong type, an id is not unique, or an annotation refers to an image
            or a category that does not exist.
    """
    coco = read_json(file)
    if not isinstance(coco, dict) or not COCO_FIELDS.keys() <= coco.keys():
        raise InputError(f"{file}: not a COCO file; it needs `images`, `annotations` and `categories`.")
    for part, fields in COCO_FIELDS.items():
        if not isinstance(coco[part], list):
            raise InputError(f"{file}: `{part}` must be a list, got {type(coco[part]).__name__}.")
        for index, entry in enumerate(coco[part]):
            where = f"{file}: {part}[{index}]"
            if not isinstance(entry, dict):
                raise InputError(f"{where} must be an object, got {entry!r}.")
            for field, types in fields.items():
                if field not in entry:
                    raise InputError(f"{where} has no `{field}`.")
                if not isinstance(entry[field], types):
                    names = " or ".join(each.__name__ for each in types)
                    raise InputError(f"{where}: `{field}` must be {names}, got {entry[field]!r}.")
    for part, word in (("images", "image"), ("categories", "category")):
        seen = set()
        for entry in coco[part]:
            if entry["id"] in seen:
                raise InputError(f"{file}: {word} ids are not unique; {entry['id']!r} occurs twice.")
            seen.add(entry["id"])
    images, categories = ({entry["id"] for entry in coco[part]} for part in ("images", "categories"))
    for annotation in coco["annotations"]:
        where = f"{file}: annotation {annotation.get('id')}"
        if annotation["image_id"] not in images:
            raise InputError(f"{where} has the unknown image_id {annotation['image_id']!r}.")
        if annotation["category_id"] not in categories:
            raise InputError(f"{where} has the unknown category_id {annotation['category_id']!r}.")
    return coco


def _unused_roots(coco: dict, folder: Path) -> set[Any]:
    """Return the ids of categories that Roboflow adds as parents of others, if no split uses them."""
    roots = _roots(coco)
    if roots:
        # The files of all splits are read, so that all splits drop the same categories.
        for file in sorted(folder.glob(ROBOFLOW_FILE.format(split="*"))):
            other = read_coco(file)
            theirs = _roots(other)
            used = {theirs.get(annotation["category_id"]) for annotation in other["annotations"]}
            roots = {id: name for id, name in roots.items() if name not in used}
    return set(roots)


def _roots(coco: dict) -> dict[Any, str]:
    """Return the name of each root category by its id."""
    # Names and parents are not checked yet. Only strings can be those of a root.
    parents = {p for category in coco["categories"] if isinstance(p := category.get("supercategory"), str)} - {"none"}
    return {
        category["id"]: name
        for category in coco["categories"]
        if category.get("supercategory") == "none" and isinstance(name := category["name"], str) and name in parents
    }


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: The file cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error}).") from None


def one_name(value: Any, where: str) -> str:
    """Return a class name. If the value is a list of names, such as `synonyms` in LVIS, return the first one.

    Raises:
        InputError: The value is neither; the message starts with `where`.
    """
    name = value[0] if isinstance(value, list) and value else value
    if not isinstance(name, str):
        raise InputError(f"{where} must be a name or a list of names, got {value!r}.")
    return name


def is_crowd(value: Any, where: str) -> bool:
    """Return whether a box marks a crowd.

    Raises:
        InputError: The value is not a flag; the message starts with `where`.
    """
    # Annotation tools write the flag as a number, a boolean or a string, or leave it out.
    text = str(value).lower()
    if text not in ("0", "1", "0.0", "1.0", "false", "true", "none"):
        raise InputError(f"{where}: `iscrowd` must be 0 or 1, got {value!r}.")
    return text in ("1", "1.0", "true")


@dataclass(frozen=True)
class CocoImages:
    """Opens images by index, as RGB. It checks the file each time, because files may change during a run.

    Attributes:
        folder: Folder of the images.
        names: Path of each image, relative to `folder`.
        sizes: (width, height) of each image in pixels.
        annotations: Name of the annotation file, for error messages.
    """

    folder: Path
    names: list[str]
    sizes: list[tuple[int, int]]
    annotations: str

    def __call__(self, index: int) -> Image.Image:
        path, size = self.folder / self.names[index], self.sizes[index]
        if not path.is_file():
            raise InputError(f"{path}: no such image, but {self.annotations} lists it.")
        image = read_image(path, str(path), size)
        if image.size != size:
            raise InputError(f"{path}: {image.size} pixels, but {self.annotations} says {size}.")
        return image
