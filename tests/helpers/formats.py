# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Functions that write annotations in the formats that are read."""

from __future__ import annotations

Box = tuple[float, float, float, float]
Objects = list[tuple[int, Box]]


def write_coco(images: dict[str, tuple[tuple[int, int], Objects]], names: list[str]) -> dict:
    """Images by their file names, with their size and objects."""
    annotations = [
        {"image_id": index, "category_id": label + 1, "bbox": list(box), "iscrowd": 0}
        for index, (_, objects) in enumerate(images.values())
        for label, box in objects
    ]
    return {
        "images": [
            {"id": index, "file_name": name, "width": size[0], "height": size[1]}
            for index, (name, (size, _)) in enumerate(images.items())
        ],
        "annotations": [{"id": index, **annotation} for index, annotation in enumerate(annotations, 1)],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names, 1)],
    }


def corners(box: Box) -> list[tuple[float, float]]:
    x, y, width, height = box
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


def write_yolo(size: tuple[int, int], objects: Objects, outlines: bool = False) -> str:
    """Return the lines of an image. Each line has a box, or the outline of a box."""
    lines = []
    for label, (x, y, width, height) in objects:
        values = [(x + width / 2) / size[0], (y + height / 2) / size[1], width / size[0], height / size[1]]
        if outlines:
            values = [v / s for point in corners((x, y, width, height)) for v, s in zip(point, size, strict=True)]
        lines.append(" ".join([str(label), *(f"{value:.9f}" for value in values)]))
    return "".join(f"{line}\n" for line in lines)


def write_voc(file_name: str, size: tuple[int, int], objects: Objects, names: list[str], first: int = 1) -> str:
    """The XML of an image. `first` is the number of the first pixel; the last pixel belongs to a box if it is 1."""
    parts = [
        f"<object><name>{names[label]}</name><difficult>0</difficult><bndbox>"
        f"<xmin>{x + first}</xmin><ymin>{y + first}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax>"
        "</bndbox></object>"
        for label, (x, y, width, height) in objects
    ]
    head = f"<folder>x</folder><filename>{file_name}</filename><path>C:\\x\\{file_name}</path>"
    head += f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation>{head}{''.join(parts)}</annotation>"


def write_labelme(
    image_path: str, size: tuple[int, int], objects: Objects, names: list[str], outlines: bool = False
) -> dict:
    """Return the content of the file of an image, with rectangles or outlines."""
    shapes = [
        {
            "label": names[label],
            "points": [list(p) for p in (corners(box) if outlines else [corners(box)[2], corners(box)[0]])],
            "shape_type": "polygon" if outlines else "rectangle",
            "flags": {},
        }
        for label, box in objects
    ]
    return {
        "version": "5.4.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": size[1],
        "imageWidth": size[0],
    }
