# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Plots of the suite: AP against trained parameters, and against images per class."""

from __future__ import annotations

from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from ..charts import as_svg
from .grid import ALL_SHOTS, OURS
from .methods import METHODS
from .report import Runs

SDPT, OTHERS = "#d62728", "#1f77b4"


def plots(results: dict[str, Any]) -> dict[str, str]:
    """Return the SVG of each plot by its file name."""
    runs = Runs(results)
    return {"transfer-parameters.svg": _parameters(runs), "transfer-shots.svg": _shots(runs)}


def _start(runs: Runs) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    axes.set(ylabel="AP in percent, mean of tasks")
    axes.grid(color="#eee")
    axes.set_axisbelow(True)
    floor = runs.over_tasks("zero-shot")
    if floor:
        axes.axhline(100 * mean(floor), color="#888", linestyle="--", linewidth=1, label="zero-shot")
    return figure, axes


def _parameters(runs: Runs) -> str:
    figure, axes = _start(runs)
    for name in runs.methods:
        values, trained = runs.over_tasks(name), runs.trained(name)
        if values and trained:
            value = 100 * mean(values)
            axes.plot([trained], [value], "o", color=SDPT if name.startswith("sdpt") else OTHERS)
            axes.annotate(
                METHODS[name].label, (trained, value), xytext=(5, 3), textcoords="offset points",
                fontweight="bold" if name == OURS else "normal", fontsize=8,
            )  # fmt: skip
    axes.set(xscale="log", xlabel="trained parameters")
    return as_svg(figure)


def _shots(runs: Runs) -> str:
    figure, axes = _start(runs)
    for name in runs.leaders or ():
        means = [runs.over_tasks(name, shots=count) for count in ALL_SHOTS]
        points = [(place, 100 * mean(values)) for place, values in enumerate(means) if values]
        width = 2.5 if name == OURS else 1.5
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", linewidth=width, label=METHODS[name].label)
    axes.set_xticks(range(len(ALL_SHOTS)), ["all" if count is None else str(count) for count in ALL_SHOTS])
    axes.set_xlabel("training images per class")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return as_svg(figure)
