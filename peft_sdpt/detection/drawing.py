# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of detections: one at its own size, or before and after side by side."""

from __future__ import annotations

import colorsys

from PIL import Image, ImageDraw, ImageFont

# Pixels.
SIDE, GAP, HEADER = 320, 6, 26
GROUPS_PER_ROW = 2


def draw_detections(
    picture: Image.Image, detections: dict, class_names: list[str], threshold: float, width: int | None = None
) -> Image.Image:
    """A copy of a picture with the boxes that score at least `threshold`.

    Args:
        picture: RGB.
        detections: `boxes` (n, 4) as x, y, width, height in pixels of the picture, `scores` (n,) and `labels` (n,).
        class_names: names of the classes.
        threshold: lowest score shown.
        width: of the copy, pixels. Default: the picture's own.
    """
    scale = (width or picture.width) / picture.width
    size = (round(picture.width * scale), max(1, round(picture.height * scale)))
    canvas = picture.copy() if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(canvas)
    # As the root of the side: a large photograph is looked at both whole and enlarged.
    letters = max(10, round(0.85 * (canvas.width * canvas.height) ** 0.25))
    line = round(letters / 5)
    font = ImageFont.load_default(letters)
    # The best last, on top of what it overlaps.
    order = detections["scores"].argsort()
    columns = (detections[key][order].tolist() for key in ("boxes", "scores", "labels"))
    for box, score, label in zip(*columns, strict=True):
        if score < threshold:
            continue
        colour = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.75, 0.95))
        x, y, box_width, box_height = (value * scale for value in box)
        draw.rectangle((x, y, x + box_width, y + box_height), outline=colour, width=line)
        text = f"{class_names[label]} {score:.2f}"
        # Above the box, but inside the picture as far as it is long enough.
        left = max(0, min(x, canvas.width - draw.textlength(text, font) - 2 * line))
        place = (left + line, max(0, y - 1.2 * letters))
        corner = draw.textbbox(place, text, font)
        draw.rectangle((corner[0] - line, corner[1] - line, corner[2] + line, corner[3] + line), fill=colour)
        draw.text(place, text, fill="black", font=font)
    return canvas


def side_by_side(
    pictures: list[Image.Image],
    columns: dict[str, list[dict]],
    class_names: list[str],
    threshold: float = 0.3,
) -> Image.Image:
    """One sheet on which each picture stands once a model, side by side; two pictures a row.

    Args:
        pictures: RGB images.
        columns: heading -> detections of each picture, as `draw_detections` takes them.
        class_names: names of the classes.
        threshold: lowest score shown.
    """
    groups = [
        [draw_detections(picture, found[i], class_names, threshold, SIDE) for found in columns.values()]
        for i, picture in enumerate(pictures)
    ]
    rows = [groups[i : i + GROUPS_PER_ROW] for i in range(0, len(groups), GROUPS_PER_ROW)]
    group_width = len(columns) * (SIDE + GAP) + GAP
    heights = [max(group[0].height for group in row) + GAP for row in rows]
    sheet = Image.new("RGB", (min(GROUPS_PER_ROW, len(groups)) * group_width, HEADER + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    y = HEADER
    for row, height in zip(rows, heights, strict=True):
        for place, group in enumerate(row):
            for column, (heading, picture) in enumerate(zip(columns, group, strict=True)):
                x = place * group_width + column * (SIDE + GAP)
                draw.text((x + 4, 3), heading, fill="black", font=ImageFont.load_default(16))
                sheet.paste(picture, (x, y))
        y += height
    return sheet
