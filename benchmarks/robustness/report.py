# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of the comparison."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from ..results import table
from .grid import BASE_MODEL, DISTANCES, EPS, Cell, plan, tried
from .methods import METHODS

WAYS = {"none": "clean images", "bank": "bank (AdvPT)", "free": "free", "fast": "fast", "pgd": "PGD, 3 steps"}
HEAD = ["method", "trained on", "trained parameters", "seeds", "clean", f"PGD-20, {EPS}/255"]
HEAD_OF_ALL_ATTACKS = [
    "method",
    "trained on",
    *(f"PGD-20, {distance}/255" for distance in DISTANCES),
    f"transfer, {EPS}/255",
    f"features, {EPS}/255",
    f"features, {max(DISTANCES)}/255",
    f"vanish, {EPS}/255",
]
HEAD_OF_TRIED = ["method", "trained on", "changed", "clean", f"PGD-10, {EPS}/255"]


def report(cells: dict[str, dict[str, Any]]) -> str:
    """Return the tables: for each task, one over seeds and one of all attacks, and then the settings tried."""
    parts = []
    for task in dict.fromkeys(found["task"] for found in cells.values()):
        rows, of_all_attacks = [], []
        for cell in plan([task], 1):
            group = [found for found in cells.values() if cell.split == "test" and _is_of(found, cell)]
            if group:
                rows.append([*_names(cell), _trained(group[0]), str(len(group)), *_columns(group)])
            of_all_attacks += [[*_names(cell), *_all_attacks(found)] for found in group if "transfer" in found]
        if rows:
            parts.append(f"**{task}**, AP in percent, {_circumstances(task, 'test', cells)}:\n\n{table(HEAD, rows)}")
        if of_all_attacks:
            parts.append(
                f"Other attacks on {task}, first seed, the same images:\n\n{table(HEAD_OF_ALL_ATTACKS, of_all_attacks)}"
            )
        rows = [
            [*_names(cell), _changes(cell), *_columns([cells[cell.key]])] for cell in tried(task) if cell.key in cells
        ]
        if rows:
            about = f"Settings tried on the validation split of {task}, {_circumstances(task, 'val', cells)}:"
            parts.append(f"{about}\n\n{table(HEAD_OF_TRIED, rows)}")
    return "\n".join(parts)


def _is_of(found: dict[str, Any], cell: Cell) -> bool:
    """Return whether a result is of this cell, with any seed."""
    return Cell(**{**_fields(found), "seed": cell.seed}) == cell


def _fields(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in Cell.__dataclass_fields__}


def _names(cell: Cell) -> tuple[str, str]:
    if cell.method == BASE_MODEL:
        return "base model", ""
    trained_on = WAYS[cell.adversarial]
    if cell.weight < 1 and cell.split == "test":
        trained_on += f", weight {cell.weight}"
    if not cell.augmentation:
        trained_on += ", no augmentation"
    return METHODS[cell.method].label, trained_on


def _trained(found: dict[str, Any]) -> str:
    return f"{found['trained']:,}".replace(",", " ") if "trained" in found else ""


def _columns(group: list[dict[str, Any]]) -> list[str]:
    def column(values: list[float]) -> str:
        spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * mean(values):.1f}{spread}"

    return [column([found["clean"] for found in group]), column([found["pgd"][str(EPS)] for found in group])]


def _all_attacks(found: dict[str, Any]) -> list[str]:
    values = [
        *(found["pgd"][str(distance)] for distance in DISTANCES),
        found["transfer"][str(EPS)],
        *(found["features"][str(distance)] for distance in (EPS, max(DISTANCES))),
        found["vanish"][str(EPS)],
    ]
    return [f"{100 * value:.1f}" for value in values]


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
