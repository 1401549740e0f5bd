# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Reading a split from a data set on the Hub, whose rows have an image and its objects."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import datasets
from PIL import ExifTags, Image

from ..errors import InputError
from .coco import SplitFields, is_crowd, one_name, split_names
from .images import read_image


def load_hub_split(dataset_name: str, split: str, class_names_column: str | None) -> tuple[SplitFields, str]:
    """Read a split of a data set on the Hub.

    The classes are those of `objects.category`: the names of a ClassLabel, or the sorted values of strings or numbers.
    They are collected from all splits of the data set, so that its splits have the same classes even if some classes do
    not occur in one of them.

    Returns:
        The fields of a `DetectionSplit`, and the name of the split for error messages.

    Raises:
        InputError: The data set cannot be loaded, or its rows do not have these columns.
    """
    try:
        # Loads all splits, because `datasets` prepares them together anyway.
        all_splits = datasets.load_dataset(dataset_name)
    except Exception as error:  # `datasets` raises many kinds of errors for a data set that does not exist
        raise InputError(
            f"dataset_name={dataset_name!r}, split {split!r}: no such folder, and no such data set on the Hub "
            f"({error})."
        ) from None
    name = next((name for name in split_names(split) if name in all_splits), None)
    if name is None:
        raise InputError(f"{dataset_name}: no split {split!r} on the Hub; it has {', '.join(all_splits)}.")
    rows, source = all_splits[name], f"{dataset_name} ({split})"
    missing = {"image", "objects"} - set(rows.column_names)
    if missing:
        raise InputError(f"{dataset_name}: no column {', '.join(sorted(missing))}; it has {rows.column_names}.")
    if not isinstance(rows.features["image"], datasets.Image):
        raise InputError(f"{dataset_name}: the column image has no images but {rows.features['image']}.")
    object_fields = _object_fields(rows)
    if not isinstance(object_fields, dict):
        raise InputError(f"{dataset_name}: the column objects must have fields, got {object_fields}.")
    for field in ("bbox", "category", class_names_column or "category"):
        if field not in object_fields:
            raise InputError(f"{dataset_name}: `objects` has no `{field}`; it has {sorted(object_fields)}.")
    if not isinstance(object_fields["category"], (datasets.Value, datasets.ClassLabel)):
        raise InputError(
            f"{dataset_name}: `objects.category` must be a number, a string or a ClassLabel, got "
            f"{object_fields['category']}."
        )
    classes = _classes(all_splits, object_fields["category"], class_names_column, dataset_name)
    position = {value: index for index, value in enumerate(classes)}
    crowd_field = next((field for field in ("iscrowd", "is_crowd") if field in object_fields), "")
    boxes, labels, crowds = [], [], []
    for where, objects in _objects(rows, source):
        for value in objects["category"]:
            if value not in position:
                raise InputError(f"{where}: unknown category {value!r}.")
        boxes.append(objects["bbox"])
        labels.append([position[value] for value in objects["category"]])
        crowds.append([is_crowd(v, where) for v in objects.get(crowd_field, [0] * len(boxes[-1]))])
    images = HubImages(rows, source)
    fields: SplitFields = {
        "class_names": list(classes.values()),
        "image_ids": list(range(len(rows))),
        "sizes": images.sizes,
        "boxes": boxes,
        "labels": labels,
        "crowds": crowds,
        "open_image": images,
    }
    return fields, source


def _object_fields(rows: datasets.Dataset) -> Any:
    """Return the feature of each field of an object. It is a dict, unless the objects have no fields."""
    # A row has a list of dicts, or the dict of lists that `Sequence` makes of one.
    feature = rows.features["objects"]
    if isinstance(feature, dict):
        return {field: getattr(values, "feature", values) for field, values in feature.items()}
    return getattr(feature, "feature", feature)


def _objects(rows: datasets.Dataset, source: str) -> Iterator[tuple[str, dict[str, list]]]:
    """Yield for each row its name in error messages, and its objects as a dict of lists of the same length.

    Raises:
        InputError: An object or a field is missing, or the fields have different lengths.
    """
    fields = list(_object_fields(rows))
    for index, objects in enumerate(rows["objects"]):
        where = f"{source}: image {index}"
        # A row without objects may have None.
        objects = objects or []
        if None in (objects.values() if isinstance(objects, dict) else objects):
            raise InputError(f"{where}: a value in `objects` is missing.")
        if not isinstance(objects, dict):
            objects = {field: [item[field] for item in objects] for field in fields}
        if len({len(values) for values in objects.values()}) > 1:
            raise InputError(f"{where}: the fields of `objects` have different lengths.")
        yield where, objects


def _classes(
    all_splits: datasets.DatasetDict, category: Any, class_names_column: str | None, dataset_name: str
) -> dict[Any, str]:
    """Return the class name for each value of `objects.category`, in the order of the classes.

    Args:
        all_splits: All splits of the data set.
        category: Feature of `objects.category`.
        class_names_column: Field of `objects` with the names, or None.
        dataset_name: Name of the data set, for error messages.
    """
    labels = dict(enumerate(getattr(category, "names", ())))
    if labels and class_names_column is None:
        return labels
    if class_names_column is None and category.dtype not in ("string", "large_string"):
        raise InputError(
            f"{dataset_name}: `objects.category` has no class names; if another field of `objects` has them, pass "
            "class_names_column=... with its name."
        )
    names: dict[Any, str] = {}
    for split, rows in all_splits.items():
        for where, objects in _objects(rows, f"{dataset_name} ({split})"):
            for value, name in zip(objects["category"], objects[class_names_column or "category"], strict=True):
                if value is None:
                    raise InputError(f"{where}: unknown category {value!r}.")
                name = one_name(name, f"{where}: `{class_names_column or 'category'}`")
                if names.setdefault(value, name) != name:
                    raise InputError(f"{where}: category {value!r} is named {name!r} here and {names[value]!r} before.")
    return {value: names[value] if value in names else labels[value] for value in labels or sorted(names)}


class HubImages:
    """Opens images of the column `image` by index, as RGB.

    Attributes:
        sizes: (width, height) of each image in pixels, after the rotation that EXIF asks for. They are read from the
            headers, without decoding the images.
    """

    def __init__(self, rows: datasets.Dataset, source: str):
        self.rows = rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
        self.source = source
        self.sizes = [self._header_size(index) for index in range(len(rows))]

    def __call__(self, index: int) -> Image.Image:
        where = f"{self.source}: image {index}"
        image = read_image(self._file(index), where)
        if image.size != self.sizes[index]:
            raise InputError(f"{where}: {image.size} pixels, but its header says {self.sizes[index]}.")
        return image

    def _header_size(self, index: int) -> tuple[int, int]:
        file = self._file(index)
        try:
            with Image.open(file) as image:
                # Not `image.getexif()`, which decodes a PNG to look for EXIF data after its pixels.
                turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= 5
                width, height = image.size
                return (height, width) if turned else (width, height)
        except Exception as error:  # Pillow raises many kinds of errors for damaged files
            raise InputError(f"{self.source}: image {index}: cannot be opened as an image ({error}).") from None

    def _file(self, index: int) -> Any:
        image = self.rows[index]["image"] or {}
        if image.get("bytes") is None and image.get("path") is None:
            raise InputError(f"{self.source}: image {index} is missing.")
        return image["path"] if image.get("bytes") is None else io.BytesIO(image["bytes"])
