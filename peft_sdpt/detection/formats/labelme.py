# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""LabelMe: a JSON file per image. Each shape becomes a box. The classes are the sorted labels in all splits."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError
from ...files import read_json
from ...wording import quoted
from ..images import as_text, files_in
from .files import ImageFinder, leads_out, split_images, unannotated_images
from .source import MAX_SIDE, Source, SplitFields, box_around, by_split_folder, is_labelme

# Shapes that enclose an area. The others, such as points and lines, are ignored.
AREAS = ("rectangle", "polygon", "circle", "mask", "rotation", "oriented rectangle")


def find(folder: Path, root: Path | None) -> Source | None:
    """Find the splits of a folder with files of LabelMe.

    Args:
        folder: The folder.
        root: The folder of the data set, which images may not be outside. None allows that.

    Returns:
        The data set, or None if the folder has no such file.
    """
    files = [file for file in files_in(folder) if file.suffix.lower() == ".json" and is_labelme(file)]
    if not files:
        return None
    parsed = functools.cache(_parse)
    splits = by_split_folder(folder, files)

    def read(split: str) -> tuple[SplitFields, str]:
        # All splits, for the classes.
        everything = [parsed(file) for group in splits.values() for file in group]
        names = sorted({name for annotation in everything for name, _ in annotation.objects})
        annotations = [parsed(file) for file in splits[split]]
        return _read(folder, root, splits[split], annotations, names), f"{folder} ({split})"

    return Source("LabelMe", list(splits), read, looked_for=("{split}/*.json",))


class Annotation(NamedTuple):
    """The content of one file without its image: the path and size of the image, and (label, box) of each object."""

    image: str
    size: tuple[int, int] | None
    objects: list[tuple[str, tuple[float, float, float, float]]]


def _parse(file: Path) -> Annotation:
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("imagePath"), str):
        raise InputError(f"{file}: not a file of LabelMe; it has no `imagePath`.")
    if not isinstance(content.get("shapes"), list):
        raise InputError(f"{file}: `shapes` must be a list, got {type(content.get('shapes')).__name__}.")
    objects = []
    for index, shape in enumerate(content["shapes"]):
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise InputError(f"{file}: shapes[{index}] has no `label`.")
        if (shape.get("shape_type") or "polygon") in AREAS:
            objects.append((shape["label"], _box(shape, f"{file}: a shape {quoted(shape['label'])}")))
    size = (content.get("imageWidth"), content.get("imageHeight"))
    has_size = all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in size)
    return Annotation(content["imagePath"], size if has_size else None, objects)  # type: ignore[arg-type]


def _read(
    folder: Path, root: Path | None, files: list[Path], annotations: list[Annotation], names: list[str]
) -> SplitFields:
    """Read the files of a split. Only images without an annotated size are opened."""
    position = {name: index for index, name in enumerate(names)}
    finder = ImageFinder([*dict.fromkeys(file.parent for file in files), folder / "images", folder], root)
    paths = []
    for file, annotation in zip(files, annotations, strict=True):
        # The path is relative to the file.
        path = Path(os.path.normpath(file.parent / annotation.image.replace("\\", "/")))
        is_there = os.path.isfile(path) and not leads_out(path, root)
        paths.append(path if is_there else finder.find(annotation.image))
    image_names, sizes = [a.image for a in annotations], [a.size for a in annotations]
    images = split_images(paths, image_names, finder.folders, sizes, folder, root)
    return {
        "class_names": names,
        "image_ids": [as_text(file.relative_to(folder).with_suffix("")) for file in files],
        "sizes": images.known_sizes(),
        "boxes": [[box for _, box in annotation.objects] for annotation in annotations],
        "labels": [[position[name] for name, _ in annotation.objects] for annotation in annotations],
        "crowds": [[False] * len(annotation.objects) for annotation in annotations],
        "open_image": images,
        "left_out": unannotated_images([file.parent for file in files], {path.stem for path in paths if path}),
    }


def _box(shape: dict, where: str) -> tuple[float, float, float, float]:
    try:
        points = [(float(x), float(y)) for x, y in shape["points"]]
        if shape.get("shape_type") == "circle":  # its centre, and a point on it
            (x, y), edge = points
            radius = math.dist((x, y), edge)
            points = [(x - radius, y - radius), (x + radius, y + radius)]
        return box_around(points)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: `points` must be pairs of numbers, got {quoted(shape.get('points'))}.") from None
