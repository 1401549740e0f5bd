# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""AP of each class, the threshold with the best F1, and the errors equal numbers that were computed by hand."""

import numpy as np
import pytest

from peft_sdpt.detection import (
    analyse_precision,
    average_precision,
    choose_images,
    describe_images,
    find_errors,
    measure_threshold,
    suggest_thresholds,
)
from peft_sdpt.detection.metrics import match_detections
from tests.detection.test_metrics import BOX, FAR, OTHER, make_split

NEAR = (12, 11, 20, 20)  # IoU 0.75 with BOX


def test_144_objects_are_counted_if_asked_for():
    boxes = [(10.0 * i, 10.0 * j, 8.0, 8.0) for i in range(12) for j in range(12)]
    data = make_split([boxes], size=(120, 120))
    rows = [(0, *box, 1 - 0.001 * i, 0) for i, box in enumerate(boxes)]
    assert average_precision(data, rows)["AP"] == pytest.approx(0.6931)
    assert average_precision(data, rows, max_detections=200) == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}
    assert suggest_thresholds(data, rows)[0]["recall"] == pytest.approx(100 / 144, abs=1e-4)
    assert suggest_thresholds(data, rows, 200)[0]["f1"] == 1.0
    assert find_errors(data, rows, 0.5, 200) == []


def test_precision_of_each_class():
    data = make_split([[BOX, OTHER], [FAR]], [[0, 0], [1]], classes=3)
    rows = [(0, *BOX, 0.9, 0), (0, *FAR, 0.8, 0), (0, *OTHER, 0.7, 0)]
    result = analyse_precision(data, rows)
    first, second, third = result["classes"]
    assert first["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-4)
    assert second == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0} and third is None
    assert result["metrics"] == average_precision(data, rows)
    assert result["metrics"]["AP"] == pytest.approx((first["AP"] + second["AP"]) / 2, abs=1e-4)
    # In one of two classes, the precision is 1 up to a recall of one half, and 2 / 3 above.
    assert result["precision"] == [0.5] * 51 + [0.3333] * 50
    assert np.mean(result["precision"]) == pytest.approx(result["metrics"]["AP50"], abs=1e-4)


def test_nothing_found():
    data = make_split([[BOX], []], classes=2)
    result = analyse_precision(data, [])
    assert result["classes"] == [{"AP": 0.0, "AP50": 0.0, "AP75": 0.0}, None] and set(result["precision"]) == {0.0}
    assert suggest_thresholds(data, []) == (None, [None, None])
    assert measure_threshold(data, [], 0.3) == {"threshold": 0.3, "f1": 0.0, "precision": 0.0, "recall": 0.0}
    wrong = [(0, *FAR, 0.9, 0)]
    assert suggest_thresholds(data, wrong) == (None, [None, None])


def test_the_threshold_lies_between_true_and_false():
    data = make_split([[BOX, OTHER], [FAR]], [[0, 0], [1]], classes=3)
    rows = [(0, *BOX, 0.9, 0), (0, *OTHER, 0.6, 0), (0, *FAR, 0.2, 0), (1, *FAR, 0.1, 1), (1, *BOX, 0.04, 2)]
    best, (first, second, third) = suggest_thresholds(data, rows)
    # Three objects: two of three with two boxes, or three of three with four boxes, give 4 / 5 and 6 / 7.
    assert best == {"threshold": 0.07, "f1": 0.8571, "precision": 0.75, "recall": 1.0}
    assert first == {"threshold": 0.4, "f1": 1.0, "precision": 1.0, "recall": 1.0}
    assert second == {"threshold": 0.05, "f1": 1.0, "precision": 1.0, "recall": 1.0}
    assert third is None
    assert measure_threshold(data, rows, 0.4) == {
        **{"threshold": 0.4, "f1": 0.8, "precision": 1.0, "recall": 0.6667},
    }


def test_boxes_with_the_same_score_are_above_or_below_together():
    data = make_split([[BOX, OTHER]])
    rows = [(0, *FAR, 0.5, 0), (0, *BOX, 0.5, 0), (0, *OTHER, 0.5, 0)]
    for order in (rows, rows[::-1]):
        best, _ = suggest_thresholds(data, order)
        assert best == {"threshold": 0.25, "f1": 0.8, "precision": 0.6667, "recall": 1.0}


@pytest.mark.parametrize("scores", [(1.0, 0.9999), (0.00031234, 0.00031), (0.5, 0.49999)])
def test_a_rounded_threshold_says_what_it_gives(scores):
    data = make_split([[BOX]])
    rows = [(0, *BOX, scores[0], 0), (0, *FAR, scores[1], 0)]
    best, _ = suggest_thresholds(data, rows)
    assert 0 < best["threshold"] < 1 and best["threshold"] == float(f"{best['threshold']:.3g}")
    assert best == measure_threshold(data, rows, best["threshold"]) and best["recall"] == 1.0


def random_case(seed):
    rng = np.random.default_rng(seed)
    boxes, labels, crowds, rows = [], [], [], []
    for image in range(6):
        count = int(rng.integers(0, 5))
        boxes.append([tuple(map(float, (*rng.uniform(0, 60, 2), *rng.uniform(10, 40, 2)))) for _ in range(count)])
        labels.append(rng.integers(0, 2, count).tolist())
        crowds.append((rng.random(count) < 0.15).tolist())
        for box, label in zip(boxes[-1], labels[-1], strict=True):
            for _ in range(int(rng.integers(0, 4))):
                moved = np.array(box) + rng.normal(0, 4, 4)
                row = (image, *moved[:2].tolist(), *moved[2:].clip(1).tolist())
                rows.append((*row, float(rng.random()), int(label if rng.random() < 0.8 else 1 - label)))
    return make_split(boxes, labels, crowds, classes=2), rows


def iou(a, b):
    width, height = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inside = max(0, width) * max(0, height)
    return inside / (a[2] * a[3] + b[2] * b[3] - inside)


@pytest.mark.parametrize("seed", range(8))
def test_matching_and_threshold_agree_with_those_by_hand(seed):
    data, rows = random_case(seed)
    annotations = data.as_coco()["annotations"]
    objects, in_crowd = match_detections(data, rows)
    taken, expected = set(), np.zeros(len(rows), dtype=int)
    for index in sorted(range(len(rows)), key=lambda index: -rows[index][5]):
        image, *box, _, label = rows[index]
        free = [
            (iou(box, each["bbox"]), each["id"])
            for each in annotations
            if (each["image_id"], each["category_id"], each["iscrowd"]) == (image, label, 0) and each["id"] not in taken
        ]
        overlap, found = max(free, default=(0, 0))
        if overlap >= 0.5:
            taken.add(found)
            expected[index] = found
    assert (objects == expected).all() and not (in_crowd & (objects > 0)).any()

    best, _ = suggest_thresholds(data, rows)
    every = [measure_threshold(data, rows, row[5])["f1"] for row in rows]
    assert best["f1"] == pytest.approx(max(every), abs=1e-4) and 0.2 < best["f1"] < 1


def error(kind, true, predicted, count=1):
    return {"error": kind, "true": true, "predicted": predicted, "count": count}


def test_every_kind_of_error():
    data = make_split([[BOX, OTHER], [FAR, BOX], [OTHER]], [[0, 1], [1, 0], [1]], classes=3)
    rows = [
        *((0, *BOX, 0.9, 0), (0, *NEAR, 0.8, 0)),  # found, and found again
        *((0, *BOX, 0.7, 2), (0, *OTHER, 0.6, 2)),  # on a found object, and in place of the right name
        (1, *OTHER, 0.6, 1),  # on nothing
        *((1, *FAR, 0.2, 1), (1, *BOX, 0.2, 0)),  # right, but below the threshold
        (2, *OTHER, 0.6, 2),
    ]
    assert find_errors(data, rows, 0.3) == [
        error("confused", "cat", "horse", 2),
        error("background", None, "cat"),
        error("confused", "dog", "horse"),
        error("missed", "dog", None),
        error("missed", "cat", None),
        error("repeated", "dog", "dog"),
    ]
    # Below that threshold, all objects are found or have another name.
    assert not [each for each in find_errors(data, rows, 0.1) if each["error"] == "missed"]
    assert {each["error"] for each in find_errors(data, [], 0.3)} == {"missed"}
    assert find_errors(data, rows, 0.3) == find_errors(data, rows[::-1], 0.3)


def test_boxes_in_crowds_are_no_errors():
    data = make_split([[BOX, OTHER]], crowds=[[False, True]])
    rows = [(0, *BOX, 0.9, 0), (0, 62, 12, 8, 8, 0.9, 0)]
    assert find_errors(data, rows, 0.5) == []
    assert suggest_thresholds(data, rows)[0]["precision"] == 1.0
    assert find_errors(data, [], 0.5) == [error("missed", "dog", None)]


def test_images_of_different_classes_are_shown():
    labels = [[0], [0, 0], [], [1], [0, 1], [2], [2]]
    data = make_split([[BOX] * len(each) for each in labels], labels, classes=3)
    assert choose_images(data, 2) == [0, 3]
    assert choose_images(data, 3) == [0, 3, 5]
    # The choice then starts over with the remaining images. Images without objects come last.
    assert choose_images(data, 4) == [0, 1, 3, 5] and choose_images(data, 6) == [0, 1, 3, 4, 5, 6]
    assert choose_images(data, 7) == choose_images(data, 100) == list(range(7))
    assert choose_images(make_split([[], []]), 1) == [0]


def test_images_and_objects_are_counted():
    data = make_split([[BOX, OTHER, FAR], [], [BOX]], crowds=[[False, False, True], [], [True]])
    assert describe_images(data) == {"images": 3, "images_without_objects": 2, "objects": 2, "most_objects": 2}
