# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC: an XML file per image, as written by LabelImg, Roboflow and CVAT.

VOC has no list of classes. The classes are the sorted names in all splits, so that all splits have the same classes.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...errors import InputError
from ..images import SUFFIXES
from .files import ImageFinder, split_images
from .source import DEFAULT, Source, SplitFields, is_split_name, read_text, start_of

ANNOTATIONS = ("Annotations", "annotations", "labels", "xmls")
IMAGES = ("JPEGImages", "images", "Images")


def find(folder: Path) -> Source | None:
    """Find the splits of a folder with Pascal VOC files.

    Returns:
        The data set, or None if the folder has no such file.
    """
    files = [file for file in sorted(folder.rglob("*.xml")) if not file.name.startswith(".")]
    if not files or not _is_voc(files[0]):
        return None
    splits = _lists(folder, files) or _by_folder(folder, files)
    trees = functools.cache(_read_xml)

    def read(split: str) -> tuple[SplitFields, str]:
        # All splits, for the classes.
        everything = {file: trees(file) for split in splits.values() for file in split}
        return _read(folder, splits[split], everything), f"{folder} ({split})"

    looked_for = ("ImageSets/Main/{split}.txt", "{split}/*.xml", "Annotations/{split}/*.xml")
    return Source("Pascal VOC", list(splits), read, looked_for=looked_for)


def _is_voc(file: Path) -> bool:
    return re.search(rb"<annotation[ >]", start_of(file)) is not None


def _lists(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Return the splits that VOC lists in `ImageSets/Main`. Its other lists, one per class, have more columns."""
    by_stem = {file.stem: file for file in files}
    splits = {}
    for file in sorted(folder.glob("ImageSets/Main/*.txt")):
        lines = [line.split() for line in read_text(file).splitlines() if line.strip()]
        if not is_split_name(file.stem) or any(len(line) > 1 for line in lines):
            continue
        missing = [line[0] for line in lines if line[0] not in by_stem]
        if missing:
            raise InputError(f"{file}: lists {missing[0]!r}, but there is no {missing[0]}.xml in {folder}.")
        splits[file.stem] = [by_stem[line[0]] for line in lines]
    return splits


def _by_folder(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Return the splits by the first folder in the path of each file that has the name of a split."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        parts = file.relative_to(folder).parts[:-1]
        splits.setdefault(next(filter(is_split_name, parts), DEFAULT), []).append(file)
    return splits


def _read_xml(file: Path) -> ElementTree.Element:
    try:
        root = ElementTree.fromstring(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{file}: not XML ({error}).") from None
    if root.tag != "annotation":
        raise InputError(f"{file}: not a Pascal VOC file; it starts with <{root.tag}> instead of <annotation>.")
    return root


def _read(folder: Path, files: list[Path], everything: dict[Path, ElementTree.Element]) -> SplitFields:
    """Read the files of a split. Only images without an annotated size are opened.

    Args:
        folder: The folder of the data set.
        files: The files of the split.
        everything: The content of the files of all splits.
    """
    names = sorted({_text(item, "name", file) for file, root in everything.items() for item in root.iter("object")})
    position = {name: index for index, name in enumerate(names)}
    corners = {file: [_corners(item, file) for item in root.iter("object")] for file, root in everything.items()}
    # VOC counts pixels from 1. Some tools count from 0. A corner below 1 shows this.
    first = 0 if any(min(box) < 1 for boxes in corners.values() for box in boxes) else 1
    sizes, boxes, labels, crowds = [], [], [], []
    for file in files:
        objects = list(everything[file].iter("object"))
        sizes.append(_size(everything[file], file))
        # The last pixel belongs to the box.
        boxes.append([(x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first) for x0, y0, x1, y1 in corners[file]])
        labels.append([position[_text(item, "name", file)] for item in objects])
        # The evaluation of VOC ignores difficult objects.
        crowds.append([(item.findtext("difficult") or "0").strip() == "1" for item in objects])
    folders = [place for file in files for place in _image_folders(file.parent)]
    finder = ImageFinder([*dict.fromkeys(folders), *(folder / name for name in IMAGES)])
    images = split_images(finder, [_image_name(everything[file], file, finder) for file in files], sizes, folder)
    return {
        "class_names": names,
        "image_ids": [file.relative_to(folder).with_suffix("").as_posix() for file in files],
        "sizes": images.known_sizes(),
        "boxes": boxes,
        "labels": labels,
        "crowds": crowds,
        "open_image": images,
    }


def _image_folders(annotations: Path) -> list[Path]:
    """Return where the images of the files in a folder may be: there, or in a folder of images in place of its name."""
    parts = annotations.parts
    places = [annotations]
    for index in range(len(parts) - 1, -1, -1):
        if parts[index] in ANNOTATIONS:
            places += [Path(*parts[:index], name, *parts[index + 1 :]) for name in IMAGES]
            break
    return places


def _image_name(root: ElementTree.Element, file: Path, finder: ImageFinder) -> str:
    """Return the name of an image as its file says, or with the name of the file if that image does not exist."""
    name = (root.findtext("filename") or "").strip()
    if name and finder.find(name):
        return name
    beside = (file.stem + suffix for suffix in sorted(SUFFIXES | {s.upper() for s in SUFFIXES}))
    return next((other for other in beside if finder.find(other)), name or f"{file.stem}.jpg")


def _size(root: ElementTree.Element, file: Path) -> tuple[int, int] | None:
    """Return the annotated (width, height). None if it is missing, or is zero as some tools write."""
    width, height = (root.findtext(f"size/{name}") for name in ("width", "height"))
    try:
        size = (int(float(width or 0)), int(float(height or 0)))
    except (ValueError, OverflowError):
        raise InputError(f"{file}: the size must be two numbers, got {width!r} and {height!r}.") from None
    return size if all(size) else None


def _corners(item: ElementTree.Element, file: Path) -> tuple[float, float, float, float]:
    texts = [item.findtext(f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = (float(text) for text in texts)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InputError(
            f"{file}: object {_text(item, 'name', file)!r} needs <bndbox> with xmin, ymin, xmax and ymax, got {texts}."
        ) from None
    return x0, y0, x1, y1


def _text(item: ElementTree.Element, name: str, file: Path) -> Any:
    text = (item.findtext(name) or "").strip()
    if not text:
        raise InputError(f"{file}: an object has no <{name}>.")
    return text
