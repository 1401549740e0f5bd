# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""COCO average precision of a grounded detector, for any number of classes."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from accelerate import Accelerator
from faster_coco_eval import COCO, COCOeval_faster
from torch import nn

from .data import DetectionSplit
from .prediction import MAX_DETECTIONS, Row, detect_split

# The thresholds of overlap of COCO.
IOUS = np.linspace(0.5, 0.95, 10)


def evaluate(
    model: nn.Module,
    processor: Any,
    data: DetectionSplit,
    batch_size: int,
    accelerator: Accelerator,
    label: str = "evaluating",
    num_workers: int = 0,
) -> dict[str, float]:
    """Measure COCO AP of a detector on a split. All processes of a launch call this together.

    Args:
        model: The detector.
        processor: Its processor.
        data: The split.
        batch_size: Batch size per device.
        accelerator: The accelerator of the launch.
        label: Text of the progress bar.
        num_workers: Number of processes that read images.

    Returns:
        `AP`, `AP50` and `AP75` in each process; see `average_precision`.

    Raises:
        InputError: The scores or boxes are not finite.
    """
    return average_precision(data, detect_split(model, processor, data, batch_size, accelerator, label, num_workers))


def average_precision(
    data: DetectionSplit, detections: list[Row], max_detections: int = MAX_DETECTIONS
) -> dict[str, float]:
    """Compute COCO AP from detections.

    Args:
        data: The split with the true boxes.
        detections: Rows from `rows_of` or `detect_split`.
        max_detections: Number of best detections that count, per image and class. COCO counts 100.

    Returns:
        `AP` (mean over IoU 0.50 to 0.95), `AP50` and `AP75`, from 0 to 1. Each is a mean over the classes that occur.
    """
    return mean_precision(precision_table(data, detections, max_detections))


def precision_table(data: DetectionSplit, detections: list[Row], max_detections: int = MAX_DETECTIONS) -> np.ndarray:
    """Compute the precision of each class, from which COCO's AP is a mean.

    Args:
        data: The split with the true boxes.
        detections: Rows from `rows_of` or `detect_split`.
        max_detections: Number of best detections that count, per image and class.

    Returns:
        Array of shape (10, 101, number of classes): the precision at an IoU of 0.50, 0.55 up to 0.95, and at a recall
        of 0, 0.01 up to 1. It is NaN for a class that does not occur.
    """
    if not len(detections):
        occurs = np.zeros(len(data.class_names), dtype=bool)
        for labels, crowds in zip(data.labels, data.crowds, strict=True):
            occurs[[label for label, crowd in zip(labels, crowds, strict=True) if not crowd]] = True
        return np.broadcast_to(np.where(occurs, 0.0, np.nan), (len(IOUS), 101, len(occurs)))
    precision = np.asarray(_evaluate(data, detections, max_detections, IOUS)["precision"])[..., 0, 0]
    return np.where(precision > -1, precision, np.nan)


def mean_precision(table: np.ndarray) -> dict[str, float]:
    """Compute `AP`, `AP50` and `AP75` from the result of `precision_table`, or from a part of its classes.

    Args:
        table: Array of shape (10, 101, n).

    Returns:
        The means over the classes that occur. They are NaN if no class occurs.
    """
    table = table[..., ~np.isnan(table[0, 0])]
    parts = {"AP": table, "AP50": table[0], "AP75": table[5]}
    return {name: round(float(part.mean()), 4) if part.size else float("nan") for name, part in parts.items()}


def match_detections(
    data: DetectionSplit, detections: list[Row], max_detections: int = MAX_DETECTIONS
) -> tuple[np.ndarray, np.ndarray]:
    """Match detections with the objects of their class at an IoU of at least 0.5, as COCO does.

    Detections with higher scores are matched first. So the matches of the detections above a threshold do not depend on
    those below it.

    Args:
        data: The split with the true boxes.
        detections: n rows from `rows_of` or `detect_split`.
        max_detections: Number of best detections that are matched, per image and class.

    Returns:
        Two arrays of shape (n,). The first has for each detection the id of its object in `DetectionSplit.as_coco`, or
        0. The second tells whether the detection lies in a crowd, where it counts neither as true nor as false.
    """
    objects, in_crowd = np.zeros(len(detections), dtype=int), np.zeros(len(detections), dtype=bool)
    if len(detections):
        is_crowd = [crowd for crowds in data.crowds for crowd in crowds]
        for pair in _evaluate(data, detections, max_detections, IOUS[:1])["matched"]:
            # Ids of detections and of objects start at 1, in the order of the lists.
            detection, matched = map(int, pair.split("_"))
            if is_crowd[matched - 1]:
                in_crowd[detection - 1] = True
            else:
                objects[detection - 1] = matched
    return objects, in_crowd


def _evaluate(data: DetectionSplit, detections: list[Row], max_detections: int, ious: np.ndarray) -> dict[str, Any]:
    """Return what faster-coco-eval computes: `precision` (IoU, recall, class, size, limit), -1 for a class that does
    not occur, and `matched`, with a key "detection_object" for each pair."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(data.as_coco())
        evaluator = COCOeval_faster(truth, truth.loadRes(np.array(detections)), iouType="bbox")
        # Only objects of all sizes, and one limit: COCO's full table has twelve such entries, too many for LVIS.
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [max_detections]
        evaluator.params.iouThrs = ious
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval
