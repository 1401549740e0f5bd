# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detection data from the Hub: rows with an image and its objects, read by `datasets`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import datasets
from PIL import ExifTags, Image

from ..errors import InputError
from .coco import is_crowd, one_name, split_names
from .images import read_image


def load_hub_split(dataset_name: str, split: str, class_names_column: str | None) -> tuple[dict[str, Any], str]:
    """The fields of a `DetectionSplit`, boxes being as they are in the rows; and what errors call the split.

    The classes are those of `objects.category`: the names of a ClassLabel, or the sorted values of strings or numbers.
    Values, and the names that `class_names_column` gives them, are gathered over all splits of the data set, so that
    its splits agree on the classes even where one split lacks some.
    """
    try:
        # All splits: `datasets` prepares them together whichever is asked for.
        found = datasets.load_dataset(dataset_name)
    except Exception as error:  # `datasets` raises many kinds for one cause: it is not there
        raise InputError(
            f"dataset_name={dataset_name!r}, split {split!r}: no such folder, and the Hub has none ({error})."
        ) from None
    name = next((name for name in split_names(split) if name in found), None)
    if name is None:
        raise InputError(f"{dataset_name}: no split {split!r} on the Hub; it has {', '.join(found)}.")
    rows, source = found[name], f"{dataset_name} ({split})"
    missing = {"image", "objects"} - set(rows.column_names)
    if missing:
        raise InputError(f"{dataset_name}: no column {', '.join(sorted(missing))}; it has {rows.column_names}.")
    if not isinstance(rows.features["image"], datasets.Image):
        raise InputError(f"{dataset_name}: the column image holds no pictures but {rows.features['image']}.")
    fields = _object_fields(rows)
    for field in ("bbox", "category", class_names_column or "category"):
        if field not in fields:
            raise InputError(f"{dataset_name}: `objects` has no `{field}`; it has {sorted(fields)}.")
    classes = _classes(found, fields["category"], class_names_column, dataset_name)
    position = {value: index for index, value in enumerate(classes)}
    crowd_field = next((field for field in ("iscrowd", "is_crowd") if field in fields), None)
    boxes, labels, crowds = [], [], []
    for where, objects in _objects(rows, source):
        for value in objects["category"]:
            if value not in position:
                raise InputError(f"{where}: unknown category {value!r}.")
        boxes.append(objects["bbox"])
        labels.append([position[value] for value in objects["category"]])
        crowds.append([is_crowd(v, where) for v in objects.get(crowd_field, [0] * len(boxes[-1]))])
    pictures = HubPictures(rows, source)
    fields = {
        "class_names": list(classes.values()),
        "image_ids": list(range(len(rows))),
        "sizes": pictures.sizes,
        "boxes": boxes,
        "labels": labels,
        "crowds": crowds,
        "open_image": pictures,
    }
    return fields, source


def _object_fields(rows: datasets.Dataset) -> dict[str, Any]:
    """Field -> feature of one object. A row has a list of dicts, or the dict of lists that `Sequence` makes of it."""
    feature = rows.features["objects"]
    if isinstance(feature, dict):
        return {field: getattr(values, "feature", values) for field, values in feature.items()}
    return getattr(feature, "feature", feature)


def _objects(rows: datasets.Dataset, source: str) -> Iterator[tuple[str, dict[str, list]]]:
    """What errors call each row, and its objects as a dict of lists of one length."""
    fields = list(_object_fields(rows))
    for index, objects in enumerate(rows["objects"]):
        where = f"{source}: image {index}"
        # A row without objects may hold nothing at all.
        objects = objects or []
        if not isinstance(objects, dict):
            objects = {field: [item[field] for item in objects] for field in fields}
        if len({len(values) for values in objects.values()}) > 1:
            raise InputError(f"{where}: the fields of `objects` are not of one length.")
        yield where, objects


def _classes(
    found: datasets.DatasetDict, category: Any, class_names_column: str | None, dataset_name: str
) -> dict[Any, str]:
    """Value of `objects.category` -> name of the class, in the classes' order."""
    labels = dict(enumerate(getattr(category, "names", ())))
    if labels and class_names_column is None:
        return labels
    if class_names_column is None and category.dtype not in ("string", "large_string"):
        raise InputError(
            f"{dataset_name}: `objects.category` has no class names; if another field of `objects` has them, say "
            f"which with class_names_column=... ."
        )
    names: dict[Any, str] = {}
    for split, rows in found.items():
        for where, objects in _objects(rows, f"{dataset_name} ({split})"):
            for value, name in zip(objects["category"], objects[class_names_column or "category"], strict=True):
                name = one_name(name, f"{where}: `{class_names_column or 'category'}`")
                if names.setdefault(value, name) != name:
                    raise InputError(f"{where}: category {value!r} is named {name!r}, and {names[value]!r} before.")
    return {value: names.get(value, labels.get(value)) for value in labels or sorted(names)}


class HubPictures:
    """index -> RGB picture of the column `image`.

    Attributes:
        sizes: (width, height) of each picture as it is opened, pixels; read from its header, without decoding it.
    """

    def __init__(self, rows: datasets.Dataset, source: str):
        self.rows = rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
        self.source = source
        self.sizes = [self._header_size(index) for index in range(len(rows))]

    def __call__(self, index: int) -> Image.Image:
        where = f"{self.source}: image {index}"
        picture = read_image(self._file(index), where)
        if picture.size != self.sizes[index]:
            raise InputError(f"{where}: {picture.size} pixels, but its header said {self.sizes[index]}.")
        return picture

    def _header_size(self, index: int) -> tuple[int, int]:
        file = self._file(index)
        try:
            with Image.open(file) as picture:
                # Not `picture.getexif()`, which decodes a PNG in search of EXIF behind its pixels.
                turned = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1) >= 5
                return picture.size[::-1] if turned else picture.size
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise InputError(f"{self.source}: image {index}: not a picture that opens ({error}).") from None

    def _file(self, index: int) -> Any:
        image = self.rows[index]["image"] or {}
        if image.get("bytes") is None and image.get("path") is None:
            raise InputError(f"{self.source}: image {index} is missing.")
        return image["path"] if image.get("bytes") is None else io.BytesIO(image["bytes"])
