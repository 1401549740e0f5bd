# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The table of the comparison."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from ..results import table
from .grid import BASE_MODEL, DISTANCES, EPS, STEPS, Cell, plan
from .methods import METHODS

WAYS = {"none": "clean images", "bank": "bank (AdvPT)", "free": "free", "fast": "fast", "pgd": "PGD, 3 steps"}
HEAD = [
    "method",
    "trained on",
    "clean",
    *(f"PGD-20, {distance}/255" for distance in DISTANCES),
    f"transfer, {EPS}/255",
    f"features, {EPS}/255",
    f"features, {max(DISTANCES)}/255",
    f"vanish, {EPS}/255",
]


def report(cells: dict[str, dict[str, Any]]) -> str:
    """Return one table per task, with the mean and the standard deviation of AP over seeds, in percent."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells.values()))
    parts = []
    for task in tasks:
        rows = []
        for cell in plan([task], 1):
            group = [found for key, found in cells.items() if _is_of(found, cell)]
            if group:
                rows.append([*_names(cell), *_columns(group)])
        parts.append(f"**{task}**, {_seeds(task, cells)}\n\n" + table(HEAD, rows))
    return "\n".join(parts)


def _is_of(found: dict[str, Any], cell: Cell) -> bool:
    """Return whether a result is of this cell, with any seed."""
    return Cell(**{**_fields(found), "seed": cell.seed}) == cell


def _fields(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in Cell.__dataclass_fields__}


def _names(cell: Cell) -> tuple[str, str]:
    if cell.method == BASE_MODEL:
        return "base model", ""
    return METHODS[cell.method].label, WAYS[cell.adversarial]


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


def _seeds(task: str, cells: dict[str, dict[str, Any]]) -> str:
    seeds = {found["seed"] for found in cells.values() if found["task"] == task}
    devices = sorted({found["on"] for found in cells.values() if found["task"] == task})
    return f"up to {len(seeds)} seeds, {STEPS} steps, on {' and '.join(devices)}"


def cost_table(costs: dict[str, Any]) -> str:
    """Return the table of the times of a step."""
    ratios = {name: ratio for name, ratio in costs.items() if name != "on"}
    head = f"Time of a training step relative to one on clean images, on {costs['on']}:\n\n"
    return head + table(["trained on", "time"], ([name, f"{ratio:.2f}"] for name, ratio in ratios.items()))
