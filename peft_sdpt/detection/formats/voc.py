# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC: an XML file per image, as written by LabelImg, Roboflow and CVAT.

VOC has no list of classes. The classes are the sorted names in all splits, so that all splits have the same classes.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from ...errors import InputError
from ...wording import printable, quoted
from ..images import as_text, files_in
from .files import ImageFinder, split_images, unannotated_images
from .source import Source, SplitFields, annotated_size, by_split_folder, read_text, start_of

ANNOTATIONS = ("Annotations", "annotations", "labels", "xmls")
IMAGES = ("JPEGImages", "images", "Images")


def find(folder: Path, root: Path | None) -> Source | None:
    """Find the splits of a folder with Pascal VOC files.

    Args:
        folder: The folder.
        root: The folder of the data set, which images may not be outside. None allows that.

    Returns:
        The data set, or None if the folder has no such file.
    """
    # Other XML files may be among them.
    files = [file for file in files_in(folder) if file.suffix.lower() == ".xml" and _is_voc(file)]
    if not files:
        return None
    splits = _lists(folder, files) or by_split_folder(folder, files)
    parsed = functools.cache(_parse)

    def read(split: str) -> tuple[SplitFields, str]:
        # All splits, for the classes.
        everything = {file: parsed(file) for split in splits.values() for file in split}
        return _read(folder, root, splits[split], everything), f"{folder} ({split})"

    looked_for = ("ImageSets/Main/{split}.txt", "{split}/*.xml", "Annotations/{split}/*.xml")
    return Source("Pascal VOC", list(splits), read, looked_for=looked_for)


def _is_voc(file: Path) -> bool:
    return re.search(rb"<annotation[ >]", start_of(file)) is not None


def _lists(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Return the splits that VOC lists in `ImageSets/Main`. Its lists of classes have two columns."""
    by_stem = {file.stem: file for file in files}
    splits = {}
    for file in sorted(folder.glob("ImageSets/Main/*.txt")):
        lines = [line.split() for line in read_text(file).splitlines() if line.strip()]
        if any(len(line) > 1 for line in lines):
            continue
        missing = [line[0] for line in lines if line[0] not in by_stem]
        if missing:
            name = printable(missing[0], 80)
            raise InputError(f"{file}: lists {quoted(missing[0])}, but there is no {name}.xml in {folder}.")
        splits[file.stem] = [by_stem[line[0]] for line in lines]
    return splits


class Annotation(NamedTuple):
    """The content of one file: the name and size of the image, and (name, corners, is difficult) of each object."""

    image: str
    size: tuple[int, int] | None
    objects: list[tuple[str, tuple[float, float, float, float], bool]]


def _parse(file: Path) -> Annotation:
    try:
        root = ElementTree.fromstring(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}).") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{file}: not XML ({error}).") from None
    if root.tag != "annotation":
        raise InputError(
            f"{file}: not a Pascal VOC file; it starts with <{printable(root.tag, 80)}> instead of <annotation>."
        )
    objects = [
        # The evaluation of VOC ignores difficult objects.
        (_name(item, file), _corners(item, file), (item.findtext("difficult") or "0").strip() == "1")
        for item in root.iter("object")
    ]
    return Annotation((root.findtext("filename") or "").strip(), _size(root, file), objects)


def _read(folder: Path, root: Path | None, files: list[Path], everything: dict[Path, Annotation]) -> SplitFields:
    """Read the files of a split. Only images without an annotated size are opened.

    Args:
        folder: The folder of the data set.
        root: The same, or None if images may be outside it.
        files: The files of the split.
        everything: The content of the files of all splits.
    """
    names = sorted({name for annotation in everything.values() for name, *_ in annotation.objects})
    position = {name: index for index, name in enumerate(names)}
    # VOC counts pixels from 1. Some tools count from 0, as the least corner then shows.
    all_corners = [corners for annotation in everything.values() for _, corners, _ in annotation.objects]
    first = 0 if any(min(corners) < 1 for corners in all_corners) else 1
    chosen = [everything[file] for file in files]
    finders = {parent: ImageFinder(_image_folders(parent), root) for parent in {file.parent for file in files}}
    everywhere = ImageFinder(
        [*(folder for f in finders.values() for folder in f.folders), *(folder / n for n in IMAGES)], root
    )
    paths = [
        _image_of(annotation.image, file, finders[file.parent]) or _image_of(annotation.image, file, everywhere)
        for file, annotation in zip(files, chosen, strict=True)
    ]
    image_names = [annotation.image or f"{file.stem}.jpg" for file, annotation in zip(files, chosen, strict=True)]
    sizes = [annotation.size for annotation in chosen]
    images = split_images(paths, image_names, everywhere.folders, sizes, folder, root)
    return {
        "class_names": names,
        "image_ids": [as_text(file.relative_to(folder).with_suffix("")) for file in files],
        "sizes": images.known_sizes(),
        # The last pixel belongs to the box.
        "boxes": [
            [
                (x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first)
                for _, (x0, y0, x1, y1), _ in annotation.objects
            ]
            for annotation in chosen
        ],
        "labels": [[position[name] for name, *_ in annotation.objects] for annotation in chosen],
        "crowds": [[is_difficult for *_, is_difficult in annotation.objects] for annotation in chosen],
        "open_image": images,
        "left_out": unannotated_images(everywhere.folders, {file.stem for file in everything}),
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


def _image_of(name: str, file: Path, finder: ImageFinder) -> Path | None:
    """Return the image of a file: the one with the name of the file, or else the one that the file names.

    The name in a file is often that of the image before it was renamed.
    """
    by_stem = finder.find_stem(file.stem)
    stem = finder.find_stem(Path(name).stem) if name else None
    return by_stem or (finder.find(name) if name else None) or stem


def _size(root: ElementTree.Element, file: Path) -> tuple[int, int] | None:
    width, height = (root.findtext(f"size/{name}") for name in ("width", "height"))
    try:
        return annotated_size(width, height)
    except (ValueError, OverflowError):
        raise InputError(f"{file}: the size must be two numbers, got {quoted(width)} and {quoted(height)}.") from None


def _corners(item: ElementTree.Element, file: Path) -> tuple[float, float, float, float]:
    texts = [item.findtext(f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = (float(text) for text in texts)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InputError(
            f"{file}: object {quoted(_name(item, file))} needs <bndbox> with xmin, ymin, xmax and ymax, got "
            f"{quoted(texts)}."
        ) from None
    return x0, y0, x1, y1


def _name(item: ElementTree.Element, file: Path) -> str:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise InputError(f"{file}: an object has no <name>.")
    return name
