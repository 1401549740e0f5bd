# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""COCO: one JSON file per split, in the layouts of the tools that write it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import read_json
from ...wording import printable, quoted
from ..decoding import Size
from .files import ImageFinder, split_images
from .source import (
    DEFAULT,
    START,
    USUAL_NAMES,
    Source,
    SplitFields,
    annotated_size,
    is_crowd,
    is_labelme,
    is_split_name,
    one_name,
    start_of,
)
from .unread import describe_json

# Where a folder may have the annotation file of a split, and the folders of its images. If several files are for the
# same split, the first one is used.
ROBOFLOW_FILE = "{split}/_annotations.coco.json"
LAYOUTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("instances_{split}.json", ("{split}", "images/{split}", "images", "")),
    ("{split}.json", ("images", "images/{split}", "{split}", "data", "")),
    # ODinW. It also has Roboflow's file, but this one lacks the unused root category.
    ("{split}/annotations_without_background.json", ("{split}",)),
    (ROBOFLOW_FILE, ("{split}",)),
    # COCO itself has the images in the first folder, and CVAT in the second.
    ("annotations/instances_{split}.json", ("{split}", "images/{split}", "images", "")),
    ("annotations/{split}.json", ("{split}", "images/{split}", "images", "")),
    # FiftyOne
    ("{split}/labels.json", ("{split}/data", "{split}")),
    ("{split}/annotations.json", ("{split}/images", "{split}")),
    # Label Studio
    ("{split}/result.json", ("{split}/images", "{split}")),
)
# The same for a data set without splits: FiftyOne, Label Studio, Roboflow, CVAT, and files with a usual name. Label
# Studio writes names that start with `images/`.
WHOLE_FILES = (
    *("labels.json", "result.json", "_annotations.coco.json", "annotations/instances_default.json"),
    *("annotations.json", "instances.json", "instances_default.json", "coco.json", "_annotations.json"),
    *("annotations/annotations.json", "annotations/default.json"),
)
WHOLE_IMAGES = ("images", "images/default", "default", "data", "")
# Written by `sdpt-detect`. It is a COCO file, but its boxes are no annotations.
OWN_RESULTS = "detections.json"
# A folder with more JSON files has one per image.
MAX_SPLITS = 50
ID = (int, float, str)
# The fields that are read from each entry of a COCO file, and their types. Boxes and names are checked later.
COCO_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": ID, "file_name": (str,)},
    "annotations": {"image_id": ID, "category_id": ID, "bbox": (object,)},
    "categories": {"id": ID, "name": (object,)},
}


def find(path: Path, class_names_column: str | None, root: Path | None) -> Source | None:
    """Find the splits of a data set in COCO format.

    Args:
        path: A folder in one of the layouts, or a COCO file.
        class_names_column: Field of the categories with the class names. None for `name`.
        root: The folder of the data set, which images may not be outside. None allows that.

    Returns:
        The data set, or None if the folder has no COCO file with a usual name.
    """
    if path.is_file():
        whole = (path, _folders(path.parent, WHOLE_IMAGES, DEFAULT), "")
        return _source(path.parent, {DEFAULT: whole}, class_names_column, root)
    files = _split_files(path)
    if not any(map(is_split_name, files)):
        files = _whole_file(path)
    return _source(path, files, class_names_column, root) if files else None


def find_with_other_name(folder: Path, class_names_column: str | None, root: Path | None) -> Source | None:
    """Find COCO files of any name. Each is a split of this name. None if there is no COCO file."""
    files = _split_files(folder)
    return _source(folder, files, class_names_column, root) if files else None


def _source(
    folder: Path, files: dict[str, tuple[Path, list[Path], str]], class_names_column: str | None, root: Path | None
) -> Source:
    def read(split: str) -> tuple[SplitFields, str]:
        file, folders, layout = files[split]
        return _read(file, folders, root, folder if layout == ROBOFLOW_FILE else None, class_names_column)

    looked_for = tuple(file for file, _ in LAYOUTS)
    return Source("COCO", list(files), read, sets_boxes=False, looked_for=looked_for)


def _folders(folder: Path, images: tuple[str, ...], split: str) -> list[Path]:
    return [folder / name.format(split=split) for name in images]


def _split_files(folder: Path) -> dict[str, tuple[Path, list[Path], str]]:
    """Return for each split its annotation file, the folders of its images, and its layout."""
    files: dict[str, tuple[Path, list[Path], str]] = {}
    found: set[str] = set()
    for layout, images in LAYOUTS:
        before, after = layout.split("{split}")
        matches = sorted(folder.glob(layout.format(split="*")))
        if len(matches) > MAX_SPLITS:  # files of single images
            matches = [folder / layout.format(split=split) for split in USUAL_NAMES]
            matches = [file for file in matches if file.is_file()]
        for file in matches:
            path = file.relative_to(folder).as_posix()
            split = path.removeprefix(before).removesuffix(after)
            # The folder may have other JSON files. A file for a split is read even if it is damaged.
            if path not in (*WHOLE_FILES, OWN_RESULTS, *found) and _may_be_coco(file, split):
                files.setdefault(split, (file, _folders(folder, images, split), layout))
                found.add(path)
    return files


def _whole_file(folder: Path) -> dict[str, tuple[Path, list[Path], str]]:
    """Return the annotation file of a data set without splits in the same form."""
    file = next((folder / name for name in WHOLE_FILES if _looks_like_coco(folder / name)), None)
    return {DEFAULT: (file, _folders(folder, WHOLE_IMAGES, DEFAULT), "")} if file else {}


def _may_be_coco(file: Path, split: str) -> bool:
    """Tell whether a file is, or should be, the COCO file of a split."""
    return _looks_like_coco(file) or (split.lower() in USUAL_NAMES and not is_labelme(file))


def _looks_like_coco(file: Path) -> bool:
    """Tell by the start of a file whether it may be a COCO file."""
    start = start_of(file)
    lists = set(re.findall(rb'"(images|annotations|categories)"\s*:\s*\[', start))
    # Label Studio writes its categories alone into `notes.json`.
    is_whole = len(start) < START
    return start.lstrip().startswith(b"{") and bool(lists) and not (is_whole and lists == {b"categories"})


def _read(
    file: Path, folders: list[Path], root: Path | None, roboflow: Path | None, class_names_column: str | None
) -> tuple[SplitFields, str]:
    """Read a split. No image is opened.

    Args:
        file: The annotation file.
        folders: Folders of the images.
        root: The folder of the data set, or None.
        roboflow: The folder of an export of Roboflow, which may have an unused root category. None for other exports.
        class_names_column: Field of the categories with the class names, or None.
    """
    coco = read_coco(file)
    roots = _unused_roots(coco, roboflow) if roboflow else set()
    categories = [category for category in coco["categories"] if category["id"] not in roots]
    position = {category["id"]: i for i, category in enumerate(categories)}
    objects: dict[Any, list[dict]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    sizes = [_size(image, f"{file}: images[{index}]") for index, image in enumerate(coco["images"])]
    field = class_names_column or "name"
    for category in categories:
        if field not in category:
            name = quoted(category["name"])
            raise InputError(f"{file}: category {quoted(category['id'])} ({name}) has no `{printable(field, 80)}`.")
    finder, names = ImageFinder(folders, root), [image["file_name"] for image in coco["images"]]
    images = split_images([finder.find(name) for name in names], names, finder.folders, sizes, file, root)
    fields: SplitFields = {
        "class_names": [
            one_name(category[field], f"{file}: `{printable(field, 80)}` of category {quoted(category['id'])}")
            for category in categories
        ],
        "image_ids": list(objects),
        "sizes": images.known_sizes(),
        "boxes": [[a["bbox"] for a in group] for group in objects.values()],
        "labels": [[position[a["category_id"]] for a in group] for group in objects.values()],
        "crowds": [
            [is_crowd(a.get("iscrowd"), f"{file}: annotation {quoted(a.get('id'))}") for a in group]
            for group in objects.values()
        ],
        "open_image": images,
        "left_out": [],
    }
    return fields, str(file)


def _size(image: dict, where: str) -> Size | None:
    size = (image.get("width"), image.get("height"))
    try:
        return annotated_size(*size)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: `width` and `height` must be numbers, got {quoted(size)}.") from None


def read_coco(file: Path) -> dict:
    """Read a COCO annotation file, and check that its entries have the fields in `COCO_FIELDS`.

    Raises:
        InputError: A field is missing or has the wrong type, an id is not unique, or an annotation refers to an image
            or a category that does not exist.
    """
    coco = read_json(file)
    if not isinstance(coco, dict) or not COCO_FIELDS.keys() <= coco.keys():
        raise InputError(
            f"{file}: not a COCO file; it needs `images`, `annotations` and `categories`.{describe_json(coco)}"
        )
    for part, fields in COCO_FIELDS.items():
        if not isinstance(coco[part], list):
            raise InputError(f"{file}: `{part}` must be a list, got {type(coco[part]).__name__}.")
        for index, entry in enumerate(coco[part]):
            where = f"{file}: {part}[{index}]"
            if not isinstance(entry, dict):
                raise InputError(f"{where} must be an object, got {quoted(entry)}.")
            for field, types in fields.items():
                if field not in entry:
                    raise InputError(f"{where} has no `{field}`.")
                if not isinstance(entry[field], types):
                    names = " or ".join(each.__name__ for each in types)
                    raise InputError(f"{where}: `{field}` must be {names}, got {quoted(entry[field])}.")
                if isinstance(entry[field], float) and not math.isfinite(entry[field]):
                    raise InputError(f"{where}: `{field}` must be finite, got {entry[field]}.")
    for part, word in (("images", "image"), ("categories", "category")):
        seen = set()
        for entry in coco[part]:
            if entry["id"] in seen:
                raise InputError(f"{file}: {word} ids are not unique; {quoted(entry['id'])} occurs twice.")
            seen.add(entry["id"])
    images, categories = ({entry["id"] for entry in coco[part]} for part in ("images", "categories"))
    for annotation in coco["annotations"]:
        where = f"{file}: annotation {quoted(annotation.get('id'))}"
        if annotation["image_id"] not in images:
            raise InputError(f"{where} has the unknown image_id {quoted(annotation['image_id'])}.")
        if annotation["category_id"] not in categories:
            raise InputError(f"{where} has the unknown category_id {quoted(annotation['category_id'])}.")
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
