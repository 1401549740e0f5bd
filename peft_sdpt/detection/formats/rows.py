# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Rows with an image and its objects: data sets on the Hub, and folders that `datasets` reads.

Such folders have Parquet files, a `metadata.jsonl` beside the images (imagefolder), or were written by `save_to_disk`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import huggingface_hub

from ...errors import InputError
from ...wording import printable, quoted
from ..images import files_in
from .files import SplitImages, leads_out
from .source import Source, SplitFields, annotated_size, is_crowd, one_name

# Other names of the fields of an object, as data sets on the Hub and the documentation of `datasets` have them.
OTHER_NAMES = {
    "bbox": ("bboxes", "boxes"),
    "category": ("categories", "category_id", "label", "labels"),
    "iscrowd": ("is_crowd",),
}
NUMBERS = ("int16", "int32", "int64", "uint16", "uint32", "uint64", "float32", "float64")
# A folder with one of these files is an imagefolder of `datasets`.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def find_on_hub(
    dataset_name: str, class_names_column: str | None, numbers_are_names: bool, allow_outside_images: bool
) -> Source:
    """Load a data set from the Hub.

    Raises:
        InputError: There is no such data set.
    """
    try:
        # Loads all splits, because `datasets` prepares them together anyway.
        all_splits = datasets.load_dataset(dataset_name)
    except Exception as error:  # `datasets` raises many kinds of errors for a data set that does not exist
        raise InputError(
            f"dataset_name={quoted(dataset_name)}: no such folder, and no such data set on the Hub "
            f"({printable(str(error), 500)})."
        ) from None
    # Rows can name any file of this computer, but only files in the caches of `datasets` were downloaded.
    places = None if allow_outside_images else _caches()
    return _source("the Hub", all_splits, dataset_name, class_names_column, numbers_are_names, places)


def find_in_folder(
    folder: Path, class_names_column: str | None, numbers_are_names: bool, root: Path | None
) -> Source | None:
    """Load a folder that `datasets` reads.

    Args:
        folder: The folder.
        class_names_column, numbers_are_names: See `find_source`.
        root: The folder of the data set, which images may not be outside. None allows that.

    Returns:
        The data set, or None if the folder has no such files.

    Raises:
        InputError: `datasets` cannot load the folder.
    """
    is_saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    files = files_in(folder)
    has_metadata = any(file.name in METADATA for file in files)
    if not is_saved and not has_metadata and not any(file.suffix == ".parquet" for file in files):
        return None
    try:
        if is_saved:
            format, all_splits = "save_to_disk", datasets.load_from_disk(str(folder))
        elif has_metadata:
            format, all_splits = "imagefolder", datasets.load_dataset("imagefolder", data_dir=str(folder))
        else:
            format, all_splits = "Parquet", datasets.load_dataset(str(folder))
    except Exception as error:  # `datasets` raises many kinds of errors
        raise InputError(f"{folder}: cannot be loaded by `datasets` ({printable(str(error), 500)}).") from None
    if isinstance(all_splits, datasets.Dataset):
        all_splits = datasets.DatasetDict({str(all_splits.split or "train"): all_splits})
    places = None if root is None else (root, *_caches())
    return _source(format, all_splits, str(folder), class_names_column, numbers_are_names, places)


def _caches() -> tuple[Path, ...]:
    """Return the folders in which `datasets` keeps files that it downloads or unpacks."""
    config = datasets.config
    folders = [config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH]
    folders += [config.EXTRACTED_DATASETS_PATH, huggingface_hub.constants.HF_HUB_CACHE]
    return tuple(Path(os.path.abspath(folder)) for folder in folders)


def _source(
    format: str,
    all_splits: datasets.DatasetDict,
    dataset_name: str,
    class_names_column: str | None,
    numbers_are_names: bool,
    places: tuple[Path, ...] | None,
) -> Source:
    """Return the source of rows whose images may only be in these folders. None allows all folders."""

    def read(split: str) -> tuple[SplitFields, str]:
        fields = _read(all_splits, split, dataset_name, class_names_column, numbers_are_names, places)
        return fields, f"{dataset_name} ({split})"

    return Source(format, list(all_splits), read, sets_boxes=False)


def _read(
    all_splits: datasets.DatasetDict,
    split: str,
    dataset_name: str,
    class_names_column: str | None,
    numbers_are_names: bool,
    places: tuple[Path, ...] | None,
) -> SplitFields:
    """Read a split.

    The classes are those of `objects.category`: the names of a ClassLabel, or the sorted values of strings or numbers.
    They are collected from all splits of the data set, so that its splits have the same classes even if some classes do
    not occur in one of them.
    """
    rows, source = all_splits[split], f"{dataset_name} ({split})"
    missing = {"image", "objects"} - set(rows.column_names)
    if missing:
        raise InputError(
            f"{dataset_name}: no column {', '.join(sorted(missing))}; it has {quoted(rows.column_names, 300)}."
        )
    if not isinstance(rows.features["image"], datasets.Image):
        raise InputError(f"{dataset_name}: the column image has no images but {quoted(rows.features['image'])}.")
    object_fields = _object_fields(rows)
    if not isinstance(object_fields, dict):
        raise InputError(
            f"{dataset_name}: the column objects must have fields, got {quoted(object_fields)}. A metadata.csv cannot "
            "hold objects; use metadata.jsonl."
        )
    for field in ("bbox", "category", class_names_column or "category"):
        if field not in object_fields:
            others = f" (or {', '.join(OTHER_NAMES[field])})" if field in OTHER_NAMES else ""
            existing = sorted(_object_fields(rows, rename=False))
            raise InputError(
                f"{dataset_name}: `objects` has no `{printable(field, 80)}`{others}; it has {quoted(existing, 300)}."
            )
    if not isinstance(object_fields["category"], (datasets.Value, datasets.ClassLabel)):
        raise InputError(
            f"{dataset_name}: `objects.category` must be a number, a string or a ClassLabel, got "
            f"{quoted(object_fields['category'])}."
        )
    classes = _classes(all_splits, object_fields["category"], class_names_column, dataset_name, numbers_are_names)
    position = {value: index for index, value in enumerate(classes)}
    boxes, labels, crowds = [], [], []
    for where, objects in _objects(rows, source):
        for value in objects["category"]:
            if value not in position:
                raise InputError(f"{where}: unknown category {quoted(value)}.")
        boxes.append(objects["bbox"])
        labels.append([position[value] for value in objects["category"]])
        crowds.append([is_crowd(v, where) for v in objects.get("iscrowd", [0] * len(boxes[-1]))])
    # `datasets` does not decode the images, because it would always turn them as their EXIF orientation says.
    images = RowImages(rows.select_columns("image").cast_column("image", datasets.Image(decode=False)), source, places)
    opener = SplitImages(images, images.where, source, _annotated_sizes(rows, source))
    return {
        "class_names": list(classes.values()),
        "image_ids": list(range(len(rows))),
        "sizes": opener.known_sizes(),
        "boxes": boxes,
        "labels": labels,
        "crowds": crowds,
        "open_image": opener,
        "left_out": [],
    }


def _usual_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an object under their usual names."""
    renamed = dict(fields)
    for usual, others in OTHER_NAMES.items():
        for other in others:
            if usual not in renamed and other in renamed:
                renamed[usual] = renamed[other]
    return renamed


def _object_fields(rows: datasets.Dataset, rename: bool = True) -> Any:
    """Return the feature of each field of an object. It is a dict, unless the objects have no fields."""
    # A row has a list of dicts, or the dict of lists that `Sequence` makes of one.
    feature = rows.features["objects"]
    if isinstance(feature, dict):
        fields = {field: getattr(values, "feature", values) for field, values in feature.items()}
    else:
        fields = getattr(feature, "feature", feature)
    return _usual_names(fields) if rename and isinstance(fields, dict) else fields


def _objects(rows: datasets.Dataset, source: str) -> Iterator[tuple[str, dict[str, list]]]:
    """Yield for each row its name in error messages, and its objects as a dict of lists of the same length.

    Raises:
        InputError: An object or a field is missing, or the fields have different lengths.
    """
    fields = list(_object_fields(rows, rename=False))
    for index, objects in enumerate(rows["objects"]):
        where = f"{source}: image {index}"
        # A row without objects may have None.
        objects = objects or []
        if None in (objects.values() if isinstance(objects, dict) else objects):
            raise InputError(f"{where}: a value in `objects` is missing.")
        if not isinstance(objects, dict):
            objects = {field: [item[field] for item in objects] for field in fields}
        objects = {field: values for field, values in _usual_names(objects).items() if isinstance(values, list)}
        if len({len(values) for values in objects.values()}) > 1:
            raise InputError(f"{where}: the fields of `objects` have different lengths.")
        yield where, objects


def _classes(
    all_splits: datasets.DatasetDict,
    category: Any,
    class_names_column: str | None,
    dataset_name: str,
    numbers_are_names: bool,
) -> dict[Any, str]:
    """Return the class name for each value of `objects.category`, in the order of the classes.

    Args:
        all_splits: All splits of the data set.
        category: Feature of `objects.category`.
        class_names_column: Field of `objects` with the names, or None.
        dataset_name: Name of the data set, for error messages.
        numbers_are_names: Whether a number without a name is its own name.
    """
    labels = dict(enumerate(getattr(category, "names", ())))
    if labels and class_names_column is None:
        return labels
    is_number = category.dtype not in ("string", "large_string")
    if class_names_column is None and is_number and not numbers_are_names:
        raise InputError(
            f"{dataset_name}: `objects.category` has no class names; if another field of `objects` has them, pass "
            "class_names_column=... with its name. Otherwise, pass class_names_file=... with a JSON file such as "
            '{"0": "cat", "1": "dog"}.'
        )
    names: dict[Any, str] = {}
    for split, rows in all_splits.items():
        for where, objects in _objects(rows, f"{dataset_name} ({split})"):
            for value, name in zip(objects["category"], objects[class_names_column or "category"], strict=True):
                if value is None:
                    raise InputError(f"{where}: unknown category {value}.")
                if class_names_column is None and is_number:
                    name = str(value)
                name = one_name(name, f"{where}: `{printable(class_names_column or 'category', 80)}`")
                if names.setdefault(value, name) != name:
                    here, before = quoted(name), quoted(names[value])
                    raise InputError(f"{where}: category {quoted(value)} is named {here} here and {before} before.")
    return {value: names[value] if value in names else labels[value] for value in labels or sorted(names)}


def _annotated_sizes(rows: datasets.Dataset, source: str) -> list[tuple[int, int] | None]:
    """Return the columns `width` and `height`, which many data sets have. None for images without these values.

    Raises:
        InputError: A value is not a number of pixels. The message starts with `source`.
    """
    columns = [rows[name] for name in ("width", "height") if getattr(rows.features.get(name), "dtype", "") in NUMBERS]
    if len(columns) < 2:
        return [None] * len(rows)
    sizes: list[tuple[int, int] | None] = []
    for index, size in enumerate(zip(*columns, strict=True)):
        try:
            sizes.append(annotated_size(*size))
        except (ValueError, OverflowError):  # NaN, infinity, or an absurd number
            raise InputError(
                f"{source}: image {index}: `width` and `height` must be numbers, got {quoted(size)}."
            ) from None
    return sizes


@dataclass(frozen=True)
class RowImages:
    """The images of the rows of a split, as the `source` of `SplitImages`.

    Attributes:
        rows: The rows, with image files that are not decoded.
        name: Name of the split for error messages.
        places: The folders that files of images may be in. None allows all.
    """

    rows: datasets.Dataset
    name: str
    places: tuple[Path, ...] | None

    def __call__(self, index: int) -> str | IO[bytes]:
        image = self.rows[index]["image"] or {}
        if image.get("bytes") is None and image.get("path") is None:
            raise InputError(f"{self.where(index)} is missing.")
        if image.get("bytes") is not None:
            return io.BytesIO(image["bytes"])
        path = Path(os.path.abspath(image["path"]))
        if self.places is not None and all(leads_out(path, place) for place in self.places):
            raise InputError(
                f"{self.where(index)}: its file {quoted(image['path'])} leads out of the folder of the data set; "
                "allow_outside_images=True follows such names."
            )
        return image["path"]

    def where(self, index: int) -> str:
        return f"{self.name}: image {index}"
