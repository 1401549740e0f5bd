# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The sheet shows objects and detections. Many boxes can be drawn on an image."""

import pytest
import torch
from PIL import Image, ImageDraw

from peft_sdpt.detection import draw_objects, side_by_side
from peft_sdpt.detection.drawing import GAP, HEADER, SIDE, draw_detections
from tests.detection.test_charts import STRANGE_NAMES
from tests.detection.test_metrics import BOX, make_split

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


# ---- many boxes

WHITE = (255, 255, 255)


def grid(size: tuple[int, int], columns: int, rows: int) -> dict:
    """Boxes of one class in a grid, which leaves a gap of a fifth."""
    width, height = size[0] / columns, size[1] / rows
    boxes = [[x * width, y * height, 0.8 * width, 0.8 * height] for y in range(rows) for x in range(columns)]
    number = len(boxes)
    return {
        "boxes": torch.tensor(boxes),
        "scores": torch.linspace(0.9, 0.4, number),
        "labels": torch.zeros(number, dtype=torch.long),
    }


def areas(monkeypatch, *args) -> list[tuple[float, float, float, float]]:
    """Draw, and return the areas behind the texts."""
    drawn = []
    real = ImageDraw.ImageDraw.text

    def text(self, place, words, **kwargs):
        drawn.append(self.textbbox(place, words, kwargs["font"]))
        real(self, place, words, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    draw_detections(*args)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", real)
    return drawn


def test_texts_do_not_cover_each_other(monkeypatch):
    size = (1280, 960)
    found = grid(size, 15, 10)
    texts = areas(monkeypatch, Image.new("RGB", size, "white"), found, ["white blood cell"], 0.3)
    assert 50 <= len(texts) < 150
    for index, (left, top, right, bottom) in enumerate(texts):
        for x0, y0, x1, y1 in texts[:index]:
            assert not (x0 < right and left < x1 and y0 < bottom and top < y1)


def test_few_boxes_keep_large_letters(monkeypatch):
    size = (1280, 960)
    image = Image.new("RGB", size, "white")
    (few, *_), (many, *_) = (
        areas(monkeypatch, image, grid(size, *cells), ["cell"], 0.3) for cells in ((2, 2), (30, 20))
    )
    assert few[3] - few[1] > 1.8 * (many[3] - many[1])
    # The best box has its text, even if other boxes overlap it.
    same = {key: value.repeat_interleave(2, 0) for key, value in grid(size, 2, 2).items()}
    assert len(areas(monkeypatch, image, same, ["cell"], 0.3)) == 4


def test_small_boxes_are_not_filled():
    size = (640, 480)
    drawn = draw_detections(Image.new("RGB", size, "white"), grid(size, 60, 45), ["cell"], 0.3)
    # Boxes are 8.5 by 8.5 pixels. The inside of boxes without text stays visible.
    inside = [
        drawn.getpixel((int((x + 0.4) * 640 / 60), int((y + 0.4) * 480 / 45))) for x in range(60) for y in range(45)
    ]
    assert sum(pixel == WHITE for pixel in inside) > 1000


def test_a_tall_image_does_not_make_the_sheet_huge(data):
    data.sizes, tall = [(20, 2000), (50, 100), (2000, 20)], Image.new("RGB", (20, 2000), "red")
    data.open_image = lambda index: tall.resize(data.sizes[index])
    sheet = side_by_side(data, {"before": [NONE] * 3})
    assert sheet.size == (2 * (SIDE + GAP) - GAP, 2 * HEADER + 1300 + 2 * SIDE + 3 + 3 * GAP)


def test_any_name_is_drawn():
    """Pillow cannot measure a text with several lines or with half of a surrogate pair."""
    image = Image.new("RGB", (160, 120), "white")
    for name in STRANGE_NAMES:
        assert draw_detections(image, found(0.9), ["", name], 0.5).tobytes() != image.tobytes()
        data = make_split([[BOX]], [[0]])
        data.class_names, data.open_image = [name], lambda _: image
        sheet = side_by_side(data, {name: [{**found(0.9), "labels": torch.tensor([0])}]}, title=f"the split {name}")
        assert sheet.width > SIDE
