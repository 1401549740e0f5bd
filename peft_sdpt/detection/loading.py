# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reading and checking the splits of a folder in COCO format or of a data set on the Hub."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import InputError
from ..training.launch import cores_per_process
from .coco import find_layout, load_coco_folder, read_json, split_names
from .data import Box, DetectionSplit, check_images, listed, require_same_classes
from .grounding import class_prompt

# The four numbers of a box in each format.
BOX_FORMATS = {"xywh": "x, y, width, height", "xyxy": "x0, y0, x1, y1"}


def has_split(dataset_name: str, split: str) -> bool:
    """Tell whether a local folder or a data set on the Hub has a split.

    Args:
        dataset_name: See `load_split`.
        split: Name of the split, as in `load_split`.

    Returns:
        Whether there is such a split. False for a data set that does not exist.

    Raises:
        InputError: The Hub does not answer.
    """
    folder = Path(dataset_name)
    if folder.exists():
        return find_layout(folder, split) is not None
    from datasets import get_dataset_split_names
    from datasets.exceptions import DatasetNotFoundError

    try:
        return not set(split_names(split)).isdisjoint(get_dataset_split_names(dataset_name))
    except DatasetNotFoundError:  # `load_split` raises the error
        return False
    except Exception as error:  # a failing connection must not change which split is measured
        raise InputError(
            f"dataset_name={dataset_name!r}: no such folder, and its splits on the Hub cannot be read ({error})."
        ) from None


def load_split(
    dataset_name: str,
    split: str,
    bbox_format: str = "xywh",
    class_names_file: str | Path | None = None,
    class_names_column: str | None = None,
    skip_bad_boxes: bool = False,
) -> DetectionSplit:
    """Read a split of a local folder in COCO format, or of a data set on the Hub.

    The images of a folder are not opened; see `check_images` and `load_splits`.

    Args:
        dataset_name: A folder in one of `coco.LAYOUTS`: `<split>.json` and `images/`, or the layout of Roboflow, ODinW
            or COCO. Or the Hub id of a data set with the columns `image` and `objects`. Objects have `bbox` and
            `category`.
        split: For instance "train", "val", "test" or "train2017". "val", "valid" and "validation" are the same split.
        bbox_format: Format of the boxes in the data set, in pixels: "xywh" as in COCO, or "xyxy". The returned boxes
            are "xywh".
        class_names_file: A JSON object that maps names of the data set to names for prompts, for instance
            `{"RBC": "red blood cell"}`. It applies to the names that `class_names_column` gives.
        class_names_column: Field of `categories` in COCO, or of `objects` on the Hub, with the class names. If a value
            is a list, such as `synonyms` in LVIS, its first name is used. None for `name` in COCO, and for
            `objects.category` on the Hub.
        skip_bad_boxes: Whether to leave out boxes that are empty, not finite or outside their image, instead of
            raising.

    Returns:
        The split.

    Raises:
        InputError: The split cannot be used. The message names the file and the image, annotation or category.
    """
    if bbox_format not in BOX_FORMATS:
        raise InputError(f"bbox_format={bbox_format!r}: must be one of {', '.join(BOX_FORMATS)}.")
    folder = Path(dataset_name)
    if folder.exists():
        fields, source = load_coco_folder(folder, split, class_names_column)
    else:
        # Imported here, because `datasets` is slow to import and not needed for a folder.
        from .hub import load_hub_split

        fields, source = load_hub_split(dataset_name, split, class_names_column)
    data = DetectionSplit(**fields)
    if not len(data):
        raise InputError(f"{dataset_name}: split {split!r} has no images.")
    if not data.class_names:
        raise InputError(f"{dataset_name}: split {split!r} has no categories; a prompt needs class names.")
    _read_boxes(data, bbox_format, source, skip_bad_boxes)
    if class_names_file is not None:
        data.class_names = rename_classes(data.class_names, Path(class_names_file))
    _check_phrases(data.class_names, f"{dataset_name}: split {split!r}")
    if not data.has_objects():
        raise InputError(f"{dataset_name}: split {split!r} has no boxes except crowds.")
    return data


def load_splits(
    dataset_name: str,
    splits: Iterable[str],
    accelerator: Accelerator,
    *,
    skip_bad_images: bool = False,
    **options: Any,
) -> dict[str, DetectionSplit]:
    """Read splits of one data set, and open all their images once.

    All processes of a launch call this together. Each process opens a share of the images, and all processes leave out
    the same images.

    Args:
        dataset_name: See `load_split`.
        splits: Names of the splits.
        accelerator: The accelerator of the launch. Its main process prints what is left out.
        skip_bad_images: Whether to leave out images that cannot be opened, instead of raising.
        options: Other arguments of `load_split`.

    Returns:
        The splits by name, in alphabetical order.

    Raises:
        InputError: A split cannot be read, an image does not open, two splits have different classes, or a split has
            no objects.
    """
    data = {split: load_split(dataset_name, split, **options) for split in sorted(set(splits))}
    require_same_classes(data, dataset_name)
    for split, images in data.items():
        mine = range(accelerator.process_index, len(images), accelerator.num_processes)
        problems = check_images(images, mine, cores_per_process(accelerator), not accelerator.is_local_main_process)
        bad = dict(sorted(gather_object(list(problems.items()))))
        if bad and not skip_bad_images:
            first = next(iter(bad.values()))
            raise InputError(
                f"{first} Split {split!r} has {len(bad)} such images; skip_bad_images=True leaves them out."
            )
        for problem in (*images.left_out, *bad.values()):
            accelerator.print(f"left out: {problem}")
        data[split] = images.subset([image for image in range(len(images)) if image not in bad])
        if not data[split].has_objects():
            raise InputError(f"{dataset_name}: split {split!r} has no objects left.")
    return data


def rename_classes(class_names: list[str], file: Path) -> list[str]:
    """Replace the class names that a JSON file lists.

    Args:
        class_names: All class names.
        file: A JSON object that maps old names to new names.

    Returns:
        All class names, in the same order.

    Raises:
        InputError: The file cannot be read, a new name is not a string, or an old name is not a class.
    """
    new = read_json(file)
    if not isinstance(new, dict):
        raise InputError(f"{file}: must be a JSON object that maps old names to new names.")
    for old, name in new.items():
        if not isinstance(name, str):
            raise InputError(f"{file}: the new name of {old!r} must be a string, got {name!r}.")
        if old not in class_names:
            raise InputError(f"{file}: there is no class {old!r}; the classes are {listed(class_names)}.")
    return [new.get(name, name) for name in class_names]


def _check_phrases(class_names: list[str], where: str) -> None:
    """Raise an `InputError` for names that make no phrase in a prompt, or the same phrase."""
    names: dict[str, list[str]] = {}
    for name in class_names:
        try:
            names.setdefault(class_prompt([name]).rstrip("."), []).append(name)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    twice = [f"{phrase} ({', '.join(map(repr, same))})" for phrase, same in sorted(names.items()) if len(same) > 1]
    if twice:
        raise InputError(f"{where} has several categories named {', '.join(twice)}; a prompt cannot tell them apart.")


def _read_boxes(data: DetectionSplit, bbox_format: str, source: str, skip_bad_boxes: bool) -> None:
    """Check the boxes of a split and convert them to (x, y, width, height).

    Args:
        data: The split, which is changed.
        bbox_format: Format of its boxes.
        source: Name of the split for error messages.
        skip_bad_boxes: Whether to leave out bad boxes, instead of raising.

    Raises:
        InputError: A box is not four finite numbers, is empty or lies outside its image.
    """
    other = "xyxy" if bbox_format == "xywh" else "xywh"
    good: list[list[int]] = []
    for image_id, size, boxes in zip(data.image_ids, data.sizes, data.boxes, strict=True):
        good.append([])
        for index, box in enumerate(boxes):
            problem = _box_problem(box, size, bbox_format)
            if problem is None:
                good[-1].append(index)
                continue
            problem = f"{source}: image {image_id!r}: box {box!r} {problem}"
            if skip_bad_boxes:
                data.left_out.append(problem)
                continue
            if not any(
                _box_problem(box, size, other)
                for size, boxes in zip(data.sizes, data.boxes, strict=True)
                for box in boxes
            ):
                problem += f"; all boxes fit their images as {BOX_FORMATS[other]}, which is bbox_format={other!r}"
            else:
                problem += "; skip_bad_boxes=True leaves such boxes out"
            raise InputError(f"{problem}.")
    data.boxes = [
        [_as_xywh(boxes[index], bbox_format) for index in indices]
        for boxes, indices in zip(data.boxes, good, strict=True)
    ]
    data.labels = [[labels[index] for index in indices] for labels, indices in zip(data.labels, good, strict=True)]
    data.crowds = [[crowds[index] for index in indices] for crowds, indices in zip(data.crowds, good, strict=True)]


def _box_problem(box: Any, size: tuple[int, int], bbox_format: str) -> str | None:
    """Return what is wrong with a box in an image of this (width, height), or None."""
    try:
        # Without this check, a string of four digits would count as four numbers.
        x, y, width, height = _as_xywh(None if isinstance(box, str) else box, bbox_format)
    except (TypeError, ValueError):
        x = y = width = height = math.nan
    if not all(map(math.isfinite, (x, y, width, height))):
        return f"must be four finite numbers {BOX_FORMATS[bbox_format]}"
    if width <= 0 or height <= 0:
        if bbox_format == "xyxy":
            return "is empty; x1 and y1 must be greater than x0 and y0"
        return "is empty; width and height must be positive"
    # A box may extend over the border by one pixel, because annotation tools round.
    if x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
        return f"lies outside its image of {size[0]} x {size[1]} pixels"
    return None


def _as_xywh(box: Any, bbox_format: str) -> Box:
    """Return a box as (x, y, width, height). Raises TypeError or ValueError if it is not four numbers."""
    x, y, a, b = map(float, box)
    return (x, y, a, b) if bbox_format == "xywh" else (x, y, a - x, b - y)
