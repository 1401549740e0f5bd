# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The table of the comparison."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from ..results import table
from .grid import BASE_MODEL, DISTANCES, EPS, Cell, plan, tried
from .methods import METHODS

WAYS = {"none": "clean images", "bank": "bank (AdvPT)", "free": "free", "fast": "fast", "pgd": "PGD, 3 steps"}
HEAD = [
    "method",
    "trained on",
    "seeds",
    "clean",
    *(f"PGD-20, {distance}/255" for distance in DISTANCES),
    f"transfer, {EPS}/255",
    f"features, {EPS}/255",
    f"features, {max(DISTANCES)}/255",
    f"vanish, {EPS}/255",
]
# Columns of the settings that were tried.
CHOOSING = (1, 2, 4)
SHORT_HEAD = ["method", "trained on", "changed", "clean", *(f"PGD-10, {distance}/255" for distance in CHOOSING)]


def report(cells: dict[str, dict[str, Any]]) -> str:
    """Return the tables: one per task, with the mean and the standard deviation over seeds, and the settings tried."""
    parts = []
    for task in dict.fromkeys(found["task"] for found in cells.values()):
        rows = []
        for cell in plan([task], 1):
            group = [found for found in cells.values() if _is_of(found, cell)]
            if cell.split == "test" and group:
                rows.append([*_names(cell), str(len(group)), *_columns(group)])
        if rows:
            parts.append(f"**{task}**, AP in percent, {_circumstances(task, 'test', cells)}:\n\n{table(HEAD, rows)}")
        rows = [
            [*_names(cell), _changes(cell), *_short_columns(cells[cell.key])]
            for cell in tried(task)
            if cell.key in cells
        ]
        if rows:
            about = f"Settings tried on the validation split of {task}, {_circumstances(task, 'val', cells)}:"
            parts.append(f"{about}\n\n{table(SHORT_HEAD, rows)}")
    return "\n".join(parts)


def _is_of(found: dict[str, Any], cell: Cell) -> bool:
    """Return whether a result is of this cell, with any seed."""
    return Cell(**{**_fields(found), "seed": cell.seed}) == cell


def _fields(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in Cell.__dataclass_fields__}


def _names(cell: Cell) -> tuple[str, str]:
    if cell.method == BASE_MODEL:
        return "base model", ""
    plain = "" if cell.augmentation else ", no augmentation"
    return METHODS[cell.method].label, WAYS[cell.adversarial] + plain


def _columns(group: list[dict[str, Any]]) -> list[str]:
    def column(read: Any) -> str:
        values = [100 * read(found) for found in group]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        return f"{mean(values):.1f}{spread}"

    return [
        column(lambda found: found["clean"]),
        *(column(lambda found, d=distance: found["pgd"][str(d)]) for distance in DISTANCES),
        column(lambda found: found["transfer"][str(EPS)]),
        column(lambda found: found["features"][str(EPS)]),
        column(lambda found: found["features"][str(max(DISTANCES))]),
        column(lambda found: found["vanish"][str(EPS)]),
    ]


def _short_columns(found: dict[str, Any]) -> list[str]:
    values = [found["clean"], *(found["pgd"].get(str(distance)) for distance in CHOOSING)]
    return ["" if value is None else f"{100 * value:.1f}" for value in values]


def _changes(cell: Cell) -> str:
    """Return the settings of a cell that are not the usual ones."""
    usual = Cell(cell.task, cell.method, cell.adversarial, split=cell.split)
    names = {"rate": "learning rate", "attack_steps": "replays", "loss": "attack on"}
    return ", ".join(
        f"{names.get(name, name)} {value}"
        for name, value in _fields(vars(cell)).items()
        if value != getattr(usual, name) and name != "augmentation"
    )


def _circumstances(task: str, split: str, cells: dict[str, dict[str, Any]]) -> str:
    group = [found for found in cells.values() if (found["task"], found["split"]) == (task, split)]
    images = " and ".join(sorted({str(found["images"]) for found in group}))
    return f"{images} images, on {' and '.join(sorted({found['on'] for found in group}))}"


def cost_table(costs: dict[str, Any]) -> str:
    """Return the table of the times of a step."""
    ratios = {name: ratio for name, ratio in costs.items() if name != "on"}
    head = f"Time of a training step relative to one on clean images, on {costs['on']}:\n\n"
    return head + table(["trained on", "time"], ([name, f"{ratio:.2f}"] for name, ratio in ratios.items()))
