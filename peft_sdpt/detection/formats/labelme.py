# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""LabelMe: a JSON file per image. Each shape becomes a box. The classes are the sorted labels in all splits."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from ...errors import InputError
from .files import ImageFinder, split_images
from .source import DEFAULT, Source, SplitFields, box_around, is_labelme, is_split_name, read_json

# Shapes that enclose an area. The others, such as points and lines, are ignored.
AREAS = ("rectangle", "polygon", "circle", "mask", "rotation", "oriented rectangle")


def find(folder: Path) -> Source | None:
    """Find the splits of a folder with files of LabelMe.

    Returns:
        The data set, or None if the folder has no such file.
    """
    files = [file for file in sorted(folder.rglob("*.json")) if not file.name.startswith(".") and is_labelme(file)]
    if not files:
        return None
    read_file = functools.cache(read_json)
    splits: dict[str, list[Path]] = {}
    for file in files:
        parts = file.relative_to(folder).parts[:-1]
        splits.setdefault(next(filter(is_split_name, parts), DEFAULT), []).append(file)

    def read(split: str) -> tuple[SplitFields, str]:
        shapes = {file: _shapes(file, read_file(file)) for group in splits.values() for file in group}
        names = sorted({shape["label"] for group in shapes.values() for shape in group})
        return _read(folder, splits[split], read_file, shapes, names), f"{folder} ({split})"

    return Source("LabelMe", list(splits), read, looked_for=("{split}/*.json",))


def _shapes(file: Path, content: Any) -> list[dict]:
    """Return the shapes of a file.

    Raises:
        InputError: The file has other content.
    """
    if not isinstance(content, dict) or not isinstance(content.get("imagePath"), str):
        raise InputError(f"{file}: not a file of LabelMe; it has no `imagePath`.")
    if not isinstance(content.get("shapes"), list):
        raise InputError(f"{file}: `shapes` must be a list, got {content.get('shapes')!r}.")
    for index, shape in enumerate(content["shapes"]):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise InputError(f"{file}: shapes[{index}] has no `label`.")
    return content["shapes"]


def _read(folder: Path, files: list[Path], read_file: Any, shapes: dict, names: list[str]) -> SplitFields:
    position = {name: index for index, name in enumerate(names)}
    contents = [read_file(file) for file in files]
    boxes: list[list[Any]] = []
    labels = []
    for file in files:
        areas = [shape for shape in shapes[file] if shape.get("shape_type", "polygon") in AREAS]
        boxes.append([_box(shape, f"{file}: a shape {shape['label']!r}") for shape in areas])
        labels.append([position[shape["label"]] for shape in areas])
    sizes = [
        (content["imageWidth"], content["imageHeight"])
        if content.get("imageWidth") and content.get("imageHeight")
        else None
        for content in contents
    ]
    finder = ImageFinder([*dict.fromkeys(file.parent for file in files), folder / "images", folder])
    image_names = []
    for file, content in zip(files, contents, strict=True):
        # The path is relative to the file.
        path = file.parent / content["imagePath"].replace("\\", "/")
        image_names.append(str(path) if path.is_file() else content["imagePath"])
    images = split_images(finder, image_names, sizes, folder)
    return {
        "class_names": names,
        "image_ids": [file.relative_to(folder).with_suffix("").as_posix() for file in files],
        "sizes": images.known_sizes(),
        "boxes": boxes,
        "labels": labels,
        "crowds": [[False] * len(group) for group in labels],
        "open_image": images,
    }


def _box(shape: dict, where: str) -> tuple[float, float, float, float]:
    try:
        points = [(float(x), float(y)) for x, y in shape["points"]]
        if shape.get("shape_type") == "circle":  # its centre, and a point on it
            (x, y), edge = points
            radius = math.dist((x, y), edge)
            points = [(x - radius, y - radius), (x + radius, y + radius)]
        return box_around(points)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{where}: `points` must be pairs of numbers, got {shape.get('points')!r}.") from None
