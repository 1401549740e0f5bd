# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Drawing detections on images, and drawing the objects and the results of several models side by side."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..wording import shorten
from .data import DetectionSplit
from .grounding import clean_name
from .prediction import DEFAULT_THRESHOLD, Detections

# Width of an image, gap between images and height of the title and of the headings in `side_by_side`, in pixels.
SIDE, GAP, HEADER = 320, 6, 26
# Largest height of an image in `side_by_side`, in pixels.
TALLEST = 4 * SIDE
TRUTH = "ground truth"
# Largest number of letters of a text on an image.
MAX_LETTERS = 100


def draw_detections(
    image: Image.Image, detections: Detections, class_names: list[str], threshold: float, width: int | None = None
) -> Image.Image:
    """Draw the boxes with a score of at least `threshold` on a copy of an image.

    The colour of a box shows its class. In a crowded image, lines are thin and letters are small. Text that would
    cover the text of a better box is left out.

    Args:
        image: The image, RGB.
        detections: Its detections, from `detect`.
        class_names: Names of the classes.
        threshold: Lowest score to draw.
        width: Width of the copy in pixels. None for the width of the image.

    Returns:
        The copy with the boxes, class names and scores.
    """
    order = detections["scores"].argsort(descending=True)
    boxes, scores, labels = (
        values[order].tolist() for values in (detections["boxes"], detections["scores"], detections["labels"])
    )
    drawn = [
        (box, f"{class_names[label]} {score:.2f}", label)
        for box, score, label in zip(boxes, scores, labels, strict=True)
        if score >= threshold
    ]
    return _draw(image, drawn, width)


def draw_objects(data: DetectionSplit, index: int, width: int | None = None) -> Image.Image:
    """Draw the true boxes of an image of a split on a copy of it.

    Args:
        data: The split.
        index: Index of the image.
        width: Width of the copy in pixels. None for the width of the image.

    Returns:
        The copy with the boxes and class names.
    """
    columns = zip(data.boxes[index], data.labels[index], data.crowds[index], strict=True)
    drawn = [(box, data.class_names[label] + (" (crowd)" if crowd else ""), label) for box, label, crowd in columns]
    return _draw(data.open_image(index), drawn, width)


def _draw(image: Image.Image, drawn: Sequence[tuple[Sequence[float], str, int]], width: int | None) -> Image.Image:
    """Draw boxes on a copy of an image, each with its text, in the colour of its class.

    The first box is drawn on top of the others. A text that would cover an earlier one is left out.
    """
    scale = (width or image.width) / image.width
    size = (round(image.width * scale), max(1, round(image.height * scale)))
    canvas = image.copy() if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    # Letters grow with the square root of the image size, because large photos are viewed both scaled down and
    # enlarged.
    letters = max(10, round(0.85 * (canvas.width * canvas.height) ** 0.25))
    boxes = [[value * scale for value in box] for box, _, _ in drawn]
    # Pillow cannot measure a text with a line break.
    words = [shorten(clean_name(text), MAX_LETTERS) for _, text, _ in drawn]
    texts = [(box[0], box[1], text) for box, text in zip(boxes, words, strict=True)]
    places = _place_texts(draw, texts, letters)
    if places.count(None) > len(places) / 4:
        letters = max(10, letters // 2)
        places = _place_texts(draw, texts, letters)
    colours = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.75, 0.95)) for *_, label in drawn]
    for (x, y, box_width, box_height), colour in reversed([*zip(boxes, colours, strict=True)]):
        line = max(1, min(round(letters / 5), round(min(box_width, box_height) / 8)))
        draw.rectangle((x, y, x + box_width, y + box_height), outline=colour, width=line)
    for text, place, colour in zip(words, places, colours, strict=True):
        if place:
            draw.rectangle(_background(draw, place, text, letters), fill=colour)
            draw.text(place, text, fill="black", font=_font(letters))
    return canvas


def _place_texts(
    draw: ImageDraw.ImageDraw, texts: list[tuple[float, float, str]], letters: int
) -> list[tuple[float, float] | None]:
    """Place a text at each box, above its corner (x, y) but inside the image where it fits.

    Returns:
        The places. None for a text that would cover an earlier one.
    """
    places: list[tuple[float, float] | None] = []
    taken: list[tuple[float, float, float, float]] = []
    margin = round(letters / 5)
    for x, y, text in texts:
        left = max(0, min(x, draw.im.size[0] - draw.textlength(text, _font(letters)) - 2 * margin))
        place = (left + margin, max(0, y - 1.2 * letters))
        x0, y0, x1, y1 = area = _background(draw, place, text, letters)
        if any(x0 < right and left < x1 and y0 < bottom and top < y1 for left, top, right, bottom in taken):
            places.append(None)
        else:
            places.append(place)
            taken.append(area)
    return places


@functools.cache
def _font(letters: int) -> ImageFont.FreeTypeFont:
    """Return the font of Pillow with letters of this height in pixels. Reading it takes longer than drawing a text."""
    return ImageFont.load_default(letters)  # type: ignore[return-value]  # with a size, it is a FreeType font


def _background(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, letters: int
) -> tuple[float, float, float, float]:
    """Return the corners of the area behind a text."""
    x0, y0, x1, y1 = draw.textbbox(place, text, _font(letters))
    margin = round(letters / 5)
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin


def side_by_side(
    data: DetectionSplit,
    columns: dict[str, list[Detections]],
    threshold: float = DEFAULT_THRESHOLD,
    title: str | None = None,
) -> Image.Image:
    """Draw images of a split, one per row: the true boxes, and beside them the detections of several models.

    Args:
        data: A split with the images to draw.
        columns: Maps a heading, for instance the name of a model, to its detections in each image.
        threshold: Lowest score to draw, the same for all models. If it hides all detections of a model, the heading of
            its column says this.
        title: Text above the headings. Default: the threshold.

    Returns:
        The sheet.
    """
    headings = [TRUTH, *(heading + _hidden(results, threshold) for heading, results in columns.items())]
    rows = []
    for index, (width, height) in enumerate(data.sizes):
        # A very tall image is narrower than its column.
        side = column_width(width, height)
        rows.append([draw_objects(data, index, side)])
        for results in columns.values():
            image = data.open_image(index)
            rows[-1].append(draw_detections(image, results[index], data.class_names, threshold, side))
    return sheet(headings, rows, title or f"boxes with a score of at least {threshold:g}")


def sheet(headings: Sequence[str], rows: Sequence[Sequence[Image.Image]], title: str) -> Image.Image:
    """Put images side by side.

    Args:
        headings: The heading of each column.
        rows: The images of each row, one per column, at most `SIDE` pixels wide and of one height.
        title: Text above the headings.

    Returns:
        The sheet.
    """
    height = 2 * HEADER + sum(row[0].height + GAP for row in rows)
    canvas = Image.new("RGB", (len(headings) * (SIDE + GAP) - GAP, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    draw.text((4, 3), clean_name(title), fill="black", font=font)
    for column, heading in enumerate(headings):
        draw.text((column * (SIDE + GAP) + 4, HEADER + 3), clean_name(heading), fill="black", font=font)
    y = 2 * HEADER
    for row in rows:
        for column, image in enumerate(row):
            canvas.paste(image, (column * (SIDE + GAP), y))
        y += row[0].height + GAP
    return canvas


def column_width(width: int, height: int) -> int:
    """Return how wide an image of this size is in a sheet, in pixels."""
    return max(1, min(SIDE, round(TALLEST * width / height)))


def _hidden(results: list[Detections], threshold: float) -> str:
    """Return what the heading of a column says if it shows no detection."""
    best = max((float(result["scores"].max()) for result in results if len(result["scores"])), default=None)
    if best is None:
        return ": no box"
    return f": no box above {threshold:g}, best {best:.2g}" if best < threshold else ""
