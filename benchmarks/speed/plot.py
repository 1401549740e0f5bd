# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A plot of results, with a row for each cell, and a dot and a line between quartiles for each method."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from ..charts import as_svg
from .methods import METHODS, suitable
from .report import TABLES, memory_ratio, ratios, select

COLOURS = {
    "sdpt": "#d62728",
    "sdpt-eager": "#ff9896",
    "sdpt-gated": "#ff7f0e",
    "released": "#8c564b",
    "lora": "#1f77b4",
    "ia3": "#17a0b0",
    "bitfit": "#2ca02c",
    "vpt": "#9467bd",
    "full": "#7f7f7f",
    "host": "#000000",
}
LOWEST, HIGHEST = 0.1, 10.0  # limits of the logarithmic axis; values beyond them are drawn at its ends
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)
ROW_INCHES = 0.24


def draw(results: dict[str, Any]) -> str:
    """Return an SVG of time and peak memory, as ratios to the method in the heading of the rows."""
    rows: list[tuple[str, dict[str, Any] | None, tuple[str, ...], str]] = []
    for title, is_fusion, task, reference in TABLES:
        cells = select(results, is_fusion, task)
        if cells:
            rows.append((f"{title}: {METHODS[reference].label} = 1", None, (), reference))
            rows += [(cell["label"], cell["methods"], suitable(task, is_fusion), reference) for cell in cells]
    figure = Figure(figsize=(11, 1.2 + ROW_INCHES * len(rows)))
    time, memory = figure.subplots(1, 2, sharey=True)
    named = {}

    def within(ratio: float) -> float:
        return min(max(ratio, LOWEST), HIGHEST)

    for place, (_, methods, names, reference) in enumerate(rows):
        # SDPT is drawn last, on top of the others.
        for name in sorted(names, key=lambda name: name == "sdpt"):
            if methods is None or name not in methods or name == reference:
                continue
            low, median, high = map(within, ratios(methods, name, reference))
            style = {"color": COLOURS[name], "zorder": 3}
            time.plot([low, high], [place, place], linewidth=2, **style)
            (named[name],) = time.plot([median], [place], "o", markersize=5, label=METHODS[name].label, **style)
            memory.plot([within(memory_ratio(methods, name, reference))], [place], "o", markersize=5, **style)
    for axes, title in ((time, "time"), (memory, "peak memory")):
        axes.set(title=title, xscale="log", xlim=(LOWEST * 0.9, HIGHEST * 1.1), xticks=TICKS)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axvline(1, color="#888", linewidth=1)
        axes.grid(color="#eee")
        axes.set_axisbelow(True)
    time.set_yticks(range(len(rows)), [label for label, *_ in rows])
    time.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    for label, (_, methods, *_) in zip(time.get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if methods else "bold")
    figure.legend(
        handles=[named[name] for name in COLOURS if name in named], loc="upper center", ncols=9, frameon=False
    )
    return as_svg(figure)
