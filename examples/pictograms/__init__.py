# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Generated scenes of named pictograms, in COCO terms: the data of the host's pre-training and of the built-in tasks.

A scene is a small photograph-like picture: a few pictograms of random size, turn and brightness on smoothed noise, with
their names and tight boxes. It depends on nothing but its seed.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from peft_sdpt.detection.data import DetectionSplit

FOLDER = Path(__file__).resolve().parent
TILE = 64
COLUMNS = 20
STYLES = {"noto": "google", "twemoji": "twitter"}


@dataclass(frozen=True)
class Category:
    key: str
    name: str
    seen: bool


@lru_cache
def read_categories() -> tuple[Category, ...]:
    """All categories in sheet order; `seen` tells those of the host's pre-training from those kept out of it."""
    categories, seen = [], True
    for line in (FOLDER / "categories.txt").read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if line.startswith("["):
            seen = line.strip() == "[seen]"
            continue
        for item in line.split(","):
            key, _, name = (part.strip() for part in item.partition("="))
            categories.append(Category(key, name or re.sub(r"[_-]", " ", key), seen))
    return tuple(categories)


@lru_cache
def tiles(style: str, line_art: bool = False) -> tuple[Image.Image, ...]:
    """The pictograms of one style, cropped to what is drawn, in the order of `read_categories()`."""
    if line_art:
        return tuple(map(_line_art, tiles(style)))
    sheet = Image.open(FOLDER / f"{STYLES[style]}.webp").convert("RGBA")
    cut = []
    for index in range(len(read_categories())):
        x, y = index % COLUMNS * TILE, index // COLUMNS * TILE
        tile = sheet.crop((x, y, x + TILE, y + TILE))
        cut.append(tile.crop(tile.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox()))
    return tuple(cut)


@dataclass(frozen=True)
class SceneStyle:
    """How scenes look: the drawing style, and sizes as shares of the picture's width.

    `grey` takes the colours off the whole picture; `line_art` draws the outlines of pictograms alone, dark on white.
    """

    style: str = "noto"
    smallest: float = 0.18
    largest: float = 0.5
    most: int = 6
    grey: bool = False
    line_art: bool = False


def _line_art(tile: Image.Image) -> Image.Image:
    """A pictogram as a drawing: its edges, dark on white within its outline."""
    paper = Image.new("RGB", (tile.width + 4, tile.height + 4), "white")
    paper.paste(tile, (2, 2), tile)
    edges = [band.filter(ImageFilter.FIND_EDGES) for band in paper.split()]
    drawn = ImageChops.invert(ImageChops.lighter(ImageChops.lighter(*edges[:2]), edges[2]))
    drawn = drawn.point(lambda value: max(0, 3 * value - 510)).crop((1, 1, tile.width + 3, tile.height + 3))
    outline = Image.new("L", drawn.size)
    outline.paste(tile.getchannel("A"), (1, 1))
    return Image.merge("RGBA", (drawn, drawn, drawn, outline.filter(ImageFilter.MaxFilter(3))))


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    cells = int(rng.integers(2, 9))
    noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    # A tint of its own for each picture: smoothed noise alone is grey on average.
    tint = rng.integers(0, 256, (1, 1, 3))
    mix = (rng.uniform(0.2, 0.8) * noise + rng.uniform(0.2, 0.8) * tint).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(mix).resize((size, size), Image.Resampling.BICUBIC)
    grain = rng.normal(0, rng.uniform(0, 12), (size, size, 3))
    return Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))


def _overlap(box: tuple, others: list[tuple]) -> float:
    """Largest share of any box, this one or another, that lies under the other one of the pair."""
    worst = 0.0
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        if width > 0 and height > 0:
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
            worst = max(worst, width * height / min(areas))
    return worst


def make_scene(
    seed: tuple[int, ...], classes: list[int], size: int = 96, look: SceneStyle = SceneStyle()
) -> tuple[Image.Image, list[int], list[tuple[int, int, int, int]]]:
    """One scene.

    Args:
        seed: what the scene depends on, nothing else. numpy takes a short seed for one with zeros after it: (5, 1) and
            (5, 1, 0) are one scene.
        classes: indices into `read_categories()` to draw from.
        size: width and height in pixels.
        look: style and sizes.

    Returns:
        The RGB picture, the class index of each pictogram and its box `(x, y, width, height)` in pixels.
    """
    rng = np.random.default_rng(seed)
    picture = _background(rng, size)
    pictograms = tiles(look.style, look.line_art)
    labels: list[int] = []
    corners: list[tuple[int, int, int, int]] = []
    for _ in range(int(rng.integers(1, look.most + 1))):
        label = int(rng.choice(classes))
        tile = pictograms[label]
        longest = rng.uniform(look.smallest, look.largest) * size
        scale = longest / max(tile.size)
        stretch = rng.uniform(0.9, 1.1)
        shape = (max(4, round(tile.width * scale * stretch)), max(4, round(tile.height * scale / stretch)))
        tile = tile.resize(shape, Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tile = tile.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
        tile = tile.crop(tile.getchannel("A").point(lambda a: 255 * (a > 32)).getbbox())
        gain = rng.uniform(0.75, 1.15)
        if look.grey:
            tile = Image.merge("RGBA", (*[tile.convert("L")] * 3, tile.getchannel("A")))
        tile = Image.merge(
            "RGBA", (*(b.point(lambda v, gain=gain: v * gain) for b in tile.split()[:3]), tile.split()[3])
        )
        if max(tile.size) >= size:
            continue
        for _ in range(12):
            x, y = (int(rng.integers(0, size - side)) for side in tile.size)
            box = (x, y, x + tile.width, y + tile.height)
            if _overlap(box, corners) < 0.25:
                picture.paste(tile, (x, y), tile)
                labels.append(label)
                corners.append(box)
                break
    if look.grey:
        picture = picture.convert("L").convert("RGB")
    return picture, labels, [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in corners]


def scene_split(
    seeds: list[tuple[int, ...]], classes: list[int], size: int = 96, look: SceneStyle = SceneStyle()
) -> DetectionSplit:
    """Scenes as a split of a detection data set: one a seed, its labels indices into `classes`."""
    scenes = [make_scene(seed, classes, size, look) for seed in seeds]
    return DetectionSplit(
        class_names=[read_categories()[c].name for c in classes],
        image_ids=list(range(len(scenes))),
        sizes=[(size, size)] * len(scenes),
        boxes=[[tuple(map(float, box)) for box in boxes] for _, _, boxes in scenes],
        labels=[[classes.index(label) for label in labels] for _, labels, _ in scenes],
        crowds=[[False] * len(labels) for _, labels, _ in scenes],
        open_image=lambda index: scenes[index][0],
    )
