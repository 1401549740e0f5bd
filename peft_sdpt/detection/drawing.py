# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Drawing detections on images, and drawing the results of several models side by side."""

from __future__ import annotations

import colorsys
import functools

from PIL import Image, ImageDraw, ImageFont

from .prediction import Detections

# Width of an image, gap between images and height of the headings in `side_by_side`, in pixels.
SIDE, GAP, HEADER = 320, 6, 26
GROUPS_PER_ROW = 2


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
    scale = (width or image.width) / image.width
    size = (round(image.width * scale), max(1, round(image.height * scale)))
    canvas = image.copy() if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    # Letters grow with the square root of the image size, because large photos are viewed both scaled down and
    # enlarged.
    letters = max(10, round(0.85 * (canvas.width * canvas.height) ** 0.25))
    order = detections["scores"].argsort(descending=True)
    boxes, scores, labels = (
        values[order].tolist() for values in (detections["boxes"] * scale, detections["scores"], detections["labels"])
    )
    shown = [row for row in zip(boxes, scores, labels, strict=True) if row[1] >= threshold]
    texts = [(x, y, f"{class_names[label]} {score:.2f}") for (x, y, *_), score, label in shown]
    places = _place_texts(draw, texts, letters)
    if places.count(None) > len(places) / 4:
        letters = max(10, letters // 2)
        places = _place_texts(draw, texts, letters)
    colours = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.75, 0.95)) for *_, label in shown]
    # The best box is drawn last, on top of others that it overlaps.
    for ((x, y, box_width, box_height), _, _), colour in reversed([*zip(shown, colours, strict=True)]):
        width = max(1, min(round(letters / 5), round(min(box_width, box_height) / 8)))
        draw.rectangle((x, y, x + box_width, y + box_height), outline=colour, width=width)
    for (_, _, text), place, colour in zip(texts, places, colours, strict=True):
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
    images: list[Image.Image],
    columns: dict[str, list[Detections]],
    class_names: list[str],
    threshold: float = 0.3,
) -> Image.Image:
    """Draw the detections of several models side by side for each image, with two images per row.

    Args:
        images: The images, RGB.
        columns: Maps a heading, for instance the name of a model, to its detections in each image.
        class_names: Names of the classes.
        threshold: Lowest score to draw.

    Returns:
        The sheet, with the headings in its first row.
    """
    groups = [
        [draw_detections(image, detections[i], class_names, threshold, SIDE) for detections in columns.values()]
        for i, image in enumerate(images)
    ]
    rows = [groups[i : i + GROUPS_PER_ROW] for i in range(0, len(groups), GROUPS_PER_ROW)]
    group_width = len(columns) * (SIDE + GAP) + GAP
    heights = [max(group[0].height for group in row) + GAP for row in rows]
    sheet = Image.new("RGB", (min(GROUPS_PER_ROW, len(groups)) * group_width, HEADER + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    y = HEADER
    for row, height in zip(rows, heights, strict=True):
        for place, group in enumerate(row):
            for column, (heading, image) in enumerate(zip(columns, group, strict=True)):
                x = place * group_width + column * (SIDE + GAP)
                draw.text((x + 4, 3), heading, fill="black", font=ImageFont.load_default(16))
                sheet.paste(image, (x, y))
        y += height
    return sheet
