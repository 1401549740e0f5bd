# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detecting in changed images of a split: attacked, with random signs, corrupted, and purified.

Everything depends on the seed and the index of an image alone, so a part of a split gives the same results as the whole
split. The gradients and the detections are computed in float32, without autocast, on the device of the detector.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..wording import quoted
from .attacks import Attack, perturb
from .corruptions import check_corruption, corrupt
from .data import DetectionSplit, centre_boxes
from .devices import to_device
from .grounding import class_prompt, phrase_lengths, split_classes
from .loss import GroundedDetectionLoss
from .metrics import precision_table
from .pixels import PixelRange, process_images
from .prediction import MAX_DETECTIONS, Row, batches_of_one_size, detect_in_pixels, evaluation_mode, rows_of
from .samples import Purpose, fitting_classes, generator_of

# Maps images (B, 3, H, W) in [0, 1] to others.
Purify = Callable[[Tensor], Tensor]
# Maps indices of images of a split, and the output of the image processor for them on the device of the detector, to
# changed pixel values (B, 3, H, W).
Change = Callable[[list[int], Mapping[str, Tensor]], Tensor]
# Number of images whose AP is measured together.
TOGETHER = 32


def attack_split(
    detector: nn.Module,
    processor: Any,
    data: DetectionSplit,
    attack: Attack,
    batch_size: int,
    *,
    attacked: nn.Module | Callable[[], AbstractContextManager] | None = None,
    purify: Purify | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    label: str = "attacking",
) -> list[Row]:
    """Attack the images of a split, and detect in them.

    Args:
        detector: The detector, of any kind of tuning. Its mode, training or evaluation, stays as it is.
        processor: Its processor.
        data: The split. The attack uses its boxes.
        attack: The attack.
        batch_size: Largest number of images in a batch. All images of a batch have the same size.
        attacked: What gives the gradients: another detector with the same processor, or a function that returns a
            context, such as `model.disable_adapter`, in which `detector` gives them. None for `detector` as it is.
        purify: A purifier of the images that `detector` gets. The attack goes through it.
        seed: Seed of the random starts, 0 <= seed < 2**32.
        indices: Indices of the images. None for all. The result for an image does not depend on the others.
        label: Text of the progress bar.

    Returns:
        The rows of all images. With `indices`, they are rows of `data.subset(indices)`.

    Raises:
        InputError: The scores or boxes are not finite, a class name does not fit into a prompt, or the attack does not
            suit the detector.
    """
    change = Adversary(detector, processor, data, attack, attacked=attacked, purify=purify, seed=seed)
    return detect_changed(detector, processor, data, change, batch_size, [purify], indices=indices, label=label)[0]


def detect_changed(
    detector: nn.Module,
    processor: Any,
    data: DetectionSplit,
    change: Change | None,
    batch_size: int,
    purifiers: Sequence[Purify | None] = (None,),
    *,
    indices: Sequence[int] | None = None,
    label: str = "detecting",
    max_detections: int = MAX_DETECTIONS,
) -> list[list[Row]]:
    """Change the images of a split once, and detect in them after each of several purifiers.

    Args:
        detector, processor, data, batch_size, indices, label: As in `attack_split`.
        change: What changes the pixels, for instance an `Adversary`. None for nothing.
        purifiers: The purifiers. None for none.
        max_detections: Maximum number of detections per image.

    Returns:
        For each purifier, the rows of all images, as in `attack_split`.

    Raises:
        InputError: As in `attack_split`.
    """
    config: Any = detector.config
    device = next(detector.parameters()).device
    chunks = split_classes(data.class_names, processor.tokenizer, config.max_text_len)
    pixel_range = PixelRange.of(processor.image_processor).to(device)
    indices = range(len(data)) if indices is None else indices
    place = {image: number for number, image in enumerate(indices)}
    rows: list[list[Row]] = [[] for _ in purifiers]
    autocast = torch.autocast(device.type, enabled=False)
    with evaluation_mode(detector), autocast, tqdm(total=len(indices), desc=label, unit="image", leave=False) as bar:
        for images in batches_of_one_size(data, indices, batch_size):
            pixels = process_images(processor.image_processor, [data.open_image(image) for image in images])
            pixels = to_device(dict(pixels), device)
            values = pixels["pixel_values"] if change is None else change(images, pixels)
            for purify, found in zip(purifiers, rows, strict=True):
                purified = values
                if purify is not None:
                    purified = pixel_range.to_pixel_values(purify(pixel_range.to_images(values)))
                results = detect_in_pixels(
                    detector,
                    processor.tokenizer,
                    {**pixels, "pixel_values": purified},
                    [data.sizes[image] for image in images],
                    [f"{label}: image {quoted(data.image_ids[image])}" for image in images],
                    data.class_names,
                    chunks,
                    0.0,
                    max_detections,
                )
                for image, result in zip(images, results, strict=True):
                    found += rows_of(place[image], result)
            bar.update(len(images))
    return rows


class Adversary:
    """Attacks images of a split. It is a `Change` for `detect_changed`.

    The prompt of an image has all classes if they fit into one prompt. If they do not fit, it has the classes in the
    image and as many others, in their order, as fit. So the cost of the attack does not depend on the number of
    classes.

    Args:
        detector, processor, data, attack, attacked, purify, seed: As in `attack_split`.
    """

    def __init__(
        self,
        detector: nn.Module,
        processor: Any,
        data: DetectionSplit,
        attack: Attack,
        *,
        attacked: nn.Module | Callable[[], AbstractContextManager] | None = None,
        purify: Purify | None = None,
        seed: int = 0,
    ):
        self.processor, self.data, self.attack, self.purify, self.seed = processor, data, attack, purify, seed
        self.target = attacked if isinstance(attacked, nn.Module) else detector
        self.context = nullcontext if attacked is None or isinstance(attacked, nn.Module) else attacked
        config: Any = self.target.config
        self.loss = GroundedDetectionLoss(config)
        # [CLS] and [SEP] also take a token each.
        self.room = config.max_text_len - 2
        self.lengths = phrase_lengths(data.class_names, processor.tokenizer)

    def __call__(self, images: list[int], pixels: Mapping[str, Tensor]) -> Tensor:
        prompts, labels = zip(*map(self._prompt_and_labels, images), strict=True)
        text = self.processor.tokenizer(list(prompts), padding=True, return_tensors="pt")
        device = pixels["pixel_values"].device
        with self.context():
            return perturb(
                self.target,
                self.loss,
                {**pixels, **to_device(dict(text), device)},
                to_device(list(labels), device),
                self.attack,
                [generator_of(self.seed, image, Purpose.ATTACK) for image in images],
                image_processor=self.processor.image_processor,
                purify=self.purify,
            )

    def _prompt_and_labels(self, image: int) -> tuple[str, dict[str, Tensor]]:
        """Return the prompt of an image, and its objects with the numbers of their classes in this prompt."""
        data = self.data
        columns = zip(data.boxes[image], data.labels[image], data.crowds[image], strict=True)
        objects = [(box, label) for box, label, is_crowd in columns if not is_crowd]
        order = range(len(self.lengths))
        chosen = fitting_classes([label for _, label in objects], order, self.lengths, self.room)
        place = {label: number for number, label in enumerate(chosen)}
        objects = [(box, label) for box, label in objects if label in place]
        return class_prompt([data.class_names[label] for label in place]), {
            "class_labels": torch.tensor([place[label] for _, label in objects], dtype=torch.long),
            "boxes": centre_boxes([box for box, _ in objects], data.sizes[image]),
        }


class RandomSigns:
    """Changes each value of a pixel by `eps` up or down, at random. An attack must do better.

    It is a `Change` for `detect_changed`.

    Args:
        processor: The processor of the detector.
        eps: Change of an image with values in [0, 1], which stays in this range.
        seed: Seed, 0 <= seed < 2**32.
    """

    def __init__(self, processor: Any, eps: float, seed: int = 0):
        self.range, self.eps, self.seed = PixelRange.of(processor.image_processor), eps, seed

    def __call__(self, images: list[int], pixels: Mapping[str, Tensor]) -> Tensor:
        values = pixels["pixel_values"]
        generators = [generator_of(self.seed, image, Purpose.ATTACK) for image in images]
        coins = torch.stack([torch.randint(2, values.shape[1:], generator=generator) for generator in generators])
        pixel_range = self.range.to(values.device)
        changed = pixel_range.to_images(values) + self.eps * (2 * coins - 1).to(values)
        return pixel_range.to_pixel_values(changed.clamp(0, 1))


def corrupt_split(data: DetectionSplit, name: str, severity: int, seed: int = 0) -> DetectionSplit:
    """Corrupt the images of a split when they are opened.

    Args:
        data: The split.
        name, severity: As in `corrupt`.
        seed: Seed. An image is always corrupted in the same way.

    Returns:
        A split with the same boxes.

    Raises:
        InputError: The corruption or the severity is unknown.
    """
    check_corruption(name, severity)
    return dataclasses.replace(
        data, open_image=functools.partial(_open_corrupted, data.open_image, name, severity, seed)
    )


def _open_corrupted(
    open_image: Callable[[int], Image.Image], name: str, severity: int, seed: int, index: int
) -> Image.Image:
    return corrupt(open_image(index), name, severity, (seed, index))


def image_precisions(data: DetectionSplit, rows: Sequence[Row]) -> np.ndarray:
    """Compute the AP of each image alone: the mean over the classes of its objects.

    Args:
        data: The split with the true boxes.
        rows: Rows of its images.

    Returns:
        Shape (number of images,). NaN for an image without objects. Detections of other classes do not count.
    """
    of_images: list[list[Row]] = [[] for _ in range(len(data))]
    for row in rows:
        of_images[row[0]].append(row)
    precisions = np.full(len(data), np.nan)
    for start in range(0, len(data), TOGETHER):
        images = range(start, min(start + TOGETHER, len(data)))
        # Each pair of an image and a class becomes a class of its own, so that they are measured together.
        pairs: dict[tuple[int, int], int] = {}
        boxes, labels, crowds, renamed = [], [], [], []
        for number, image in enumerate(images):
            columns = [*zip(data.boxes[image], data.labels[image], data.crowds[image], strict=True)]
            for _, label, is_crowd in columns:
                if not is_crowd:
                    pairs.setdefault((image, label), len(pairs))
            columns = [column for column in columns if (image, column[1]) in pairs]
            boxes.append([box for box, _, _ in columns])
            labels.append([pairs[image, label] for _, label, _ in columns])
            crowds.append([is_crowd for _, _, is_crowd in columns])
            renamed += [
                (number, *row[1:6], pairs[image, row[6]]) for row in of_images[image] if (image, row[6]) in pairs
            ]
        part = dataclasses.replace(
            data.subset(images), class_names=[str(pair) for pair in pairs], boxes=boxes, labels=labels, crowds=crowds
        )
        of_pairs = precision_table(part, renamed).mean(axis=(0, 1)) if pairs else np.zeros(0)
        for image in images:
            mine = [of_pairs[number] for (owner, _), number in pairs.items() if owner == image]
            if mine:
                precisions[image] = np.mean(mine)
    return precisions


def lowest_rows(data: DetectionSplit, attacks: Sequence[Sequence[Row]]) -> list[Row]:
    """Take for each image the attack after which its own AP is lowest.

    Args:
        data: The split with the true boxes.
        attacks: Rows of all images after each attack. Of equal attacks, the first counts.

    Returns:
        Rows of all images.
    """
    precisions = np.stack([image_precisions(data, rows) for rows in attacks])
    # An image without objects has no AP, and keeps the first attack.
    lowest = np.nan_to_num(precisions, nan=np.inf).argmin(axis=0)
    return [row for number, rows in enumerate(attacks) for row in rows if lowest[row[0]] == number]
