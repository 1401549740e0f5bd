# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Which runs the suite is made of. Some follow from the results of others: learning rates, and who leads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean
from typing import Any

from .inverses import RULES
from .methods import METHODS

SHOTS, FEWER = 10, (1, 5)  # pictures a class; None for all
ALL_SHOTS = (*FEWER, SHOTS, None)
STEPS, STEPS_OF_ALL = 100, 150  # few pictures, and all of them
LEADERS = 4
OURS = "sdpt-defaults"
# Compared at so many times the steps too.
LONGER, TIMES = (OURS, "text-embeddings", "lora", "full"), 3
# How soon a start gets anywhere: of ours, after parts of the usual number of steps.
STARTS: tuple[tuple[tuple[str, Any], ...], ...] = (
    (),
    (("init_weights", "uniform"),),
    (("init_weights", "prototypes"),),
)
PARTS = (0.25, 0.5, 1)
# Methods whose prompts are looked at before and after training.
DIAGNOSED = ("sdpt", OURS)
# Fields of SDPTConfig that are changed from its defaults, one at a time.
ABLATIONS: dict[str, tuple[Any, ...]] = {
    "num_virtual_tokens": (1, 5, 10, 50, 100),
    "layers_to_transform": ((0,), (1,), (2,)),
    "image_attends_prompts": (False,),
    "init_weights": ("uniform", "xavier_uniform", "kaiming_uniform", "zeros", "prototypes"),
}
ABLATION_TASKS = ("twemoji", "noto-new")
# Hosts of the same function that are harder to invert; at which rates, where a method has them, for a worse inverse may
# only want a smaller one; and what a method's inverse may be.
CONDITIONS = (30.0, 300.0)
CONDITION_RATES = (0.03, 0.1, 0.3)
TOLERANCES = tuple((("pinv_rtol", tolerance),) for tolerance in (0.03, 0.1))
INVERSES: dict[str, tuple[tuple[tuple[str, Any], ...], ...]] = {
    # Of itself it has the full one, as published.
    "sdpt": ((), *TOLERANCES, *((("inverse", rule),) for rule in RULES)),
    OURS: ((("pinv_rtol", None),), *TOLERANCES),
}


@dataclass(frozen=True)
class Cell:
    """One training run and its evaluation.

    Attributes:
        task: name of a `tasks.Task`.
        method: a key of `METHODS`, or "zero-shot".
        learning_rate: None where nothing trains.
        shots: images a class; None for all.
        seed: of the pictures drawn, their order and augmentation, and the start of what trains.
        split: "val" to choose by, "test" to report.
        fields: of SDPTConfig that are not at their defaults, as pairs.
        condition: None for the host as it is; else see `conditioning`.
        times: how many times the usual number of steps; less than 1 for a part of them.
    """

    task: str
    method: str
    learning_rate: float | None = None
    shots: int | None = SHOTS
    seed: int = 0
    split: str = "test"
    fields: tuple[tuple[str, Any], ...] = ()
    condition: float | None = None
    times: float = 1

    @property
    def steps(self) -> int:
        return round(self.times * (STEPS_OF_ALL if self.shots is None else STEPS))

    @property
    def key(self) -> str:
        changes = "".join(f" {name}={value}" for name, value in self.fields)
        if self.condition is not None:
            changes += f" condition={self.condition}"
        if self.times != 1:
            changes += f" {self.times} times the steps"
        if self.method == "zero-shot":
            return f"{self.task} zero-shot{changes} {self.split}"
        shots = "all" if self.shots is None else self.shots
        return f"{self.task} {self.method}{changes} {self.learning_rate} {shots} shots seed {self.seed} {self.split}"


Results = dict[str, dict[str, Any]]  # key of a cell -> what was measured


def rates_cells(task: str, methods: Iterable[str]) -> list[Cell]:
    """Each method at each of its rates, on one task, measured on the validation split."""
    return [Cell(task, name, rate, split="val") for name in methods for rate in METHODS[name].rates]


def best_rate(task: str, method: str, results: Results) -> float | None:
    """The rate of highest AP on the validation split; None before all have been measured."""
    cells = rates_cells(task, [method])
    if not all(cell.key in results for cell in cells):
        return None
    return max(cells, key=lambda cell: results[cell.key]["AP"]).learning_rate


def best_rates(task: str, methods: Iterable[str], results: Results) -> dict[str, float]:
    """Of the methods all of whose rates have been measured."""
    best = {name: best_rate(task, name, results) for name in methods}
    return {name: rate for name, rate in best.items() if rate is not None}


def compare_cells(tasks: list[str], rates: dict[str, float], seeds: int, shots: Iterable[int | None]) -> list[Cell]:
    return [
        Cell(task, name, rate, count, seed)
        for seed in range(seeds)
        for task in tasks
        for count in shots
        for name, rate in rates.items()
    ]


def leaders(tasks: list[str], rates: dict[str, float], results: Results) -> list[str] | None:
    """Ours and the best others, by AP over all tasks with the first seed; None before all have been measured."""
    found: dict[str, float] = {}
    for name, rate in rates.items():
        cells = compare_cells(tasks, {name: rate}, 1, [SHOTS])
        if not all(cell.key in results for cell in cells):
            return None
        found[name] = mean(results[cell.key]["AP"] for cell in cells)
    others = sorted(found.keys() - {OURS}, key=found.__getitem__, reverse=True)
    return [*found.keys() & {OURS}, *others][:LEADERS] or None


def ablation_tasks(tasks: list[str]) -> list[str]:
    """Those that settings are compared on: the ones that are meant for it, or the first."""
    return [task for task in ABLATION_TASKS if task in tasks] or tasks[:1]


def ablation_cells(tasks: list[str], rates: dict[str, float]) -> list[Cell]:
    """Ours with one thing changed, with the first seed; some starts have all, by `start_cells`."""
    return [
        Cell(task, OURS, rates[OURS], fields=((name, value),))
        for task in ablation_tasks(tasks)
        for name, values in ABLATIONS.items()
        for value in values
    ]


def condition_cells(tasks: list[str], methods: Iterable[str], seeds: int) -> list[Cell]:
    """SDPT with inverses that drop more or less, on hosts that differ in their projections alone.

    Rules that the config does not have, with the first seed at the highest rate alone.
    """
    task = ablation_tasks(tasks)[0]
    found = [
        Cell(task, method, rate, seed=seed, fields=inverse, condition=condition)
        for seed in range(seeds)
        for method in methods
        for condition in CONDITIONS
        for inverse in INVERSES.get(method, ())
        for rate in CONDITION_RATES
        if rate in METHODS[method].rates
        if "inverse" not in dict(inverse) or (seed == 0 and rate == max(CONDITION_RATES))
    ]
    # That they are the same hosts.
    return [Cell(task, "zero-shot", shots=0, condition=condition) for condition in CONDITIONS if found] + found


def longer_cells(tasks: list[str], rates: dict[str, float]) -> list[Cell]:
    """Whether those that lose only take longer, with the first seed."""
    return [
        Cell(task, name, rates[name], times=TIMES) for task in ablation_tasks(tasks) for name in LONGER if name in rates
    ]


def start_cells(tasks: list[str], rates: dict[str, float], seeds: int) -> list[Cell]:
    """Whether another start gets somewhere sooner, with the first seed; and, with all, whether it ends elsewhere."""
    return [
        Cell(task, OURS, rates[OURS], seed=seed, fields=start, times=part)
        for seed in range(seeds)
        for task in ablation_tasks(tasks)
        for start in STARTS
        for part in PARTS
        if seed == 0 or part == 1
    ]


def is_diagnosed(cell: Cell) -> bool:
    """Whether prompts are looked at before and after training."""
    usual = cell.shots == SHOTS and cell.times == 1 and cell.split == "test" and not cell.fields
    return usual and cell.method in DIAGNOSED


def plan(tasks: list[str], methods: list[str], seeds: int, results: Results) -> list[Cell]:
    """All cells that are known by now, in the order in which to measure them.

    Args:
        tasks: names; rates are chosen on the first.
        methods: keys of `METHODS`.
        seeds: how many.
        results: of cells measured so far.
    """
    cells = [Cell(task, "zero-shot", shots=0) for task in tasks]
    cells += rates_cells(tasks[0], methods)
    rates = best_rates(tasks[0], methods, results)
    if len(rates) < len(methods):
        return cells
    cells += compare_cells(tasks, rates, seeds, [SHOTS])
    cells += condition_cells(tasks, methods, seeds)
    if OURS in rates:
        cells += ablation_cells(tasks, rates)
        cells += start_cells(tasks, rates, seeds)
    cells += longer_cells(tasks, rates)
    first = leaders(tasks, rates, results)
    if first is not None:
        leading = {name: rates[name] for name in first}
        cells += compare_cells(tasks, leading, seeds, FEWER)
        # Which pictures there are is not by chance: the first seed.
        cells += compare_cells(tasks, leading, 1, [None])
    # A whole picture with one seed, before the next.
    return sorted({cell.key: cell for cell in cells}.values(), key=lambda cell: cell.seed)
