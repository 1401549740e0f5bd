# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Drawing detections on images, and drawing the results of several models side by side."""

from __future__ import annotations

import colorsys

from PIL import Image, ImageDraw, ImageFont

from .prediction import Detections

# Width of an image, gap between images and height of the headings in `side_by_side`, in pixels.
SIDE, GAP, HEADER = 320, 6, 26
GROUPS_PER_ROW = 2


def draw_detections(
    image: Image.Image, detections: Detections, class_names: list[str], threshold: float, width: int | None = None
) -> Image.Image:
    """Draw the boxes with a score of at least `threshold` on a copy of an image.

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
    line = round(letters / 5)
    font = ImageFont.load_default(letters)
    # The best detection is drawn last, on top of others that it overlaps.
    order = detections["scores"].argsort()
    boxes, scores, labels = (
        values[order].tolist() for values in (detections["boxes"], detections["scores"], detections["labels"])
    )
    for box, score, label in zip(boxes, scores, labels, strict=True):
        if score < threshold:
            continue
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.75, 0.95))
        x, y, box_width, box_height = (value * scale for value in box)
        draw.rectangle((x, y, x + box_width, y + box_height), outline=colour, width=line)
        text = f"{class_names[label]} {score:.2f}"
        # The text goes above the box, but inside the image where it fits.
        left = max(0, min(x, canvas.width - draw.textlength(text, font) - 2 * line))
        place = (left + line, max(0, y - 1.2 * letters))
        corner = draw.textbbox(place, text, font)
        draw.rectangle((corner[0] - line, corner[1] - line, corner[2] + line, corner[3] + line), fill=colour)
        draw.text(place, text, fill="black", font=font)
    return canvas


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
