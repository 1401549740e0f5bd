# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Generated scenes of named pictograms with boxes, for pre-training the small base model and for the built-in tasks.

A scene is a small image that looks like a photo: a few pictograms of random size, rotation and brightness on smoothed
noise, with their names and tight boxes. It depends only on its seed.
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
    """A category of pictograms.

    Attributes:
        key: Short name of the pictogram in the source packages.
        name: Name for prompts.
        seen: Whether pre-training uses the category.
    """

    key: str
    name: str
    seen: bool


@lru_cache
def read_categories() -> tuple[Category, ...]:
    """Return all categories, in the order of the sheets."""
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
    """Return the pictograms of one style, cropped to their visible part, in the order of `read_categories()`."""
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
    """How scenes look.

    Attributes:
        style: Drawing style of the pictograms, a key of `STYLES`.
        smallest, largest: Range of the longer side of a pictogram, as a fraction of the width of the image.
        most: Maximum number of pictograms.
        grey: Whether the image has no colours.
        line_art: Whether only the outlines of the pictograms are drawn, dark on white.
    """

    style: str = "noto"
    smallest: float = 0.18
    largest: float = 0.5
    most: int = 6
    grey: bool = False
    line_art: bool = False


def _line_art(tile: Image.Image) -> Image.Image:
    """Return a pictogram as a line drawing: its edges, dark on white within its outline."""
    paper = Image.new("RGB", (tile.width + 4, tile.height + 4), "white")
    paper.paste(tile, (2, 2), tile)
    edges = [band.filter(ImageFilter.FIND_EDGES) for band in paper.split()]
    drawn = ImageChops.invert(ImageChops.lighter(ImageChops.lighter(*edges[:2]), edges[2]))
    drawn = drawn.point(lambda value: max(0, 3 * value - 510)).crop((1, 1, tile.width + 3, tile.height + 3))
    outline = Image.new("L", drawn.size)
    outline.paste(tile.getchannel("A"), (1, 1))
    return Image.merge("RGBA", (drawn, drawn, drawn, outline.filter(ImageFilter.MaxFilter(3))))


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Return a background of smoothed noise with a tint and some grain."""
    cells = int(rng.integers(2, 9))
    noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    # Each image has its own tint, because smoothed noise alone is grey on average.
    tint = rng.integers(0, 256, (1, 1, 3))
    mix = (rng.uniform(0.2, 0.8) * noise + rng.uniform(0.2, 0.8) * tint).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(mix).resize((size, size), Image.Resampling.BICUBIC)
    grain = rng.normal(0, rng.uniform(0, 12), (size, size, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def _overlap(box: tuple, others: list[tuple]) -> float:
    """Return the largest overlap of a box with other boxes, as a fraction of the smaller box of each pair."""
    largest = 0.0
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        if width > 0 and height > 0:
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
            largest = max(largest, width * height / min(areas))
    return largest


def make_scene(
    seed: tuple[int, ...], classes: list[int], size: int = 96, look: SceneStyle = SceneStyle()
) -> tuple[Image.Image, list[int], list[tuple[int, int, int, int]]]:
    """Generate a scene.

    Args:
        seed: Seed of the scene. NumPy pads seeds with zeros, so (5, 1) and (5, 1, 0) give the same scene.
        classes: Indices into `read_categories()` to draw from.
        size: Width and height in pixels.
        look: How the scene looks.

    Returns:
        The image in RGB, the class index of each pictogram, and its box `(x, y, width, height)` in pixels.
    """
    rng = np.random.default_rng(seed)
    image = _background(rng, size)
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
                image.paste(tile, (x, y), tile)
                labels.append(label)
                corners.append(box)
                break
    if look.grey:
        image = image.convert("L").convert("RGB")
    return image, labels, [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in corners]


def scene_split(
    seeds: list[tuple[int, ...]], classes: list[int], size: int = 96, look: SceneStyle = SceneStyle()
) -> DetectionSplit:
    """Generate a split with one scene per seed. Its labels are indices into `classes`."""
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
