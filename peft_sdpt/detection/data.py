# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A split of a detection data set, as one small class that training and evaluation read."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..errors import InputError

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


def check_images(
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
            f"only {name} has {listed(names)}"
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


def listed(names: list[str]) -> str:
    """Names as an error lists them: LVIS has 1203."""
    more = [f"{len(names) - 10} more"] if len(names) > 10 else []
    return ", ".join([*map(repr, names[:10]), *more])
