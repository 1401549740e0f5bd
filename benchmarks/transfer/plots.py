# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of the suite: AP against trained parameters, and against images a class."""

from __future__ import annotations

from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from ..charts import as_svg
from .grid import ALL_SHOTS, OURS
from .methods import METHODS
from .report import Found

SDPT, OTHERS = "#d62728", "#1f77b4"


def pictures(results: dict[str, Any]) -> dict[str, str]:
    """File name and SVG of each picture."""
    found = Found(results)
    return {"transfer-parameters.svg": _parameters(found), "transfer-shots.svg": _shots(found)}


def _start(found: Found) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    axes.set(ylabel="AP in percent, mean of tasks")
    axes.grid(color="#eee")
    axes.set_axisbelow(True)
    floor = found.over_tasks("zero-shot")
    if floor:
        axes.axhline(100 * mean(floor), color="#888", linestyle="--", linewidth=1, label="zero-shot")
    return figure, axes


def _parameters(found: Found) -> str:
    figure, axes = _start(found)
    for name in found.methods:
        values, trained = found.over_tasks(name), found.trained(name)
        if values and trained:
            value = 100 * mean(values)
            axes.plot([trained], [value], "o", color=SDPT if name.startswith("sdpt") else OTHERS)
            axes.annotate(
                METHODS[name].label, (trained, value), xytext=(5, 3), textcoords="offset points",
                fontweight="bold" if name == OURS else "normal", fontsize=8,
            )  # fmt: skip
    axes.set(xscale="log", xlabel="trained parameters")
    return as_svg(figure)


def _shots(found: Found) -> str:
    figure, axes = _start(found)
    for name in found.leaders or ():
        means = [found.over_tasks(name, shots=count) for count in ALL_SHOTS]
        points = [(place, 100 * mean(values)) for place, values in enumerate(means) if values]
        width = 2.5 if name == OURS else 1.5
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", linewidth=width, label=METHODS[name].label)
    axes.set_xticks(range(len(ALL_SHOTS)), ["all" if count is None else str(count) for count in ALL_SHOTS])
    axes.set_xlabel("training images per class")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return as_svg(figure)
