# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detection data from a folder in COCO format or the Hub, as one small class that training and evaluation read."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from coco_folder import find_layout, load_coco_folder, read_json, split_names
from errors import InputError
from peft_sdpt.grounding import class_prompt

# What the four numbers of a box are, by the name of their format.
BOX_FORMATS = {"xywh": "x, y, width, height", "xyxy": "x0, y0, x1, y1"}

Box = tuple[float, float, float, float]


@dataclass
class DetectionSplit:
    """One split of a detection data set.

    Attributes:
        class_names: names of the classes; a label is an index into them.
        image_ids: an id an image, unique.
        sizes: (width, height) of each image, pixels.
        boxes: of each image a list of (x, y, width, height), pixels.
        labels: of each image a class index a box.
        crowds: of each image whether each box stands for a crowd: ignored in evaluation, left out of training.
        open_image: index -> RGB picture; raises `InputError` for one that is missing, damaged or of another size.
            Of data that was loaded it can be pickled, so that workers of a DataLoader may be spawned.
        left_out: what was wrong with each box that was left out.
    """

    class_names: list[str]
    image_ids: list[Any]
    sizes: list[tuple[int, int]]
    boxes: list[list[Box]]
    labels: list[list[int]]
    crowds: list[list[bool]]
    open_image: Callable[[int], Image.Image]
    left_out: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image_ids)

    def has_objects(self) -> bool:
        """Whether there is a box that is not a crowd's."""
        return not all(crowd for crowds in self.crowds for crowd in crowds)

    def as_coco(self) -> dict:
        """The split as a COCO annotation file, ids being indices."""
        annotations = []
        for image, (boxes, labels, crowds) in enumerate(zip(self.boxes, self.labels, self.crowds, strict=True)):
            for box, label, crowd in zip(boxes, labels, crowds, strict=True):
                annotations.append(
                    {
                        # COCO evaluation takes id 0 for "no match".
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": label,
                        "bbox": list(box),
                        "area": box[2] * box[3],
                        "iscrowd": int(crowd),
                    }
                )
        return {
            "images": [{"id": i, "width": w, "height": h} for i, (w, h) in enumerate(self.sizes)],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.class_names)],
        }

    def subset(self, indices: Sequence[int]) -> DetectionSplit:
        """Some of the images, in the order of `indices`; the classes stay."""
        per_image = ("image_ids", "sizes", "boxes", "labels", "crowds")
        return replace(
            self,
            **{name: [getattr(self, name)[index] for index in indices] for name in per_image},
            open_image=functools.partial(_open_nth, self.open_image, list(indices)),
        )

    def fingerprint(self) -> str:
        """16 hex digits of all but the pictures' pixels: the same again means that a resumed run has the same data."""
        fields = [self.class_names, self.image_ids, self.sizes, self.boxes, self.labels, self.crowds]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]


def _open_nth(open_image: Callable[[int], Image.Image], indices: list[int], index: int) -> Image.Image:
    return open_image(indices[index])


def centre_boxes(boxes: list[Box], size: tuple[int, int]) -> torch.Tensor:
    """Boxes (x, y, width, height) in pixels as a detector takes them: centre, width and height as shares of the image.

    Args:
        boxes: n boxes, perhaps none.
        size: (width, height) of the image, pixels.

    Returns:
        (n, 4), float32.
    """
    shares = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / torch.tensor([*size, *size])
    return torch.cat([shares[:, :2] + shares[:, 2:] / 2, shares[:, 2:]], dim=1)


def few_shot(data: DetectionSplit, shots: int, seed: int) -> list[int]:
    """Choose images for few-shot training as GLIP does for ODinW (`few_shot` of its `COCODataset`).

    Images come in a random order, and one is taken while any of its classes has been seen on fewer than `shots` taken
    images. So a class is on at least `shots` of them, or on all its images if it has fewer; frequent classes are on
    more. Boxes of crowds do not count. More shots with one seed add images to those of fewer shots.

    Returns:
        Sorted indices into `data`; they depend on the arguments alone.
    """
    # Like GLIP, which sorts by id and leaves out images without a box before it shuffles.
    order = [index for index, boxes in enumerate(data.boxes) if boxes]
    order.sort(key=lambda index: (isinstance(data.image_ids[index], str), data.image_ids[index]))
    random.Random(seed).shuffle(order)
    seen = [0] * len(data.class_names)
    taken = []
    for index in order:
        labels, crowds = data.labels[index], data.crowds[index]
        classes = {label for label, crowd in zip(labels, crowds, strict=True) if not crowd}
        if any(seen[label] < shots for label in classes):
            taken.append(index)
            for label in classes:
                seen[label] += 1
    return sorted(taken)


def check_pictures(
    data: DetectionSplit, images: Sequence[int] | None = None, cores: int = 1, disable_progress: bool = False
) -> dict[int, str]:
    """Open and decode pictures.

    Args:
        data: their split.
        images: indices of those to check; None for all.
        cores: how many are decoded at a time.
        disable_progress: show no bar.

    Returns:
        Index -> what is wrong, naming the file, of the pictures that `open_image` refuses.
    """

    def problem(index: int) -> str | None:
        try:
            data.open_image(index)
        except InputError as error:
            return str(error)
        return None

    images = range(len(data)) if images is None else images
    pool = ThreadPoolExecutor(cores)
    try:
        problems = pool.map(problem, images)
        problems = list(tqdm(problems, desc="checking pictures", total=len(images), disable=disable_progress))
    finally:
        # Whoever interrupts this does not wait for the rest of the pictures.
        pool.shutdown(cancel_futures=True)
    return {index: text for index, text in zip(images, problems, strict=True) if text}


def require_same_classes(splits: dict[str, DetectionSplit], dataset_name: str) -> None:
    """Refuse splits whose labels do not mean the same.

    Args:
        splits: name -> split.
        dataset_name: what the error names.

    Raises:
        InputError: saying which classes only one of two splits has, or where their order differs.
    """
    (first, one), *others = splits.items()
    for second, other in others:
        if one.class_names == other.class_names:
            continue
        where = f"{dataset_name}: the splits {first} and {second} name"
        only = [
            f"only {name} has {_listed(names)}"
            for name, names in (
                (first, [name for name in one.class_names if name not in other.class_names]),
                (second, [name for name in other.class_names if name not in one.class_names]),
            )
            if names
        ]
        if only:
            raise InputError(f"{where} different classes: {'; '.join(only)}.")
        # No name is there twice, so both lists are of one length.
        index = next(i for i, name in enumerate(one.class_names) if name != other.class_names[i])
        raise InputError(
            f"{where} their classes in different orders: class {index} is {one.class_names[index]!r} in {first} and "
            f"{other.class_names[index]!r} in {second}."
        )


def _listed(names: list[str]) -> str:
    """Names as an error lists them: LVIS has 1203."""
    more = [f"{len(names) - 10} more"] if len(names) > 10 else []
    return ", ".join([*map(repr, names[:10]), *more])


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
            f"--dataset_name {dataset_name!r}: no such folder, and its splits on the Hub cannot be read ({error})."
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
        raise InputError(f"--bbox_format {bbox_format!r}: must be one of {', '.join(BOX_FORMATS)}.")
    folder = Path(dataset_name)
    try:
        if folder.exists():
            fields, source = load_coco_folder(folder, split, class_names_column)
        else:
            # Here, because `datasets` takes its time to import and a folder does without.
            from hub_data import load_hub_split

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
            raise InputError(f"{file}: there is no class {old!r}; there are {_listed(class_names)}.")
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
                problem += f"; all boxes fit their images as {BOX_FORMATS[other]}, which is --bbox_format {other}"
            else:
                problem += "; --skip_bad_boxes leaves such boxes out"
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
