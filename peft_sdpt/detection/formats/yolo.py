# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""YOLO: a text file per image with one object per line, and the class names in `data.yaml` or `classes.txt`.

The folders are found as Ultralytics finds them (`check_det_dataset` and `img2label_paths` in version 8). Exports of
Roboflow, CVAT, Label Studio and LabelImg have the same files.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import yaml

from ...errors import InputError
from ...wording import counted, enumerated, printable, quoted, shown_path
from ..images import SUFFIXES, as_text, images_in
from .files import OUTSIDE, ImageFinder, ImagePaths, SplitImages, leads_out, shortened
from .source import DEFAULT, USUAL_NAMES, Source, SplitFields, box_around, is_split_name, read_text

NAME_FILES = ("classes.txt", "obj.names", "names.txt", "*.names")
# Keys of `data.yaml` for the splits.
SPLIT_KEYS = ("train", "val", "valid", "validation", "test")
# Folders of the images, in a data set without `data.yaml`. CVAT uses the last one.
IMAGE_FOLDERS = ("images/{split}", "{split}/images", "{split}", "obj_{split}_data")


def find(path: Path, root: Path | None) -> Source | None:
    """Find the splits of a data set in YOLO format with a `data.yaml`.

    Args:
        path: A folder, or a `data.yaml`.
        root: The folder of the data set, which images may not be outside. None allows that.

    Returns:
        The data set, or None if the folder has no such file.
    """
    if path.is_file():
        return _with_yaml(path, _read_yaml(path), root)
    for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")], key=lambda file: (file.stem != "data", file.name)):
        content = _read_yaml(file)
        if isinstance(content, dict) and "names" in content:
            return _with_yaml(file, content, root)
    return None


def find_without_yaml(folder: Path, root: Path | None) -> Source | None:
    """Find the splits of a folder in YOLO format that has its class names in a text file.

    Args:
        folder: The folder.
        root: The folder of the data set, which images may not be outside. None allows that.

    Returns:
        The data set, or None if the folder has no such file.
    """
    for pattern in NAME_FILES:
        for file in sorted(folder.glob(pattern)):
            names = [line.strip() for line in read_text(file).rstrip().splitlines()]
            if not all(names):
                raise InputError(f"{file}: line {names.index('') + 1} is empty; each line must be a class name.")
            return _by_folder(folder, names, file, root)
    return None


def _read_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(read_text(file))
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number or date that does not exist
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else printable(str(error), 200)
        raise InputError(f"{file}: not YAML ({reason}).") from None


def _shown(value: Any) -> str:
    """Quote a value of a YAML file. Only name the type of lists and dicts, because aliases can make them endless."""
    return type(value).__name__ if isinstance(value, list | dict | set) else quoted(value)


def _with_yaml(file: Path, content: Any, root: Path | None) -> Source:
    """Return the data set of a `data.yaml`."""
    if not isinstance(content, dict) or "names" not in content:
        raise InputError(f"{file}: needs `names`, the class names, and a folder per split, as in YOLO's data.yaml.")
    names = content["names"]
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            numbers = enumerated(sorted(printable(str(number), 20) for number in names))
            raise InputError(f"{file}: the numbers in `names` must be 0, 1, 2 and so on, got {numbers}.")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, (str, int, float)) for name in names):
        raise InputError(f"{file}: `names` must be a list of class names, got {type(names).__name__}.")
    number = content.get("nc", len(names))
    if number != len(names):
        raise InputError(f"{file}: `nc` says {_shown(number)} classes, but `names` has {len(names)}.")
    names = [str(name) for name in names]
    folders = {key: content[key] for key in SPLIT_KEYS if content.get(key)}
    if not folders:
        return _by_folder(file.parent, names, file, root)
    has_keypoints = bool(content.get("kpt_shape"))

    def read(split: str) -> tuple[SplitFields, str]:
        images = _images_of_yaml(file, content.get("path"), folders[split], split, root)
        return _read(names, images, file, split, root, has_keypoints), f"{file} ({split})"

    # Roboflow also names splits that an export does not have.
    existing = [split for split, value in folders.items() if _existing_place(file, content.get("path"), value)]
    looked_for = (f"the key `{{split}}` in {file.name}, and its folder",)
    return Source("YOLO", existing or list(folders), read, looked_for=looked_for)


def _places(file: Path, path: Any, value: str) -> list[Path]:
    """Return where a folder or list that `data.yaml` names may be. `path` is the common root, if the file has one."""
    roots = ([file.parent / path] if isinstance(path, str) else []) + [file.parent]
    # Roboflow writes ../train/images for a folder beside the file, and a file may have paths of another machine.
    return [base / each for each in shortened(value) for base in roots]


def _existing_place(file: Path, path: Any, value: Any) -> bool:
    """Tell whether a place of a split exists. True for a wrong value, which is an error later."""
    values = value if isinstance(value, list) else [value]
    return any(not isinstance(each, str) or any(map(os.path.exists, _places(file, path, each))) for each in values)


def _images_of_yaml(file: Path, path: Any, value: Any, split: str, root: Path | None) -> list[Path]:
    """Return the images of a split, from its value in `data.yaml`: a folder, a list of files, or several of these."""
    values = value if isinstance(value, list) else [value]
    images: list[Path] = []
    for each in values:
        if not isinstance(each, str):
            raise InputError(
                f"{file}: `{split}` must be a folder or a text file with a list of images, got {_shown(each)}."
            )
        places = _places(file, path, each)
        place = next((place for place in places if os.path.exists(place) and not leads_out(place, root)), None)
        if place is None:
            looked_for = printable(", ".join(dict.fromkeys(map(str, places))), 500)
            there = sorted(printable(entry.name, 80) for entry in file.parent.iterdir())
            raise InputError(
                f"{file}: the folder of `{split}` does not exist; looked for {looked_for}. {file.parent} has "
                f"{enumerated(there)}.{OUTSIDE * any(leads_out(place, root) for place in places)}"
            )
        images += images_in(place)[0] if place.is_dir() else _listed_images(place, file.parent, root)
    if not images:
        raise InputError(f"{file}: `{split}` is {quoted(value)}, where no image was found.")
    return images


def _listed_images(file: Path, folder: Path, root: Path | None) -> list[Path]:
    """Return the images that a text file lists, one path per line, relative to the file or to this folder."""
    finder = ImageFinder([file.parent, folder], root)
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    images = [finder.find(line) or file.parent / line for line in lines]
    for line, image in zip(lines, images, strict=True):
        if not image.name:
            raise InputError(f"{file}: {quoted(line)} is not the name of an image.")
    return images


def _by_folder(folder: Path, names: list[str], names_file: Path, root: Path | None) -> Source:
    """Return the data set of a folder with class names, but without a `data.yaml` that names its splits."""
    splits: dict[str, list[Path]] = {}
    for pattern in IMAGE_FOLDERS:
        for place in sorted(folder.glob(pattern.format(split="*"))):
            before, after = pattern.split("{split}")
            split = place.relative_to(folder).as_posix().removeprefix(before).removesuffix(after)
            if place.is_dir() and is_split_name(split) and (images := images_in(place)[0]):
                splits.setdefault(split, images)
    beside = {path.stem for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    for file in sorted(folder.glob("*.txt")):
        # Not the labels of an image that has the name of a split.
        if file.stem.lower() in USUAL_NAMES and file.stem not in beside:
            splits.setdefault(file.stem, _listed_images(file, folder, root))
    if not splits and (images := images_in(folder)[0]):
        splits[DEFAULT] = images

    def read(split: str) -> tuple[SplitFields, str]:
        return _read(names, splits[split], names_file, split, root, has_keypoints=False), f"{folder} ({split})"

    return Source("YOLO", list(splits), read, looked_for=(*IMAGE_FOLDERS, "{split}.txt"))


def _read(
    names: list[str], images: list[Path], file: Path, split: str, root: Path | None, has_keypoints: bool
) -> SplitFields:
    """Read the label files of a split, and the sizes of its images from their headers."""
    folder = file.parent
    paths = ImagePaths([*images], [str(image) for image in images], [folder], file.name, root)
    opener = SplitImages(paths, paths.where, file.name, [None] * len(images))
    sizes = opener.known_sizes()
    labels_of = [_label_file(image) for image in images]
    if labels_of and not any(map(os.path.isfile, labels_of)):
        raise InputError(
            f"{file}: split {quoted(split)} has {len(images)} images, but no label file; looked for "
            f"{shown_path(labels_of[0])} and so on."
        )
    boxes: list[list[Any]] = []
    labels: list[list[int]] = []
    for image, label_file, size in zip(images, labels_of, sizes, strict=True):
        width, height = size or (0, 0)
        boxes.append([])
        labels.append([])
        # An image without objects has an empty label file, or none. For an image outside the folder, opening it raises
        # an error later.
        is_read = os.path.isfile(label_file) and not leads_out(image, root)
        lines = read_text(label_file).splitlines() if is_read else []
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{shown_path(label_file)}, line {number}"
                label, (x, y, w, h) = _object(line, where, len(names), has_keypoints)
                boxes[-1].append((x * width, y * height, w * width, h * height))
                labels[-1].append(label)
    return {
        "class_names": names,
        "image_ids": [_relative(image, folder) for image in images],
        "sizes": sizes,
        "boxes": boxes,
        "labels": labels,
        "crowds": [[False] * len(group) for group in labels],
        "open_image": opener,
        "left_out": _unmatched_labels(labels_of, file),
    }


def _unmatched_labels(labels_of: list[Path], file: Path) -> list[str]:
    """Return a line about the label files without an image, beside those of the images."""
    known = set(labels_of)
    lists = {*USUAL_NAMES, file.stem, "classes", "readme"}
    folders = sorted({label.parent for label in labels_of})
    alone = [
        printable(path.name, 80)
        for folder in folders
        if os.path.isdir(folder)
        for path in sorted(folder.glob("*.txt"))
        if path not in known and path.stem.lower() not in lists and not path.name.lower().startswith("readme")
    ]
    return [f"{counted(len(alone), 'label file')} without an image: {enumerated(alone)}"] if alone else []


def _label_file(image: Path) -> Path:
    """Return the label file of an image: in `labels` in place of the last `images` in its path, or beside it."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = max(index for index, part in enumerate(parts[:-1]) if part == "images")
        label = Path(*parts[:last], "labels", *parts[last + 1 :]).with_suffix(".txt")
        beside = image.with_suffix(".txt")
        return beside if os.path.isfile(beside) and not os.path.isfile(label) else label
    return image.with_suffix(".txt")


def _object(line: str, where: str, num_classes: int, has_keypoints: bool) -> tuple[int, tuple[float, ...]]:
    """Return the class and the box of a line: x, y, width and height as fractions of the image."""
    try:
        first, *values = map(float, line.split())
    except ValueError:
        raise InputError(f"{where}: must be numbers, got {quoted(line.strip())}.") from None
    if not (first.is_integer() and 0 <= first < num_classes):
        got = printable(line.split()[0], 80)
        raise InputError(f"{where}: the class must be a number from 0 to {num_classes - 1}, got {got}.")
    if has_keypoints:
        values = values[:4]
    # A pixel beyond the border is allowed later. Values far above 1 are pixels.
    if not all(math.isfinite(value) and -0.5 <= value <= 1.5 for value in values):
        raise InputError(f"{where}: the values must be fractions of the image from 0 to 1, got {quoted(line.strip())}.")
    if len(values) == 4:
        x, y, width, height = values
        return int(first), (x - width / 2, y - height / 2, width, height)
    if len(values) >= 6 and len(values) % 2 == 0:  # the outline of a segment, or the corners of a rotated box
        return int(first), box_around(list(zip(values[::2], values[1::2], strict=True)))
    raise InputError(
        f"{where}: must be a class and 4 numbers (centre x, centre y, width, height), or a class and the points of an "
        f"outline, got {len(values) + 1} numbers."
    )


def _relative(image: Path, folder: Path) -> str:
    return as_text(image.relative_to(folder) if image.is_relative_to(folder) else image)
