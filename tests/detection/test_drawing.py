# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Drawing many boxes."""

import torch
from PIL import Image, ImageDraw

from peft_sdpt.detection.drawing import draw_detections

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
    # The best box has its text, whatever overlaps it.
    same = {key: value.repeat_interleave(2, 0) for key, value in grid(size, 2, 2).items()}
    assert len(areas(monkeypatch, image, same, ["cell"], 0.3)) == 4


def test_small_boxes_are_not_filled():
    size = (640, 480)
    drawn = draw_detections(Image.new("RGB", size, "white"), grid(size, 60, 45), ["cell"], 0.3)
    # Boxes are 8.5 by 8.5 pixels. Those without text keep their inside.
    inside = [
        drawn.getpixel((int((x + 0.4) * 640 / 60), int((y + 0.4) * 480 / 45))) for x in range(60) for y in range(45)
    ]
    assert sum(pixel == WHITE for pixel in inside) > 1000
