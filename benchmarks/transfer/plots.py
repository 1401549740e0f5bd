# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Plots of the suite: AP against trained parameters, against images per class, and against AP on known names."""

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
    drawn = {"transfer-parameters.svg": _parameters(runs), "transfer-shots.svg": _shots(runs)}
    return {**drawn, "transfer-retention.svg": _retention(runs)} if runs.retention else drawn


def _is_sdpt(name: str) -> bool:
    """Return whether a method has prompts of SDPT, and so the colour of these methods."""
    return name.startswith(("sdpt", "gated")) or name == "published-recipe"


def _start(runs: Runs, floor: bool = True) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    axes.set(ylabel="AP in percent, mean of tasks")
    axes.grid(color="#eee")
    axes.set_axisbelow(True)
    lowest = runs.over_tasks("zero-shot") if floor else []
    if lowest:
        axes.axhline(100 * mean(lowest), color="#888", linestyle="--", linewidth=1, label="zero-shot")
    return figure, axes


def _parameters(runs: Runs) -> str:
    figure, axes = _start(runs)
    for name in runs.methods:
        values, trained = runs.over_tasks(name), runs.trained(name)
        if values and trained:
            value = 100 * mean(values)
            _point(axes, name, trained, value)
    axes.set(xscale="log", xlabel="trained parameters")
    return as_svg(figure)


def _retention(runs: Runs) -> str:
    figure, axes = _start(runs, floor=False)
    for name in ("zero-shot", *runs.methods):
        cells = runs.retained_on_all(name)
        if cells:
            task, known = (100 * mean(cell[what] for cell in cells) for what in ("AP", "known"))
            _point(axes, name, known, task)
    axes.set_ylabel(f"AP in percent, mean of {' and '.join(runs.retention_tasks)}")
    axes.set_xlabel("AP in percent on names that the base model knew, mean after tuning to each of these tasks")
    return as_svg(figure)


def _point(axes: Any, name: str, x: float, y: float) -> None:
    """Draw a method as a point with its name."""
    zero_shot = name == "zero-shot"
    axes.plot([x], [y], "o", color="#888" if zero_shot else SDPT if _is_sdpt(name) else OTHERS)
    axes.annotate(
        name if zero_shot else METHODS[name].label, (x, y), xytext=(5, 3), textcoords="offset points",
        fontweight="bold" if name == OURS else "normal", fontsize=8,
    )  # fmt: skip


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
