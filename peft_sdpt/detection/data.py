# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""`DetectionSplit`: one split of a detection data set, for training and evaluation."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..errors import InputError
from .grounding import plain_name

Box = tuple[float, float, float, float]


@dataclass
class DetectionSplit:
    """One split of a detection data set.

    Attributes:
        class_names: Names of the classes. A label is an index into this list.
        image_ids: A unique id for each image.
        sizes: (width, height) of each image in pixels.
        boxes: For each image, a list of (x, y, width, height) in pixels.
        labels: For each image, the class index of each box.
        crowds: For each image, whether each box marks a crowd. Such boxes are ignored in evaluation and not used for
            training.
        open_image: Maps an index to the image in RGB. It raises `InputError` if the image is missing, damaged or has
            another size. `load_split` gives one that can be pickled, for DataLoader workers that are spawned.
        left_out: For each box that was left out, what was wrong with it.
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
        """Return whether any box marks a single object, not a crowd."""
        return not all(crowd for crowds in self.crowds for crowd in crowds)

    def as_coco(self) -> dict:
        """Return the split as the content of a COCO annotation file. The ids of images and categories are indices."""
        annotations: list[dict[str, Any]] = []
        for image, (boxes, labels, crowds) in enumerate(zip(self.boxes, self.labels, self.crowds, strict=True)):
            for box, label, crowd in zip(boxes, labels, crowds, strict=True):
                annotations.append(
                    {
                        # Starts at 1, because COCO evaluation uses id 0 for "no match".
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
        """Select some of the images.

        Args:
            indices: Indices of the images, in the new order.

        Returns:
            A split of these images with the same classes.
        """
        per_image = ("image_ids", "sizes", "boxes", "labels", "crowds")
        return replace(
            self,
            **{name: [getattr(self, name)[index] for index in indices] for name in per_image},
            open_image=functools.partial(_open_nth, self.open_image, list(indices)),
        )

    def with_classes(self, class_names: list[str]) -> DetectionSplit:
        """Change the order of the classes, or add classes.

        Args:
            class_names: The new classes, with all classes of the split among them, in any letter case.

        Returns:
            A split with these classes and the same images.
        """
        position = {plain_name(name): index for index, name in enumerate(class_names)}
        new = [position[plain_name(name)] for name in self.class_names]
        labels = [[new[label] for label in group] for group in self.labels]
        return replace(self, class_names=class_names, labels=labels)

    def fingerprint(self) -> str:
        """Return a hash of everything but the pixels, 16 hex digits. A resumed run uses it to check its data."""
        fields = [self.class_names, self.image_ids, self.sizes, self.boxes, self.labels, self.crowds]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]


def _open_nth(open_image: Callable[[int], Image.Image], indices: list[int], index: int) -> Image.Image:
    return open_image(indices[index])


def centre_boxes(boxes: list[Box], size: tuple[int, int]) -> torch.Tensor:
    """Convert boxes to the format of a detector: centre, width and height as fractions of the image size.

    Args:
        boxes: n boxes (x, y, width, height) in pixels. n may be 0.
        size: (width, height) of the image in pixels.

    Returns:
        Tensor of shape (n, 4), float32.
    """
    shares = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) / torch.tensor([*size, *size])
    return torch.cat([shares[:, :2] + shares[:, 2:] / 2, shares[:, 2:]], dim=1)


def few_shot(data: DetectionSplit, shots: int, seed: int) -> list[int]:
    """Choose images for few-shot training as GLIP does for ODinW (`few_shot` in its `COCODataset`).

    The function goes through the images in random order. It takes an image if one of its classes is on fewer than
    `shots` of the images taken so far. So each class is on at least `shots` of the chosen images, or on all images that
    have it. Frequent classes are on more images. Crowds do not count.

    Args:
        data: The split to choose from.
        shots: Number of images per class.
        seed: Seed of the random order. With the same seed, more shots add images to those of fewer shots.

    Returns:
        Sorted indices into `data`. They depend on the arguments alone.
    """
    # GLIP also sorts by id and drops images without boxes before it shuffles.
    order = shuffled(data, [index for index, boxes in enumerate(data.boxes) if boxes], seed)
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
    """Open and decode images of a split.

    Args:
        data: The split.
        images: Indices of the images to check. None for all.
        cores: Number of images to decode at the same time.
        disable_progress: Whether to hide the progress bar.

    Returns:
        Maps the index of each image that `open_image` rejects to what is wrong. The text names the file.
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
        results = pool.map(problem, images)
        problems = list(tqdm(results, desc="checking images", total=len(images), disable=disable_progress))
    finally:
        # After Ctrl-C, the remaining images are not waited for.
        pool.shutdown(cancel_futures=True)
    return {index: text for index, text in zip(images, problems, strict=True) if text}


def match_classes(splits: dict[str, DetectionSplit]) -> dict[str, DetectionSplit]:
    """Give all splits of a data set the same classes in the same order, by their names in any letter case.

    Annotation tools number the classes of each split separately, and leave out classes that a split does not have.

    Args:
        splits: The splits by name.

    Returns:
        New splits. Their classes are those of the first split, followed by those that only other splits have.
    """
    by_words: dict[str, str] = {}
    for data in splits.values():
        for name in data.class_names:
            by_words.setdefault(plain_name(name), name)
    class_names = list(by_words.values())
    return {name: data.with_classes(class_names) for name, data in splits.items()}


def divide(data: DetectionSplit, seed: int) -> dict[str, list[int]]:
    """Divide a data set that has no splits, at random by image.

    Args:
        data: The whole data set.
        seed: Seed of the random order.

    Returns:
        The sorted indices of "train" with 70 % of the images, and of "val" and "test" with 15 % each. Images with and
        without objects are divided separately. The parts depend on the ids of the images and the seed alone.

    Raises:
        InputError: There are fewer than three images with objects.
    """
    is_object = [not all(crowds) for crowds in data.crowds]
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for with_objects in (True, False):
        order = shuffled(data, [index for index, has in enumerate(is_object) if has == with_objects], seed)
        if with_objects and len(order) < 3:
            raise InputError(
                f"a data set without splits needs at least 3 images with objects to be divided, got {len(order)}."
            )
        held_out = max(int(with_objects), round(0.15 * len(order)))
        parts["val"] += order[:held_out]
        parts["test"] += order[held_out : 2 * held_out]
        parts["train"] += order[2 * held_out :]
    return {name: sorted(indices) for name, indices in parts.items()}


def shuffled(data: DetectionSplit, indices: Iterable[int], seed: int) -> list[int]:
    """Return indices into a split in a random order, which depends on the ids of the images and the seed alone."""
    order = sorted(indices, key=lambda i: (isinstance(data.image_ids[i], str), data.image_ids[i]))
    random.Random(seed).shuffle(order)
    return order
