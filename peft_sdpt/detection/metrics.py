# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""COCO average precision of a grounded detector, over any number of classes."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from accelerate import Accelerator
from faster_coco_eval import COCO, COCOeval_faster

from .data import DetectionSplit
from .prediction import MAX_DETECTIONS, detect_split


def evaluate(
    model, processor, data: DetectionSplit, batch_size: int, accelerator: Accelerator, label: str = "evaluating"
) -> dict[str, float]:
    """COCO AP, AP50 and AP75 of a detector on a split, in every process of a launch."""
    return average_precision(data, detect_split(model, processor, data, batch_size, accelerator, label))


def average_precision(data: DetectionSplit, detections: list[tuple]) -> dict[str, float]:
    """COCO AP from detections.

    Args:
        data: the ground truth.
        detections: rows as `rows_of` makes them.

    Returns:
        `AP` (IoU 0.50 to 0.95), `AP50` and `AP75`, each the mean over the classes that occur, from 0 to 1.
    """
    if not len(detections):
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(data.as_coco())
        evaluator = COCOeval_faster(truth, truth.loadRes(np.array(detections)), iouType="bbox")
        # Objects of all sizes at the one limit: a twelfth of the memory of COCO's whole table, which LVIS needs.
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [MAX_DETECTIONS]
        evaluator.evaluate()
        evaluator.accumulate()
    # IoU threshold, recall, class, size, limit; -1 where a class does not occur.
    precision = np.asarray(evaluator.eval["precision"])[..., 0, 0]
    thresholds = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
    occurring = {name: precision[chosen][precision[chosen] > -1] for name, chosen in thresholds.items()}
    return {name: round(float(values.mean()), 4) for name, values in occurring.items()}
