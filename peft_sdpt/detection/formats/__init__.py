# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Readers of data sets. Each format is a module with a function `find`, which returns a `Source` or None.

Supervision and Datumaro read most of these formats too, but they are not used here. Supervision depends on a video
library, and does not say which line of which file is wrong. Datumaro does not support current versions of NumPy and
Pillow.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ...errors import InputError
from ...wording import enumerated, printable, quoted
from . import coco, labelme, voc, yolo
from .source import Source, matching_split
from .unread import advice, check_archive

__all__ = ["Source", "find_source", "matching_split", "require_split"]

FORMATS = "COCO, YOLO, Pascal VOC, LabelMe, imagefolder with metadata.jsonl, Parquet, and save_to_disk"


def find_source(
    dataset_name: str,
    class_names_column: str | None = None,
    numbers_are_names: bool = False,
    allow_outside_images: bool = False,
) -> Source:
    """Recognise the format of a data set, and find its splits.

    Args:
        dataset_name: A folder or file, or the Hub id of a data set.
        class_names_column: Field with the class names, in COCO and in rows. None for the usual one.
        numbers_are_names: Whether rows may have categories that are numbers without a name.
        allow_outside_images: Whether the data set may name images outside its folder.

    Returns:
        The data set.

    Raises:
        InputError: The format is not read, there is no such data set, or `class_names_column` does not suit the format.
    """
    # Absolute, so that names of images cannot be joined to it twice.
    path = Path(os.path.abspath(dataset_name))
    if not os.path.exists(path):  # `Path.exists` raises an error for a name that is too long
        # Imported here, because `datasets` is slow to import and not needed for the other formats.
        from .rows import find_on_hub

        return find_on_hub(dataset_name, class_names_column, numbers_are_names, allow_outside_images)
    root = path if path.is_dir() else path.parent
    source = _find_local(path, class_names_column, numbers_are_names, None if allow_outside_images else root)
    if class_names_column is not None and source.sets_boxes:
        raise InputError(
            f"class_names_column={quoted(class_names_column)}: {path} is in {source.format} format, which has no such "
            "field."
        )
    return source


def _find_local(path: Path, class_names_column: str | None, numbers_are_names: bool, root: Path | None) -> Source:
    """Find a data set on the disk. Its images may not be outside `root`, unless this is None."""
    check_archive(path)
    if path.is_file():
        if path.suffix.lower() in (".yaml", ".yml"):
            source = yolo.find(path, root)
        elif path.suffix.lower() == ".json":
            source = coco.find(path, class_names_column, root)
        else:
            source = None
    else:
        source = coco.find(path, class_names_column, root) or yolo.find(path, root) or voc.find(path, root)
        if source is None:
            from .rows import find_in_folder

            source = find_in_folder(path, class_names_column, numbers_are_names, root)
        # Last, because lists of class names lie beside other formats too.
        source = source or labelme.find(path, root) or yolo.find_without_yaml(path, root)
        source = source or coco.find_with_other_name(path, class_names_column, root)
    if source is None or not source.splits:
        raise InputError(f"{path}: no data set in a known format. {_what_is_there(path)}")
    return source


def _what_is_there(path: Path) -> str:
    """Return sentences about what was looked for in a folder and what was found."""
    if path.is_file():
        return "A file must be a COCO file (.json) or a data.yaml of YOLO."
    entries = sorted(printable(entry.name, 80) + "/" * entry.is_dir() for entry in path.iterdir())
    found = f"The folder has {enumerated(entries)}." if entries else "The folder is empty."
    return " ".join(filter(None, (f"Looked for {FORMATS}.", found, _inside(path), advice(path))))


def _inside(path: Path) -> str:
    """Return a sentence about a folder inside a folder that is a data set itself, as after unpacking an archive."""
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        with contextlib.suppress(InputError):
            finders = (yolo.find, voc.find, labelme.find)
            if source := coco.find(folder, None, folder) or next(
                filter(None, (f(folder, folder) for f in finders)), None
            ):
                return f"{folder} is a data set in {source.format} format; pass this folder."
    return ""


def require_split(source: Source, split: str, dataset_name: str) -> str:
    """Return the name that a split has in a data set.

    Raises:
        InputError: There is no such split.
    """
    name = matching_split(source.splits, split)
    if name is None:
        places = ", ".join(place.format(split=printable(split, 80)) for place in source.looked_for)
        looked_for = f"; looked for {places}" if places else ""
        raise InputError(
            f"{dataset_name}: no split {quoted(split)}{looked_for}. The data set ({source.format}) has "
            f"{enumerated(printable(name, 80) for name in source.splits)}."
        )
    return name
