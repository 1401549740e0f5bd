# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The sheet of objects and detections: every image once per column, and what its headings say."""

import pytest
import torch
from PIL import Image, ImageDraw

from peft_sdpt.detection import draw_objects, side_by_side
from peft_sdpt.detection.drawing import GAP, HEADER, SIDE
from tests.detection.test_metrics import make_split

NONE = {"boxes": torch.empty(0, 4), "scores": torch.empty(0), "labels": torch.empty(0, dtype=torch.long)}
COLOURS, SIZES = [(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(160, 80), (160, 160), (320, 80)]


def found(score: float) -> dict:
    box = torch.tensor([[20.0, 40.0, 60.0, 30.0]])
    return {"boxes": box, "scores": torch.tensor([score]), "labels": torch.tensor([1])}


@pytest.fixture
def data():
    split = make_split([[(20.0, 40.0, 60.0, 30.0)], [], [(30.0, 10.0, 50.0, 40.0)]], [[1], [], [0]], classes=2)
    split.sizes = SIZES
    split.open_image = lambda index: Image.new("RGB", SIZES[index], COLOURS[index])
    return split


@pytest.fixture
def written(monkeypatch):
    """All texts that are drawn."""
    texts, draw = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, place, text, *a, **k: texts.append(text) or draw(self, place, text, *a, **k),
    )
    return texts


def test_sheet_has_every_picture_once_a_column(data):
    sheet = side_by_side(data, {"before": [NONE] * 3, "after": [found(0.9)] * 3})
    heights = [160, 320, 80]
    assert sheet.size == (3 * (SIDE + GAP) - GAP, 2 * HEADER + sum(heights) + 3 * GAP)
    y = 2 * HEADER
    for index, (colour, height) in enumerate(zip(COLOURS, heights, strict=True)):
        truth, before, after = (
            sheet.crop((column * (SIDE + GAP), y, column * (SIDE + GAP) + SIDE, y + height)) for column in range(3)
        )
        assert before.getcolors() == [(SIDE * height, colour)]
        assert len(after.getcolors(1000)) > 2 and after.getpixel((SIDE - 1, height - 1)) == colour
        assert (len(truth.getcolors(1000)) > 2) == bool(data.boxes[index])
        y += height + GAP


def test_the_sheet_says_its_threshold_and_what_it_draws(data, written):
    side_by_side(data, {"before": [NONE, found(0.4), NONE], "after": [found(0.9)] * 3}, 0.31)
    assert written[-4:] == ["boxes with a score of at least 0.31", "ground truth", "before", "after"]
    # The objects have no score.
    assert written.count("cat 0.90") == 3 and "cat" in written and "dog" in written and "cat 0.40" in written
    side_by_side(data, {"after": [found(0.9)] * 3}, 0.31, "the best")
    assert written[-3:] == ["the best", "ground truth", "after"]


def test_a_column_without_boxes_says_what_the_threshold_hides(data, written):
    """A lower score with the same threshold must not look like a worse detector."""
    side_by_side(data, {"before": [found(0.118), found(0.05), NONE], "after": [NONE] * 3}, 0.31)
    assert written[-2:] == ["before: no box above 0.31, best 0.12", "after: no box"]
    assert "cat 0.12" not in written


def test_crowds_are_named(data, written):
    data.crowds = [[True], [], [False]]
    drawn = draw_objects(data, 0)
    assert drawn.size == SIZES[0] and written == ["cat (crowd)"]
    assert drawn.getpixel((20, 55)) != COLOURS[0]
