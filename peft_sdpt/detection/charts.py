# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Charts of a training run: the loss, AP over time and per class, precision against recall, and the errors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..wording import shorten
from .analysis import DetectionError
from .grounding import clean_name

# Colours of "before" and "after", as in the plots of the benchmarks.
COLOURS = {"before": "#888888", "after": "#d62728"}
# Number of classes to show. More are cut to the best and the worst.
NUM_CLASSES = 20
# Colour of each kind of error, and the number of its errors to show.
ERRORS, NUM_ERRORS = {"confused": "#9467bd", "missed": "#1f77b4", "background": "#ff7f0e", "repeated": "#2ca02c"}, 4
# Properties of the names beside bars. A dollar sign in a name does not start a formula.
NAMES: dict[str, Any] = {"fontsize": 8, "parse_math": False}
# Longest name of a class beside a bar, in letters.
NAME_LENGTH = 24


def draw_report(record: dict[str, Any], file: Path) -> None:
    """Draw the results of a run as one picture.

    Args:
        record: Content of `metrics.json`, as `sdpt-train` writes it.
        file: Path of the PNG file.
    """
    # Imported here, because it is slow to import. A `Figure` without pyplot needs no display and keeps no state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained = bool(record["curves"]["loss"]["value"])
    validated = bool(record["curves"]["validation"])
    left = [*(["loss"] if trained else []), *(["validation"] if validated else []), "precision"]
    # Each column is cut into equally high parts; the chart of the classes is twice as high as that of the errors.
    height = 3 * len(left)
    mosaic: Any = [[left[i // 3], "classes" if i < 2 * len(left) else "errors"] for i in range(height)]
    figure = Figure(figsize=(11, max(6, 3 * len(left))), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic(mosaic)
    for name, each in axes.items():
        each.grid(axis="x" if name in ("classes", "errors") else "both", color="#eeeeee")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
        if name in ("loss", "validation", "errors"):
            each.xaxis.set_major_locator(MaxNLocator(integer=True))
    if trained:
        _loss(axes["loss"], record["curves"]["loss"])
    if validated:
        _validation(axes["validation"], record["curves"]["validation"], record["best"])
    _precision(axes["precision"], record["precision_recall"])
    _classes(axes["classes"], record["classes"])
    _errors(axes["errors"], record["errors"], record["at_threshold"]["threshold"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="png", metadata={"Software": None})


def worst_and_best(classes: dict[str, dict[str, Any]], number: int) -> tuple[list[str], list[str]]:
    """Choose the classes to show: all that occur, or as many of the worst as of the best.

    Args:
        classes: `classes` of `metrics.json`.
        number: Largest number of classes to show.

    Returns:
        The names of the classes to show, sorted by their AP, and those of the best among them that come after a gap.
        The second list is empty if all classes are shown.
    """
    occurring = [name for name, entry in classes.items() if entry["before"]]
    ordered = sorted(occurring, key=lambda name: (metrics_of(classes[name])["AP"], name))
    if len(ordered) <= number:
        return ordered, []
    return ordered[: number // 2] + ordered[-(number // 2) :], ordered[-(number // 2) :]


def metrics_of(entry: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a class after training, or before if nothing was trained."""
    return entry["after"] or entry["before"]


def describe_error(error: DetectionError) -> str:
    """Return an error in words."""
    return {
        "confused": "{true} called {predicted}",
        "missed": "{true} missed",
        "background": "{predicted} on no object",
        "repeated": "{true} found again",
    }[error["error"]].format(**error)


def most_frequent(errors: Sequence[DetectionError], number: int) -> dict[str, list[DetectionError]]:
    """Choose the errors to show: the most frequent ones of each kind that occurs, because most errors are of one kind.

    Args:
        errors: Errors, those with the highest count first.
        number: Largest number of errors of a kind.

    Returns:
        The errors of each kind.
    """
    kinds = {kind: [error for error in errors if error["error"] == kind][:number] for kind in ERRORS}
    return {kind: chosen for kind, chosen in kinds.items() if chosen}


def _loss(axes: Any, loss: dict[str, Sequence[float]]) -> None:
    axes.plot(loss["step"], loss["value"], color=COLOURS["after"], linewidth=1)
    axes.set(title="training loss", xlabel="step", ylim=(0, None))


def _validation(axes: Any, validation: list[dict[str, float]], best: dict[str, float] | None) -> None:
    steps = [each["step"] for each in validation]
    for name, style in (("AP50", ":"), ("AP", "-")):
        axes.plot(steps, [each[name] for each in validation], style, marker=".", color=COLOURS["after"], label=name)
    if best:
        axes.plot([best["step"]], [best["AP"]], "o", color="black", fillstyle="none", markersize=9, label="best")
    axes.set(title="AP on the validation split", xlabel="step", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)


def _precision(axes: Any, curves: dict[str, Sequence[float] | None]) -> None:
    for name, colour in COLOURS.items():
        if curves[name]:
            axes.plot(curves["recall"], curves[name], color=colour, label=name)
    axes.set(title="precision against recall at IoU 0.5, mean of the classes")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)


def _classes(axes: Any, classes: dict[str, dict[str, Any]]) -> None:
    shown, after_gap = worst_and_best(classes, NUM_CLASSES)
    # An empty row divides the worst from the best.
    places = [place + (name in after_gap) for place, name in enumerate(shown)]
    height = 0.4 if any(classes[name]["after"] for name in shown) else 0.8
    for offset, (when, colour) in zip((height / 2, -height / 2), COLOURS.items(), strict=True):
        values = [(place, classes[name][when]["AP"]) for place, name in zip(places, shown, strict=True)
                  if classes[name][when]]  # fmt: skip
        if values:
            axes.barh([place + offset * (height < 0.8) for place, _ in values], [value for _, value in values], height,
                      color=colour, label=when)  # fmt: skip
    axes.set_yticks(places, [shorten(clean_name(name), NAME_LENGTH) for name in shown], **NAMES)
    many = f" ({NUM_CLASSES // 2} best, {NUM_CLASSES // 2} worst)" if after_gap else ""
    axes.set(title=f"AP of each class{many}", xlim=(0, 1))
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _errors(axes: Any, errors: list[DetectionError], threshold: float) -> None:
    shown = [error for chosen in most_frequent(errors, NUM_ERRORS).values() for error in chosen][::-1]
    axes.barh(range(len(shown)), [error["count"] for error in shown], color=[ERRORS[error["error"]] for error in shown])
    labels = [shorten(clean_name(describe_error(error)), 2 * NAME_LENGTH) for error in shown]
    axes.set_yticks(range(len(shown)), labels, **NAMES)
    axes.set(title=f"most frequent errors at a score of at least {threshold:g}", xlabel="number")
    if not shown:
        axes.text(0.5, 0.5, "no errors", ha="center", va="center", transform=axes.transAxes)
