# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Recognising formats that are not read, to say how to convert them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import read_json
from ...wording import printable, shown_path
from .source import start_of

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")
# Datumaro needs older versions of NumPy and Pillow than this package allows, so it runs in an environment of its own.
DATUMARO = (
    "`pipx run --spec 'datumaro[cli]' datum convert -i {path} -if {format} -f coco -o {path}-coco -- --save-media`"
)


def describe_json(content: Any) -> str:
    """Return a sentence about what a JSON file is, if it is not a COCO file. It starts with a space, or is empty."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        if {"data", "annotations"} <= content[0].keys() or "label" in content[0]:
            return " It looks like the JSON of Label Studio; export the project as COCO there."
        if {"image", "annotations"} <= content[0].keys():
            return " It looks like Create ML's format; export the data as COCO in the annotation tool."
    if isinstance(content, dict):
        if {"_via_img_metadata", "_via_settings"} & content.keys() or all(
            isinstance(entry, dict) and "regions" in entry for entry in content.values() or [0]
        ):
            return " It looks like a file of the VGG Image Annotator; choose `Export Annotations (COCO format)` there."
        if {"shapes", "imagePath"} <= content.keys():
            return " It is the file of one image, written by LabelMe; pass the folder of all these files."
        if {"images", "annotations"} <= content.keys():
            return " A COCO file without `categories` has no class names."
    return ""


def check_archive(path: Path) -> None:
    """Raise an `InputError` if a path is an archive, or a folder that has only archives in it."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if not file.name.startswith(".")]
    if files and all(file.suffix.lower() in ARCHIVES for file in files):
        names = " ".join(shown_path(file) for file in files[:3])
        command = "unzip" if files[0].suffix.lower() == ".zip" else "tar xf"
        raise InputError(f"{path}: is an archive; unpack it first (`{command} {names}`) and pass the new folder.")


def advice(folder: Path) -> str:
    """Return how to convert a folder whose format is recognised, but not read. Empty if it is not recognised."""
    for matches, format, name in UNREAD:
        if matches(folder):
            if format is None:
                return f"It looks like {name}; export the data as COCO in the annotation tool."
            command = DATUMARO.format(path=folder, format=format)
            return f"It looks like {name}, which is not read; this command converts it: {command}."
    if any(folder.glob("labels/**/*.txt")) or any(folder.glob("*/labels/*.txt")):
        return "It has labels as in YOLO, but no class names; add a data.yaml, or a classes.txt with one name per line."
    for file in sorted(folder.glob("*.json"))[:3]:
        try:
            if text := describe_json(read_json(file)):
                return f"{printable(file.name, 80)}:{text}"
        except InputError:
            continue
    return ""


def _has(*patterns: str) -> Callable[[Path], bool]:
    return lambda folder: any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _xml_of_cvat(folder: Path) -> bool:
    for file in (*folder.glob("*.xml"), *folder.glob("annotations/*.xml")):
        return b"<annotations" in start_of(file)
    return False


# A test of the folder, the name of the format in Datumaro (None if the annotation tool can export COCO), and the name
# of the format in messages.
UNREAD: tuple[tuple[Callable[[Path], bool], str | None, str], ...] = (
    (_xml_of_cvat, "cvat", "CVAT's XML"),
    (_has("*.tfrecord", "*/*.tfrecord"), "tf_detection_api", "TFRecord files"),
    (_has("label_2/*.txt", "*/label_2/*.txt"), "kitti", "KITTI"),
    (_has("*-annotations-bbox.csv", "annotations/*-annotations-bbox.csv"), "open_images", "Open Images"),
    (_has("label_colors.txt", "gtFine/*"), "cityscapes", "segmentation masks of Cityscapes"),
    (_has("meta.json", "*/meta.json"), None, "a project of Supervisely"),
    (_has("*_annotations.csv", "*/_annotations.csv", "*.csv"), None, "a table in CSV"),
    (_has("*createml.json", "*/*createml.json"), None, "Create ML's format"),
)
