# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What all readers of data sets share: the result that they return, and parts of their checks."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image

from ...errors import InputError
from ...wording import printable, quoted

# Different names of the same split.
VALIDATION_NAMES = ("val", "valid", "validation")
USUAL_NAMES = ("train", *VALIDATION_NAMES, "test")
# Names that a split usually has, also with a year or a number: train2017, val-1.
SPLIT_NAME = re.compile(r"(train|val|valid|validation|dev|test)(ing)?(\W|_|\d|$)", re.IGNORECASE)
# The number of bytes that are read to recognise the format of a file. The name of a list of COCO is among them, unless
# the file starts with a long `info`. LabelMe writes its shapes before the image.
START = 20_000
# The name of the only split of a data set that does not name it, as in CVAT.
DEFAULT = "default"
# Largest width and height of an image in pixels. No image format can store more.
MAX_SIDE = 2**31


class SplitFields(TypedDict):
    """The arguments of a `DetectionSplit`, with boxes as the data set stores them, not checked yet."""

    class_names: list[str]
    image_ids: list[Any]
    # None for an image that does not open.
    sizes: list[tuple[int, int] | None]
    boxes: list[list[Any]]
    labels: list[list[int]]
    crowds: list[list[bool]]
    open_image: Callable[[int], Image.Image]
    # What the data has but is not used, for a line each.
    left_out: list[str]


@dataclass
class Source:
    """A data set whose format is known.

    Attributes:
        format: Name of the format.
        splits: Names of its splits. A data set without splits has the single name `DEFAULT`.
        read: Reads a split by its name. Returns its fields, and the name of its annotations for error messages. It may
            raise `InputError`.
        sets_boxes: Whether the format determines how boxes are written, so that `bbox_format` does not apply.
        looked_for: Where a split is looked for, with `{split}` for its name.
    """

    format: str
    splits: list[str]
    read: Callable[[str], tuple[SplitFields, str]]
    sets_boxes: bool = True
    looked_for: tuple[str, ...] = ()


def matching_split(splits: Iterable[str], split: str) -> str | None:
    """Find a split by its name, by another name of the validation split, or in other letter case.

    Args:
        splits: Names of the splits that exist.
        split: The name to look for.

    Returns:
        The name of the split that exists, or None.
    """
    others = [name for name in VALIDATION_NAMES if split in VALIDATION_NAMES and name != split]
    by_name = {name.lower(): name for name in splits} | {name: name for name in splits}
    return next((by_name[name] for name in (split, split.lower(), *others) if name in by_name), None)


def is_split_name(name: str) -> bool:
    """Tell whether a name is one that splits usually have."""
    return SPLIT_NAME.match(name) is not None


def by_split_folder(folder: Path, files: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the files of each split, by the first folder in the path of a file that has the name of a split."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        parts = file.relative_to(folder).parts[:-1]
        splits.setdefault(next(filter(is_split_name, parts), DEFAULT), []).append(file)
    return splits


def annotated_size(width: Any, height: Any) -> tuple[int, int] | None:
    """Return a (width, height) that annotations give. None if it is missing, or is zero as some tools write.

    Raises:
        TypeError, ValueError, OverflowError: A value is not a number of pixels.
    """
    size = (int(float(width or 0)), int(float(height or 0)))
    if max(size) > MAX_SIDE:
        raise ValueError("no image is that large")
    return size if min(size) > 0 else None


def start_of(file: Path) -> bytes:
    """Return the first 20 kB of a file, to tell its format. Empty if the file cannot be read."""
    try:
        with file.open("rb") as stream:
            return stream.read(START).removeprefix(codecs.BOM_UTF8)
    except OSError:
        return b""


def is_labelme(file: Path) -> bool:
    """Tell by the start of a JSON file whether LabelMe wrote it."""
    return re.search(rb'"shapes"\s*:\s*\[', start_of(file)) is not None


def read_text(file: Path) -> str:
    """Read a text file.

    Raises:
        InputError: The file cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{printable(str(file))}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{printable(str(file))}: is not a text file in UTF-8 ({error}).") from None


def one_name(value: Any, where: str) -> str:
    """Return a class name. If the value is a list of names, such as `synonyms` in LVIS, return the first one.

    Raises:
        InputError: The value is neither; the message starts with `where`.
    """
    name = value[0] if isinstance(value, list) and value else value
    if not isinstance(name, str):
        raise InputError(f"{where} must be a name or a list of names, got {quoted(value)}.")
    return name


def is_crowd(value: Any, where: str) -> bool:
    """Return whether a box marks a crowd.

    Raises:
        InputError: The value is not a flag; the message starts with `where`.
    """
    # Annotation tools write the flag as a number, a boolean or a string, or leave it out.
    text = str(value).lower() if isinstance(value, str | int | float | None) else ""
    if text not in ("0", "1", "0.0", "1.0", "false", "true", "none"):
        raise InputError(f"{where}: `iscrowd` must be 0 or 1, got {quoted(value)}.")
    return text in ("1", "1.0", "true")


def box_around(points: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Return the smallest box (x, y, width, height) that contains all points."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
