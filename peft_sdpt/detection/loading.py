# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reading and checking the splits of a data set, whatever its format."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import InputError
from ..files import read_json
from ..training.launch import cores_per_process
from ..wording import counted, enumerated, printable, quoted
from .data import Box, DetectionSplit, check_images, match_classes
from .formats import Source, find_source, matching_split, require_split
from .formats.files import SplitImages
from .formats.source import is_split_name
from .grounding import class_prompt, clean_name, names_as_words, plain_name

# The four numbers of a box in each format. FRACTIONS before a name says that they are fractions of the image size.
FRACTIONS = "relative_"
CORNERS = {
    "xywh": "x, y, width, height",
    "xyxy": "x0, y0, x1, y1",
    "cxcywh": "centre x, centre y, width, height",
}
BOX_FORMATS = {
    **{name: f"{numbers} in pixels" for name, numbers in CORNERS.items()},
    **{FRACTIONS + name: f"{numbers} as fractions of the image size" for name, numbers in CORNERS.items()},
}


def find_splits(dataset_name: str) -> list[str]:
    """Return the names of the splits of a data set.

    Args:
        dataset_name: See `load_split`.

    Returns:
        The names. A data set that does not name its only split has the name "default". The list is empty for a data set
        that does not exist.

    Raises:
        InputError: The format of a folder is not known, or the Hub does not answer.
    """
    if os.path.exists(dataset_name):  # `Path.exists` raises an error for a name that is too long
        return find_source(dataset_name).splits
    from datasets import get_dataset_split_names
    from datasets.exceptions import DatasetNotFoundError

    try:
        return get_dataset_split_names(dataset_name)
    except DatasetNotFoundError:  # `load_split` raises the error
        return []
    except Exception as error:  # a failing connection must not change which split is measured
        raise InputError(
            f"dataset_name={quoted(dataset_name)}: no such folder, and its splits on the Hub cannot be read "
            f"({printable(str(error), 500)})."
        ) from None


def has_split(dataset_name: str, split: str) -> bool:
    """Tell whether a local folder or a data set on the Hub has a split.

    Args:
        dataset_name: See `load_split`.
        split: Name of the split, as in `load_split`.

    Returns:
        Whether there is such a split. False for a data set that does not exist.

    Raises:
        InputError: As in `find_splits`.
    """
    return matching_split(find_splits(dataset_name), split) is not None


def only_split(splits: list[str]) -> str | None:
    """Return the only split of a data set that must be divided for training and evaluation.

    Args:
        splits: The result of `find_splits`.

    Returns:
        Its name. None if the data set has several splits, or only one for evaluation.
    """
    if len(splits) != 1 or (is_split_name(splits[0]) and not splits[0].lower().startswith("train")):
        return None
    return splits[0]


def load_split(
    dataset_name: str,
    split: str,
    bbox_format: str = "xywh",
    class_names_file: str | Path | None = None,
    class_names_column: str | None = None,
    skip_bad_boxes: bool = False,
    allow_outside_images: bool = False,
) -> DetectionSplit:
    """Read a split of a local folder, or of a data set on the Hub.

    The format is recognised: COCO, YOLO, Pascal VOC, LabelMe, or rows with images and objects, as on the Hub. The
    images are not decoded; see `check_images` and `load_splits`. The headers of images are read if the annotations do
    not have their sizes.

    Args:
        dataset_name: A folder, a COCO file, a `data.yaml` of YOLO, or the Hub id of a data set with the columns `image`
            and `objects`. Objects have `bbox` and `category`.
        split: For instance "train", "val", "test" or "train2017". "val", "valid" and "validation" are the same split.
        bbox_format: A key of `BOX_FORMATS`, the format of the boxes in COCO or in rows. The default is "xywh". "xyxy"
            has two corners, and "cxcywh" has the centre, width and height. "relative_xywh" and so on are fractions of
            the image size instead of pixels. The returned boxes are "xywh" in pixels.
        class_names_file: A JSON object that maps names of the data set to names for prompts, for instance
            `{"RBC": "red blood cell"}`. It applies to the names that `class_names_column` gives.
        class_names_column: Field of `categories` in COCO, or of `objects` in rows, with the class names. If a value is
            a list, such as `synonyms` in LVIS, its first name is used. None for `name` in COCO, and for
            `objects.category` in rows.
        skip_bad_boxes: Whether to leave out boxes that are empty, not finite or outside their image, instead of
            raising.
        allow_outside_images: Whether annotations may name images outside the folder of the data set, by an absolute
            path or by "..". Set it only for data that you trust. Links in the folder are always followed.

    Returns:
        The split.

    Raises:
        InputError: The split cannot be used. The message names the file and the image, annotation or category.
    """
    source = _find(dataset_name, bbox_format, class_names_file, class_names_column, allow_outside_images)
    data, _ = _load(source, dataset_name, split, bbox_format, skip_bad_boxes)
    return _with_names({split: data}, dataset_name, class_names_file)[split]


def _find(
    dataset_name: str,
    bbox_format: str,
    class_names_file: str | Path | None,
    class_names_column: str | None,
    allow_outside_images: bool,
) -> Source:
    """Find a data set, and check that its format takes these arguments of `load_split`."""
    if bbox_format not in BOX_FORMATS:
        raise InputError(f"bbox_format={quoted(bbox_format)}: must be one of {', '.join(BOX_FORMATS)}.")
    numbers_are_names = class_names_file is not None
    source = find_source(dataset_name, class_names_column, numbers_are_names, allow_outside_images)
    if source.sets_boxes and bbox_format != "xywh":
        raise InputError(
            f"bbox_format={bbox_format!r}: {dataset_name} is in {source.format} format, which says how boxes are "
            "written."
        )
    return source


def _load(
    source: Source, dataset_name: str, split: str, bbox_format: str, skip_bad_boxes: bool
) -> tuple[DetectionSplit, str]:
    """Read and check a split of a data set, but not its class names. The arguments are those of `load_split`.

    Returns:
        The split, and where its annotations are.
    """
    fields, annotations = source.read(require_split(source, split, dataset_name))
    sizes = fields["sizes"]
    unopened = [index for index, size in enumerate(sizes) if size is None]
    for index in unopened:
        # Without a size, its boxes cannot be checked. Opening the image raises an error that says what is wrong.
        sizes[index] = (1, 1)
        fields["boxes"][index], fields["labels"][index], fields["crowds"][index] = [], [], []
    data = DetectionSplit(**fields)  # type: ignore[arg-type]  # all sizes are known now
    if not len(data):
        raise InputError(f"{dataset_name}: split {quoted(split)} has no images.")
    if not data.class_names:
        raise InputError(f"{dataset_name}: split {quoted(split)} has no categories; a prompt needs class names.")
    data.class_names = [clean_name(name) for name in data.class_names]
    _read_boxes(data, bbox_format, annotations, skip_bad_boxes)
    if not data.has_objects():
        if unopened:
            data.open_image(unopened[0])  # raises an error that says more
        left_out = f" {len(data.left_out)} were left out; the first: {data.left_out[0]}." if data.left_out else ""
        raise InputError(f"{dataset_name}: split {quoted(split)} has no boxes except crowds.{left_out}")
    return data, annotations


def _with_names(
    splits: dict[str, DetectionSplit], dataset_name: str, class_names_file: str | Path | None
) -> dict[str, DetectionSplit]:
    """Give splits the same classes, with the names for prompts.

    Raises:
        InputError: Two classes cannot be told apart, or the file does not suit the classes.
    """
    for split, data in splits.items():
        if len(set(data.class_names)) < len(data.class_names):
            _check_phrases(data.class_names, f"{dataset_name}: split {quoted(split)}")
    matched = match_classes(splits)
    names = next(iter(matched.values())).class_names
    if class_names_file is not None:
        names = rename_classes(names, Path(class_names_file))
    _check_phrases(names, dataset_name if len(splits) > 1 else f"{dataset_name}: split {quoted(next(iter(splits)))}")
    return {split: replace(data, class_names=names) for split, data in matched.items()}


def load_splits(
    dataset_name: str,
    splits: Iterable[str],
    accelerator: Accelerator,
    *,
    bbox_format: str = "xywh",
    class_names_file: str | Path | None = None,
    class_names_column: str | None = None,
    skip_bad_boxes: bool = False,
    skip_bad_images: bool = False,
    allow_outside_images: bool = False,
) -> dict[str, DetectionSplit]:
    """Read splits of one data set, and open all their images once.

    All processes of a launch call this together. Each process opens a share of the images, and all processes leave out
    the same images. The classes of the splits are matched by name; see `match_classes`.

    Args:
        dataset_name: See `load_split`.
        splits: Names of the splits.
        accelerator: The accelerator of the launch. Its main process prints which boxes and images are left out, and how
            it reads names such as "hot_dog" and photos whose orientation is not certain.
        bbox_format, class_names_file, class_names_column, skip_bad_boxes, allow_outside_images: See `load_split`.
        skip_bad_images: Whether to leave out images that cannot be opened, instead of raising.

    Returns:
        The splits by name, in the given order.

    Raises:
        InputError: A split cannot be read, an image does not open, a split has no objects, or the processes have read
            different data.
    """
    source = _find(dataset_name, bbox_format, class_names_file, class_names_column, allow_outside_images)
    read = {}
    for split in dict.fromkeys(splits):
        read[split], annotations = _load(source, dataset_name, split, bbox_format, skip_bad_boxes)
        number = counted(len(read[split]), "image")
        accelerator.print(printable(f"{split}: {number} in {source.format} format from {annotations}"))
    data = _with_names(read, dataset_name, class_names_file)
    for line in _notes(read, data):
        accelerator.print(line)
    if accelerator.num_processes > 1:
        _check_same(dataset_name, data)
    for split, images in data.items():
        mine = range(accelerator.process_index, len(images), accelerator.num_processes)
        problems = check_images(images, mine, cores_per_process(accelerator), not accelerator.is_local_main_process)
        bad = dict(sorted(gather_object(list(problems.items()))))
        if bad and not skip_bad_images:
            first = next(iter(bad.values()))
            raise InputError(
                f"{first} Split {quoted(split)} has {len(bad)} such images; skip_bad_images=True leaves them out."
            )
        for problem in (*images.left_out, *bad.values()):
            accelerator.print(printable(f"left out: {problem}"))
        data[split] = images.subset([image for image in range(len(images)) if image not in bad])
        if not data[split].has_objects():
            raise InputError(f"{dataset_name}: split {quoted(split)} has no objects left.")
    _decide_orientations(read, accelerator)
    return data


def _check_same(dataset_name: str, splits: dict[str, DetectionSplit]) -> None:
    """Raise an `InputError` in all processes if machines of the launch have different copies of a data set."""
    fingerprints = gather_object([{split: data.fingerprint() for split, data in splits.items()}])
    for process, others in enumerate(fingerprints):
        for split, fingerprint in others.items():
            if fingerprint != fingerprints[0][split]:
                raise InputError(
                    f"{dataset_name}: process {process} has read another split {quoted(split)} than the main process; "
                    "all machines need the same data set."
                )


def _decide_orientations(splits: dict[str, DetectionSplit], accelerator: Accelerator) -> None:
    """Decide how to read photos whose size does not tell whether their boxes belong to the turned photo, and print it.

    All images have been opened. All processes decide now, before DataLoader workers get copies of the splits.
    """
    openers = {split: data.open_image for split, data in splits.items() if isinstance(data.open_image, SplitImages)}
    undecided = {split: set(gather_object(sorted(opener.undecided))) for split, opener in openers.items()}
    if not any(undecided.values()):
        return
    votes = [vote for opener in openers.values() for vote in opener.votes()]
    for split, images in undecided.items():
        if images:
            how = "turned, as in image viewers" if openers[split].decide(votes) else "not turned, like the others"
            photos = f"{counted(len(images), 'photo')} {'has' if len(images) == 1 else 'have'}"
            accelerator.print(
                f"split {split}: {photos} an EXIF orientation, and the size does not tell whether the boxes are drawn "
                f"on the turned photo; such photos are {how}"
            )


def _notes(read: dict[str, DetectionSplit], data: dict[str, DetectionSplit]) -> list[str]:
    """Return a line for each way in which class names are read.

    Args:
        read: The splits as they were read.
        data: The same splits with matched classes and names for prompts.
    """
    notes = names_as_words(next(iter(data.values())).class_names)
    in_all = {plain_name(name): name for images in read.values() for name in images.class_names}
    for split, images in read.items():
        there = {plain_name(name) for name in images.class_names}
        missing = [quoted(name) for key, name in in_all.items() if key not in there]
        if missing:
            notes.append(f"split {split} has no class {enumerated(missing)}, which another split has")
    return notes


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
            raise InputError(f"{file}: the new name of {quoted(old)} must be a string, got {quoted(name)}.")
        if old not in class_names:
            raise InputError(
                f"{file}: there is no class {quoted(old)}; the classes are {enumerated(map(quoted, class_names))}."
            )
    return [clean_name(new.get(name, name)) for name in class_names]


def _check_phrases(class_names: list[str], where: str) -> None:
    """Raise an `InputError` for names that make no phrase in a prompt, or the same phrase."""
    names: dict[str, list[str]] = {}
    for name in class_names:
        try:
            names.setdefault(class_prompt([name]).rstrip("."), []).append(name)
        except InputError as error:
            raise InputError(f"{where}: {error} class_names_file=... renames a class.") from None
    same = sorted((phrase, names) for phrase, names in names.items() if len(names) > 1)
    twice = [f"{printable(phrase, 80)} ({enumerated(map(quoted, names))})" for phrase, names in same]
    if twice:
        raise InputError(f"{where} has several categories named {enumerated(twice)}; a prompt cannot tell them apart.")


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
    good: list[list[int]] = []
    for image_id, size, boxes in zip(data.image_ids, data.sizes, data.boxes, strict=True):
        good.append([])
        for index, box in enumerate(boxes):
            problem = _box_problem(box, size, bbox_format)
            if problem is None:
                good[-1].append(index)
                continue
            problem = f"{source}: image {quoted(image_id)}: box {quoted(box)} {problem}"
            if skip_bad_boxes:
                data.left_out.append(problem)
                continue
            fitting = [other for other in BOX_FORMATS if other != bbox_format and _all_fit(data, other)]
            if fitting:
                formats = " or ".join(f"bbox_format={other!r} ({BOX_FORMATS[other]})" for other in fitting)
                raise InputError(f"{problem}; all boxes fit their images with {formats}.")
            raise InputError(f"{problem}; skip_bad_boxes=True leaves such boxes out.")
    data.boxes = [
        [_as_xywh(boxes[index], size, bbox_format) for index in indices]
        for boxes, size, indices in zip(data.boxes, data.sizes, good, strict=True)
    ]
    data.labels = [[labels[index] for index in indices] for labels, indices in zip(data.labels, good, strict=True)]
    data.crowds = [[crowds[index] for index in indices] for crowds, indices in zip(data.crowds, good, strict=True)]


def _all_fit(data: DetectionSplit, bbox_format: str) -> bool:
    """Tell whether all boxes of a split fit their images in a format."""
    images = zip(data.sizes, data.boxes, strict=True)
    return not any(_box_problem(box, size, bbox_format) for size, boxes in images for box in boxes)


def _box_problem(box: Any, size: tuple[int, int], bbox_format: str) -> str | None:
    """Return what is wrong with a box in an image of this (width, height), or None."""
    try:
        # Without this check, a string of four digits would count as four numbers.
        x, y, width, height = _as_xywh(None if isinstance(box, str) else box, size, bbox_format)
    except (TypeError, ValueError, OverflowError):  # also a number of 400 digits
        x = y = width = height = math.nan
    if not all(map(math.isfinite, (x, y, width, height))):
        return f"must be four finite numbers {BOX_FORMATS[bbox_format]}"
    if width <= 0 or height <= 0:
        if bbox_format.endswith("xyxy"):
            return "is empty; x1 and y1 must be greater than x0 and y0"
        return "is empty; width and height must be positive"
    # A box may extend over the border by one pixel, because annotation tools round.
    if x < -1 or y < -1 or x + width > size[0] + 1 or y + height > size[1] + 1:
        return f"lies outside its image of {size[0]} x {size[1]} pixels"
    # No object is that small, but every box of fractions is.
    if x + width <= 1 and y + height <= 1 and max(size) > 2:
        return "lies within the first pixel, so its numbers may be fractions of the image size"
    return None


def _as_xywh(box: Any, size: tuple[int, int], bbox_format: str) -> Box:
    """Return a box as (x, y, width, height) in pixels.

    Raises:
        TypeError, ValueError, OverflowError: It is not four numbers.
    """
    x, y, a, b = map(float, box)
    numbers = bbox_format.removeprefix(FRACTIONS)
    if numbers != bbox_format:
        x, y, a, b = x * size[0], y * size[1], a * size[0], b * size[1]
    if numbers == "xyxy":
        return (x, y, a - x, b - y)
    return (x - a / 2, y - b / 2, a, b) if numbers == "cxcywh" else (x, y, a, b)
