# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Results as a picture, drawn as SVG: a row a cell, a dot a method, a line between its quartiles."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from .methods import METHODS, suitable
from .report import TABLES, memory_ratio, ratios, select

COLOURS = {
    "host": "#000000",
    "sdpt": "#d62728",
    "sdpt-eager": "#ff9896",
    "released": "#8c564b",
    "lora": "#1f77b4",
    "ia3": "#17a0b0",
    "bitfit": "#2ca02c",
    "vpt": "#9467bd",
    "full": "#7f7f7f",
}
LOWEST, HIGHEST = 0.1, 10.0  # of the axis, which is logarithmic
TICKS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
LABEL_WIDTH, PANEL_WIDTH, GAP, ROW, TOP = 310, 330, 30, 22, 78
WIDTH = LABEL_WIDTH + 2 * PANEL_WIDTH + GAP + 20
MEMORY_LEFT = LABEL_WIDTH + PANEL_WIDTH + GAP


def _place(ratio: float, left: float) -> float:
    share = math.log(min(max(ratio, LOWEST), HIGHEST) / LOWEST) / math.log(HIGHEST / LOWEST)
    return left + share * PANEL_WIDTH


def _text(x: float, y: float, words: str, anchor: str = "start", weight: str = "normal", colour: str = "#222") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-weight="{weight}" fill="{colour}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def draw(results: dict[str, Any]) -> str:
    """An SVG: time on the left, peak memory on the right, both as ratios to the method of the row's heading."""
    marks, y = [], TOP
    for title, is_fusion, task, reference in TABLES:
        cells = select(results, is_fusion, task)
        if not cells:
            continue
        marks.append(_text(8, y + 14, f"{title}: {METHODS[reference].label} = 1", weight="bold"))
        y += ROW
        for cell in cells:
            middle = y + ROW / 2
            marks.append(_text(16, middle + 4, cell["label"]))
            for left in (LABEL_WIDTH, MEMORY_LEFT):
                marks.append(_line(left, middle, left + PANEL_WIDTH, middle, "#e4e4e4"))
            # SDPT last, on top of the others.
            names = [name for name in suitable(task, is_fusion) if name in cell["methods"] and name != reference]
            for name in sorted(names, key=lambda name: name == "sdpt"):
                low, median, high = ratios(cell["methods"], name, reference)
                x, colour = _place(median, LABEL_WIDTH), COLOURS[name]
                marks.append(_line(_place(low, LABEL_WIDTH), middle, _place(high, LABEL_WIDTH), middle, colour, 2.5))
                memory = _place(memory_ratio(cell["methods"], name, reference), MEMORY_LEFT)
                marks += [
                    f'<circle cx="{place:.1f}" cy="{middle:.1f}" r="4.5" fill="{colour}"/>' for place in (x, memory)
                ]
            y += ROW
        y += ROW / 2
    frame = []
    for left, title in ((LABEL_WIDTH, "time"), (MEMORY_LEFT, "peak memory")):
        frame.append(_text(left + PANEL_WIDTH / 2, TOP - 26, title, "middle", "bold"))
        for tick in TICKS:
            x = _place(tick, left)
            frame.append(_line(x, TOP - 6, x, y, "#888" if tick == 1 else "#eee"))
            frame.append(_text(x, TOP - 10, f"{tick:g}", "middle", colour="#666"))
    shown = {name for cell in results["cells"].values() for name in cell["methods"]}
    x = 8.0
    for name in (name for name in METHODS if name in shown & COLOURS.keys() - {"host"}):
        frame.append(f'<circle cx="{x + 5:.1f}" cy="20" r="4.5" fill="{COLOURS[name]}"/>')
        frame.append(_text(x + 14, 24, METHODS[name].label))
        x += 32 + 6.6 * len(METHODS[name].label)
    height = y + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(frame + marks) + "\n</svg>\n"
    )
