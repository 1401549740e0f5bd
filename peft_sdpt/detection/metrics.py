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
        InputError: The scores are not finite.
    """
    return average_precision(data, detect_split(model, processor, data, batch_size, accelerator, label, num_workers))


def average_precision(data: DetectionSplit, detections: list[Row]) -> dict[str, float]:
    """Compute COCO AP from detections.

    Args:
        data: The split with the true boxes.
        detections: Rows from `rows_of` or `detect_split`.

    Returns:
        `AP` (mean over IoU 0.50 to 0.95), `AP50` and `AP75`, from 0 to 1. Each is a mean over the classes that occur.
    """
    if not len(detections):
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(data.as_coco())
        evaluator = COCOeval_faster(truth, truth.loadRes(np.array(detections)), iouType="bbox")
        # Only objects of all sizes, and one limit: COCO's full table has twelve such entries, too many for LVIS.
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [MAX_DETECTIONS]
        evaluator.evaluate()
        evaluator.accumulate()
    # The axes are IoU threshold, recall, class, size and limit. The value is -1 if a class does not occur.
    precision = np.asarray(evaluator.eval["precision"])[..., 0, 0]
    thresholds = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
    occurring = {name: precision[chosen][precision[chosen] > -1] for name, chosen in thresholds.items()}
    return {name: round(float(values.mean()), 4) for name, values in occurring.items()}
