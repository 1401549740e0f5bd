# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reading a split from a folder in COCO format or from the Hub, and checking it."""

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

# What the four numbers of a box are, by the name of their format.
BOX_FORMATS = {"xywh": "x, y, width, height", "xyxy": "x0, y0, x1, y1"}


def has_split(dataset_name: str, split: str) -> bool:
    """Whether `load_split` finds a split in a local folder or in a data set on the Hub."""
    folder = Path(dataset_name)
    if folder.exists():
        return find_layout(folder, split) is not None
    from datasets import get_dataset_split_names
    from datasets.exceptions import DatasetNotFoundError

    try:
        return not set(split_names(split)).isdisjoint(get_dataset_split_names(dataset_name))
    except DatasetNotFoundError:  # `load_split` says so.
        return False
    except Exception as error:  # A Hub that does not answer must not change what is measured.
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
    """Read a split of a local folder in COCO format, or of a data set on the Hub. Opens no picture of a folder.

    Args:
        dataset_name: a folder in one of `coco_folder.LAYOUTS` (`<split>.json` and `images/`, or as Roboflow, ODinW or
            COCO itself have it), or a Hub id whose rows have `image` and `objects` (`bbox`, `category`).
        split: "train", "val", "test", "train2017", ... The names val, valid and validation are one split.
        bbox_format: "xywh", which is COCO's, or "xyxy"; pixels. What is returned is xywh.
        class_names_file: a JSON object of old names -> names to prompt with, for instance `{"RBC": "red blood cell"}`.
            Comes after `class_names_column`.
        class_names_column: the field of COCO's `categories`, or of the Hub's `objects`, that holds the names; of a
            list, as LVIS's `synonyms`, the first is taken. Default: `name`, or the names of `objects.category`.
        skip_bad_boxes: leave out boxes that are empty, not finite or outside their image, instead of raising.

    Raises:
        InputError: naming the file and the image, annotation or category that cannot be used.
    """
    if bbox_format not in BOX_FORMATS:
        raise InputError(f"bbox_format={bbox_format!r}: must be one of {', '.join(BOX_FORMATS)}.")
    folder = Path(dataset_name)
    try:
        if folder.exists():
            fields, source = load_coco_folder(folder, split, class_names_column)
        else:
            # Here, because `datasets` takes its time to import and a folder does without.
            from .hub import load_hub_split

            fields, source = load_hub_split(dataset_name, split, class_names_column)
    except (TypeError, KeyError, AttributeError) as error:  # a list where a number should be, and the like
        raise InputError(f"{dataset_name}: split {split!r} is not in COCO format ({error!r}).") from None
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
        raise InputError(f"{dataset_name}: split {split!r} has no boxes but those of crowds.")
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

    All processes of a launch call this together. Each opens a share of the images, and all leave out the same.

    Args:
        dataset_name: See `load_split`.
        splits: Names of the splits.
        accelerator: The accelerator of the launch. It prints what is left out.
        skip_bad_images: Leave out images that do not open, instead of raising.
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
            raise InputError(f"{first} {len(bad)} such in split {split!r}; skip_bad_images=True leaves them out.")
        for problem in (*images.left_out, *bad.values()):
            accelerator.print(f"left out: {problem}")
        data[split] = images.subset([image for image in range(len(images)) if image not in bad])
        if not data[split].has_objects():
            raise InputError(f"{dataset_name}: split {split!r} has no objects left.")
    return data


def rename_classes(class_names: list[str], file: Path) -> list[str]:
    """The names with those replaced that a JSON object of old -> new names lists.

    Raises:
        InputError: naming the file and the entry that is no string or renames no class.
    """
    new = read_json(file)
    if not isinstance(new, dict):
        raise InputError(f"{file}: must be a JSON object of old names -> new names.")
    for old, name in new.items():
        if not isinstance(name, str):
            raise InputError(f"{file}: the new name of {old!r} is {name!r}, which is not a string.")
        if old not in class_names:
            raise InputError(f"{file}: there is no class {old!r}; there are {listed(class_names)}.")
    return [new.get(name, name) for name in class_names]


def _check_phrases(class_names: list[str], where: str) -> None:
    """Refuse names that make no phrase of a prompt, or the same phrase."""
    names: dict[str, list[str]] = {}
    for name in class_names:
        try:
            names.setdefault(class_prompt([name]).rstrip("."), []).append(name)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
    twice = [f"{phrase} ({', '.join(map(repr, same))})" for phrase, same in sorted(names.items()) if len(same) > 1]
    if twice:
        raise InputError(f"{where} has several categories named {', '.join(twice)}; a prompt cannot tell them apart.")


def _read_boxes(data: DetectionSplit, bbox_format: str, source: str, skip_bad_boxes: bool) -> None:
    """Make the split's boxes (x, y, width, height), each checked to be one and to lie in its image."""
    other = "xyxy" if bbox_format == "xywh" else "xywh"
    fitting = []
    for image_id, size, boxes in zip(data.image_ids, data.sizes, data.boxes, strict=True):
        fitting.append([])
        for index, box in enumerate(boxes):
            problem = _box_problem(box, size, bbox_format)
            if problem is None:
                fitting[-1].append(index)
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
        [_as_xywh(boxes[index], bbox_format) for index in kept] for boxes, kept in zip(data.boxes, fitting, strict=True)
    ]
    for name in ("labels", "crowds"):
        values = [[values[index] for index in kept] for values, kept in zip(getattr(data, name), fitting, strict=True)]
        setattr(data, name, values)


def _box_problem(box: Any, size: tuple[int, int], bbox_format: str) -> str | None:
    """What is wrong with a box of an image of `size`, if anything is."""
    try:
        # A string of four digits would pass for four numbers.
        x, y, width, height = _as_xywh(None if isinstance(box, str) else box, bbox_format)
    except (TypeError, ValueError):
        x = y = width = height = math.nan
    if not all(map(math.isfinite, (x, y, width, height))):
        return f"must be four finite numbers {BOX_FORMATS[bbox_format]}"
    if width <= 0 or height <= 0:
        if bbox_format == "xyxy":
            return "is empty; x1 and y1 must be greater than x0 and y0"
        return "is empty; width and height must be positive"
    # One pixel of grace: annotation tools round.
    if x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
        return f"lies outside its image of {size[0]} x {size[1]} pixels"
    return None


def _as_xywh(box: Any, bbox_format: str) -> Box:
    x, y, a, b = map(float, box)
    return (x, y, a, b) if bbox_format == "xywh" else (x, y, a - x, b - y)
