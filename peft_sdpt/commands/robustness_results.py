# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The results of `sdpt-robustness`: the parts that are measured, the table, and the picture."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..detection import DetectionSplit, draw_detections, draw_objects, split_classes
from ..detection.devices import to_device
from ..detection.drawing import TRUTH, column_width, sheet
from ..detection.pixels import PixelRange, process_images
from ..detection.prediction import Row, detect_in_pixels, evaluation_mode
from ..detection.purification import Purifier
from ..detection.robustness import Change
from ..errors import InputError
from ..files import read_json, remove_leftovers, whole_file
from ..wording import counted

# Folder of the detections of each part.
DETECTIONS = "detections"
# What all parts depend on, and what a message says if it is another.
DIFFERENCES = {
    "base_model": "another base model (--model_name_or_path)",
    "adapter": "another --adapter",
    "images": "other images (--dataset_name, --eval_split, --num_images)",
    "image_size": "another --image_size",
    "seed": "another --seed",
}
# How much AP may change where a check of the table expects no change.
NOISE = 0.01
# What the table says if no check fails.
PASSED = "All checks of the table passed."
# Lowest AP on unchanged images from which an attack can take something away.
LOW = 0.05


class Shown(NamedTuple):
    """A column of the picture.

    Attributes:
        change: The change of the pixels, or None.
        context: The context in which the model then detects.
        threshold: Lowest score to draw.
    """

    change: Change | None
    context: Callable[[], AbstractContextManager]
    threshold: float


def part_name(kind: str, number: float | None = None, purify: Purifier | None = None) -> str:
    """Return the name of a part, such as "pgd 2 jpeg:75" for PGD at 2/255 and then JPEG."""
    words = [kind, "" if number is None else f"{number:.10g}", "" if purify is None else str(purify)]
    return " ".join(filter(None, words))


class Measurements:
    """The parts that are measured, in `robustness.json` and in a file of detections for each part.

    Args:
        folder: Folder of the results.
        settings: What all parts depend on. The keys are those of `DIFFERENCES`.

    Raises:
        InputError: `robustness.json` was not written by this command, or has parts with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.file, self.picture = folder / "robustness.json", folder / "robustness.png"
        for place in (folder, folder / DETECTIONS):
            remove_leftovers(place)
        self.parts: dict[str, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        if self.file.is_file():
            content = read_json(self.file)
            content = content if isinstance(content, dict) else {}
            earlier, parts = content.get("settings"), content.get("parts")
            if not isinstance(earlier, dict) or not isinstance(parts, dict):
                raise InputError(f"{self.file}: was not written by this command; choose another --output_dir.")
            if others := [text for name, text in DIFFERENCES.items() if earlier.get(name) != self.settings[name]]:
                raise InputError(
                    f"{self.file}: was measured with {' and '.join(others)}; choose another --output_dir, or remove "
                    "this file."
                )
            self.parts = parts

    def has(self, name: str, settings: Mapping[str, Any]) -> bool:
        """Return whether a part is there, with these settings of its own."""
        part = self.parts.get(name)
        return part is not None and part.get("settings") == settings and self._rows_file(name).is_file()

    def add(
        self, name: str, settings: dict[str, Any], rows: list[Row], precision: dict[str, float], seconds: float
    ) -> None:
        """Write a part: its detections, and then its AP."""
        with whole_file(self._rows_file(name)) as unfinished, open(unfinished, "wb") as file:
            # Boxes and scores were computed in this precision.
            np.save(file, np.array(rows, dtype=np.float32).reshape(-1, 7))
        self.parts[name] = {**precision, "settings": settings, "seconds": round(seconds, 1)}
        self._write()

    def rows(self, name: str) -> list[Row]:
        """Read the detections of a part.

        Raises:
            InputError: The file is damaged.
        """
        file = self._rows_file(name)
        try:
            columns = np.load(file)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{file}: cannot be read ({error}); remove it to measure this part again.") from None
        return [(int(row[0]), *row[1:6], int(row[6])) for row in columns.tolist()]

    def precision(self, name: str) -> dict[str, float]:
        """Return `AP`, `AP50` and `AP75` of a part."""
        return {key: self.parts[name][key] for key in ("AP", "AP50", "AP75")}

    def finish(self, summary: dict[str, Any], table: str) -> None:
        """Write what was computed from the parts, and `robustness.md`."""
        self.summary = summary
        self._write()
        with whole_file(self.folder / "robustness.md") as unfinished:
            unfinished.write_text(table + "\n", encoding="utf-8")

    def _write(self) -> None:
        content = {"settings": self.settings, "summary": self.summary, "parts": self.parts}
        with whole_file(self.file) as unfinished:
            unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _rows_file(self, name: str) -> Path:
        return self.folder / DETECTIONS / f"{re.sub('[ :]', '-', name)}.npy"


def make_tables(
    about: Sequence[str],
    parts: Mapping[str, Mapping[str, float]],
    summary: Mapping[str, Any],
    args: argparse.Namespace,
    attacks: Mapping[str, str],
) -> str:
    """Write the table of a detector in Markdown.

    Args:
        about: The lines above the table.
        parts: The AP of each part.
        summary: What was computed from them.
        args: The flags.
        attacks: What each attack of the flags is.

    Returns:
        The text, with what a check of the table found.
    """
    lines = [*about, f"Unchanged: {_cell(parts[part_name('clean')])}"]
    levels = [f"{eps:g}/255" for eps in args.eps]
    if args.attack:
        effort = counted(args.steps, "step") + (f", {counted(args.restarts, 'start')}" if args.restarts > 1 else "")
        rows = [["random signs", *(parts[part_name("signs", eps)] for eps in args.eps)]]
        rows += [[attacks[name], *(parts[part_name(name, eps)] for eps in args.eps)] for name in args.attack]
        if len(args.attack) > 1:
            rows.append(["lowest per image", *(summary[part_name("lowest", eps)] for eps in args.eps)])
        lines += ["", *_table([f"attack, {effort}", *levels], rows)]
    if args.corruptions:
        rows = [[name, *(parts[part_name(name, level)] for level in args.severities)] for name in args.corruptions]
        lines += ["", *_table(["corruption, by severity", *map(str, args.severities)], rows)]
        share = "-" if summary["rPC"] is None else f"{summary['rPC']:.3f}"
        lines += ["", f"mPC {summary['mPC']:.3f}, rPC {share}"]
    if args.purify:
        rows = []
        for purify in args.purify:
            clean = parts[part_name("clean", purify=purify)]
            attacked: list[list[Any]] = []
            for kind, meaning in (
                ("transfer", "transferred"),
                ("pgd", "PGD that does not know it"),
                ("adaptive", "PGD through it"),
                ("lowest", "lowest per image"),
            ):
                names = [part_name(kind, eps, purify) for eps in args.eps]
                cells = [parts.get(name) or summary.get(name) for name in names]
                if any(cells):
                    attacked.append([f"{purify}, {meaning}", clean, *cells])
            rows += attacked or [[str(purify), clean]]
        # Only these attacks are made with purifiers.
        has_attacks = any(name in args.attack for name in ("pgd", "transfer"))
        lines += ["", *_table(["after a purifier", "unchanged", *(levels if has_attacks else ())], rows)]
    found = doubts(parts, summary, args)
    lines += ["", *(["Doubtful:", "", *(f"* {text}" for text in found)] if found else [PASSED])]
    return "\n".join(lines)


def _cell(precision: Mapping[str, float] | None) -> str:
    return f"{precision['AP']:.3f} ({precision['AP50']:.3f})" if precision else ""


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *([name, *map(_cell, cells)] for name, *cells in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def doubts(parts: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any], args: argparse.Namespace) -> list[str]:
    """Check what must hold for a detector and attacks that work.

    Args:
        parts: All parts.
        summary: What was computed from them.
        args: The flags.

    Returns:
        A sentence for each check that fails by more than 0.01 AP. An attack that fails a check is too weak, so its AP
        says little.
    """

    def value(*name: Any) -> float | None:
        part = parts.get(part_name(*name))
        return part["AP"] if part else None

    found = []

    def expect(low: float | None, high: float | None, sentence: str) -> None:
        if low is not None and high is not None and low > high + NOISE:
            found.append(f"{sentence} ({low:.3f} instead of at most {high:.3f}).")

    clean = parts[part_name("clean")]["AP"]
    if clean < LOW:
        found.append(f"AP on unchanged images is too low to compare anything with it ({clean:.3f}).")
    if (summary.get("rPC") or 0) > 1:
        found.append(
            f"rPC is above 1, so AP is higher on corrupted images than on unchanged ones ({summary['rPC']:.3f})."
        )
    for name in args.attack:
        for less, more in zip(args.eps, args.eps[1:], strict=False):
            expect(value(name, more), value(name, less), f"{name}: AP is higher at {more:g}/255 than at {less:g}/255")
        for eps in args.eps:
            expect(value(name, eps), value("signs", eps), f"{name}: AP is higher than with random signs at {eps:g}/255")
    for eps in args.eps:
        pgd, signs = value("pgd", eps), value("signs", eps)
        # An AP of nearly 0 cannot become lower.
        if pgd is not None and signs is not None and max(NOISE, signs - NOISE) < pgd <= signs + NOISE:
            found.append(
                f"pgd: does hardly more harm than random signs at {eps:g}/255 ({pgd:.3f} instead of {signs:.3f})."
            )
        expect(pgd, value("transfer", eps), f"pgd: AP is higher than for transfer at {eps:g}/255")
        for purify in args.purify:
            expect(
                value("adaptive", eps, purify),
                value("pgd", eps, purify),
                f"{purify}: AP is higher for the attack through it than for the one that does not know it, at "
                f"{eps:g}/255",
            )
    return found


def draw_attack(
    model: nn.Module,
    processor: Any,
    data: DetectionSplit,
    images: Sequence[int],
    columns: Mapping[str, Shown],
    eps: float,
    title: str,
) -> Image.Image:
    """Draw detections in changed images.

    Args:
        model: The detector.
        processor: Its processor.
        data: The split.
        images: Indices of the images to draw, one per row.
        columns: The columns by heading.
        eps: Size of the changes, of 255 levels. A change of this size is drawn as white or black.
        title: Text above the headings.

    Returns:
        The sheet. The first column has the true boxes, and the last one the change of the column before it, magnified.
    """
    device = next(model.parameters()).device
    pixel_range = PixelRange.of(processor.image_processor).to(device)
    config: Any = model.config
    chunks = split_classes(data.class_names, processor.tokenizer, config.max_text_len)
    rows = []
    for index in images:
        width = column_width(*data.sizes[index])
        pixels = to_device(dict(process_images(processor.image_processor, [data.open_image(index)])), device)
        clean = values = pixels["pixel_values"]
        row = [draw_objects(data, index, width)]
        for change, context, threshold in columns.values():
            values = clean if change is None else change([index], pixels)
            changed = _to_image(pixel_range.to_images(values)[0])
            with evaluation_mode(model), context():
                (found,) = detect_in_pixels(
                    model,
                    processor.tokenizer,
                    {**pixels, "pixel_values": values},
                    [changed.size],
                    ["an image"],
                    data.class_names,
                    chunks,
                    threshold,
                    None,
                )
            row.append(draw_detections(changed, found, data.class_names, threshold, width))
        difference = (values - clean) * pixel_range.std
        magnified = _to_image(0.5 + difference[0] * (0.5 * 255 / eps))
        row.append(magnified.resize(row[0].size, Image.Resampling.NEAREST))
        # Rounding the size of the resized image may change its height by a pixel.
        rows.append([image.resize(row[0].size) for image in row])
    return sheet([TRUTH, *columns, f"last change x {127.5 / eps:g}"], rows, title)


def _to_image(values: Tensor) -> Image.Image:
    """Convert an image (3, H, W) with values in [0, 1]."""
    pixels = (values.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
