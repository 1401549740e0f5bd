# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Analysis of detections: AP of each class, the threshold with the best F1, and the errors above it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypedDict

import numpy as np
from faster_coco_eval.core import mask

from .data import DetectionSplit
from .metrics import match_detections, mean_precision, precision_table
from .prediction import MAX_DETECTIONS, Row

# Number of significant digits of a suggested threshold.
DIGITS = 3


class ThresholdChoice(TypedDict):
    """A score threshold, and its results at an IoU of 0.5.

    Attributes:
        threshold: Lowest score of a detection.
        f1: Harmonic mean of precision and recall.
        precision: Share of the detections that are true.
        recall: Share of the objects that are found.
    """

    threshold: float
    f1: float
    precision: float
    recall: float


class DetectionError(TypedDict):
    """How often a detector makes an error.

    Attributes:
        error: `confused` (a box on an object of another class), `missed` (an object without a box), `background` (a box
            on no object) or `repeated` (one more box on an object that is found).
        true: Name of the class of the object. None for `background`.
        predicted: Name of the class of the box. None for `missed`.
        count: Number of boxes, or of missed objects.
    """

    error: str
    true: str | None
    predicted: str | None
    count: int


def analyse_precision(
    data: DetectionSplit, detections: list[Row], max_detections: int = MAX_DETECTIONS
) -> dict[str, Any]:
    """Compute COCO AP of all classes and of each class, and precision against recall.

    Args:
        data: The split with the true boxes.
        detections: Rows from `rows_of` or `detect_split`.
        max_detections: Number of best detections that count, per image and class.

    Returns:
        `metrics` is the result of `average_precision`. `classes` has the same metrics for each class, or None for a
        class that does not occur. `precision` has the precision at an IoU of 0.5 and at a recall of 0, 0.01 up to 1, as
        a mean over the classes. The mean of these 101 values is AP50.
    """
    table = precision_table(data, detections, max_detections)
    occurs = ~np.isnan(table[0, 0])
    return {
        "metrics": mean_precision(table),
        "classes": [mean_precision(table[..., [k]]) if occurs[k] else None for k in range(len(occurs))],
        "precision": [round(value, 4) for value in table[0][:, occurs].mean(axis=1).tolist()],
    }


def suggest_thresholds(
    data: DetectionSplit, detections: list[Row], max_detections: int = MAX_DETECTIONS
) -> tuple[ThresholdChoice | None, list[ThresholdChoice | None]]:
    """Choose the score thresholds with the highest F1 at an IoU of 0.5.

    Detections are matched with objects as for COCO AP. Detections in crowds do not count.

    Args:
        data: The split with the true boxes.
        detections: Rows from `rows_of` or `detect_split`.
        max_detections: Number of best detections that count, per image and class.

    Returns:
        The best threshold for all classes together, and the best one for each class. A threshold is None if no
        detection is true.
    """
    scores, labels, is_true = _counted(data, detections, max_detections)
    num_objects = count_objects(data)
    of_classes = [
        _best_threshold(scores[labels == label], is_true[labels == label], number)
        for label, number in enumerate(num_objects)
    ]
    return _best_threshold(scores, is_true, sum(num_objects)), of_classes


def measure_threshold(
    data: DetectionSplit, detections: list[Row], threshold: float, max_detections: int = MAX_DETECTIONS
) -> ThresholdChoice:
    """Measure F1, precision and recall at a score threshold. The arguments are those of `find_errors`."""
    scores, _, is_true = _counted(data, detections, max_detections)
    return _at_threshold(scores, is_true, sum(count_objects(data)), threshold)


def _counted(
    data: DetectionSplit, detections: list[Row], max_detections: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scores and labels of the detections outside crowds, and whether they are true."""
    objects, in_crowd = match_detections(data, detections, max_detections)
    counted = np.array(detections, dtype=float).reshape(-1, 7)[~in_crowd]
    return counted[:, 5], counted[:, 6], objects[~in_crowd] > 0


def _best_threshold(scores: np.ndarray, is_true: np.ndarray, num_objects: int) -> ThresholdChoice | None:
    """Choose the threshold with the highest F1. The arguments are the scores of n detections, whether they are true,
    and the number of objects."""
    if not is_true.any():
        return None
    order = (-scores).argsort(kind="stable")
    scores, num_true = scores[order], is_true[order].cumsum()
    # A threshold cannot divide detections with the same score, so only the last of each score counts.
    last = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))
    f1 = 2 * num_true[last] / (last + 1 + num_objects)
    best = f1.argmax()
    below = scores[last[best] + 1] if last[best] + 1 < len(scores) else 0.0
    # The threshold is halfway between the lowest score above it and the highest score below it, so that it also suits
    # scores that are a little different.
    threshold = min(float(f"{(scores[last[best]] + below) / 2:.{DIGITS}g}"), 1 - 10**-DIGITS)
    # Counted again, because the rounded threshold may be on the other side of a score.
    return _at_threshold(scores, is_true[order], num_objects, threshold)


def _at_threshold(scores: np.ndarray, is_true: np.ndarray, num_objects: int, threshold: float) -> ThresholdChoice:
    is_shown = scores >= threshold
    shown, found = int(is_shown.sum()), int(is_true[is_shown].sum())
    return {
        "threshold": threshold,
        "f1": round(2 * found / max(shown + num_objects, 1), 4),
        "precision": round(found / max(shown, 1), 4),
        "recall": round(found / max(num_objects, 1), 4),
    }


def find_errors(
    data: DetectionSplit, detections: list[Row], threshold: float, max_detections: int = MAX_DETECTIONS
) -> list[DetectionError]:
    """Count the errors of a detector at a score threshold and an IoU of 0.5.

    Detections are matched with the objects of their class first, as for COCO AP. Each other detection is an error. It
    belongs to the object that it overlaps most, of any class. An object is missed if it has neither a match nor a box
    of another class. Detections in crowds are not errors.

    Args:
        data: The split with the true boxes.
        detections: Rows from `rows_of` or `detect_split`.
        threshold: Lowest score of a detection.
        max_detections: Number of best detections that count, per image and class.

    Returns:
        The errors, those with the highest count first.
    """
    objects, in_crowd = match_detections(data, detections, max_detections)
    is_shown = np.array([row[5] >= threshold for row in detections], dtype=bool)
    found = set(objects[is_shown].tolist())
    wrong: list[list[Row]] = [[] for _ in range(len(data))]
    for index in np.flatnonzero(is_shown & (objects == 0) & ~in_crowd):
        wrong[detections[index][0]].append(detections[index])
    counts: Counter[tuple[str, int | None, int | None]] = Counter()
    object_id = 0
    for image, rows in enumerate(wrong):
        first, object_id = object_id + 1, object_id + len(data.boxes[image])
        true = [i for i, crowd in enumerate(data.crowds[image]) if not crowd]
        boxes = np.array([data.boxes[image][i] for i in true], dtype=float).reshape(-1, 4)
        mistaken = set()
        for row in rows:
            overlaps = _overlaps(row[1:5], boxes)
            if not len(overlaps) or overlaps.max() < 0.5:
                counts["background", None, row[6]] += 1
                continue
            hit = true[overlaps.argmax()]
            label = data.labels[image][hit]
            counts["repeated" if label == row[6] else "confused", label, row[6]] += 1
            if label != row[6]:
                mistaken.add(hit)
        for i in true:
            if first + i not in found and i not in mistaken:
                counts["missed", data.labels[image][i], None] += 1
    names = data.class_names
    # The order does not depend on the order of the detections.
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0][0], item[0][1] or 0, item[0][2] or 0))
    return [
        {
            "error": error,
            "true": None if true is None else names[true],
            "predicted": None if predicted is None else names[predicted],
            "count": count,
        }
        for (error, true, predicted), count in ordered
    ]


def _overlaps(box: Iterable[float], boxes: np.ndarray) -> np.ndarray:
    """Return the IoU of a box with n boxes, shape (n,)."""
    if not len(boxes):
        return np.zeros(0)
    return mask.iou(np.array([box], dtype=float), boxes, [0] * len(boxes))[0]


def count_objects(data: DetectionSplit) -> list[int]:
    """Count the objects of each class. Crowds do not count."""
    counts = Counter(
        label
        for labels, crowds in zip(data.labels, data.crowds, strict=True)
        for label, crowd in zip(labels, crowds, strict=True)
        if not crowd
    )
    return [counts[label] for label in range(len(data.class_names))]


def describe_images(data: DetectionSplit) -> dict[str, int]:
    """Count images and objects of a split.

    Args:
        data: The split.

    Returns:
        `images`, `images_without_objects`, `objects`, and `most_objects`, the largest number of objects in one image.
        Crowds do not count.
    """
    numbers = [len(crowds) - sum(crowds) for crowds in data.crowds]
    return {
        "images": len(numbers),
        "images_without_objects": numbers.count(0),
        "objects": sum(numbers),
        "most_objects": max(numbers, default=0),
    }


def choose_images(data: DetectionSplit, number: int) -> list[int]:
    """Choose images that show different classes.

    The function goes through the images in their order and takes those with a class that is on none of the images taken
    so far. If all classes are shown before enough images are taken, it starts over with the remaining images.

    Args:
        data: The split.
        number: Number of images. If the split has fewer, all are taken.

    Returns:
        Sorted indices.
    """
    remaining, taken = list(range(len(data))), list[int]()
    while remaining and len(taken) < number:
        shown: set[int] = set()
        chosen: list[int] = []
        for image in remaining:
            if len(taken) + len(chosen) < number and not shown.issuperset(data.labels[image]):
                chosen.append(image)
                shown.update(data.labels[image])
        # Only images without objects remain.
        chosen = chosen or remaining[: number - len(taken)]
        taken += chosen
        remaining = [image for image in remaining if image not in set(chosen)]
    return sorted(taken)
