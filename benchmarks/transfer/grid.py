# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The runs of the suite. Some depend on the results of others: learning rates, and the leading methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from .gate_rules import RULES as GATE_RULES
from .inverses import RULES
from .methods import METHODS

SHOTS, FEWER = 10, (1, 5)  # images per class; None for all
ALL_SHOTS = (*FEWER, SHOTS, None)
STEPS, STEPS_OF_ALL = 100, 150  # with few images, and with all of them
LEADERS = 4
OURS = "gated"
# SDPT without gates, which were added later. Its settings were compared before.
UNGATED = "sdpt-defaults"
# Methods that are also compared with this many times the steps: on all tasks, and on `ABLATION_TASKS`.
TIMES = 3
LONGER_ON_ALL, LONGER = (OURS, "gated-lora", "lora", "full"), (UNGATED, "text-embeddings")
# Initializations of SDPT that are compared after fractions of the usual number of steps.
STARTS: tuple[tuple[tuple[str, Any], ...], ...] = (
    (),
    (("init_weights", "uniform"),),
    (("init_weights", "prototypes"),),
)
PARTS = (0.25, 0.5, 1)
# Methods whose prompts are measured before and after training.
DIAGNOSED = ("sdpt", UNGATED)
# Fields of SDPTConfig that are changed from the settings of `UNGATED`, one at a time.
ABLATIONS: dict[str, tuple[Any, ...]] = {
    "num_virtual_tokens": (1, 5, 10, 50, 100),
    "layers_to_transform": ((0,), (1,), (2,)),
    "image_attends_prompts": (False,),
    "init_weights": ("uniform", "xavier_uniform", "kaiming_uniform", "zeros", "prototypes"),
}
# The method, its learning rate and its changed fields.
Settings = tuple[tuple[str, float, tuple[tuple[str, Any], ...]], ...]
# Settings of gated prompts that were tried before the defaults were chosen, on the validation splits of all tasks.
TRIED: Settings = (
    (OURS, 0.3, ()),
    *((OURS, 0.3, (("std of initial tokens", std),)) for std in (0.5, 1.0, 2.0)),
    *((OURS, rate, (("std of initial tokens", 1.0),)) for rate in (0.1, 1.0)),
    *((OURS, 0.3, (("gate", rule), ("std of initial tokens", 1.0))) for rule in GATE_RULES),
    *(
        (OURS, 0.3, (("prompt_groups", sizes), ("std of initial tokens", 1.0)))
        for sizes in ((10, 10), (5,) * 4, (1,) * 20)
    ),
    (OURS, 0.3, (("prompt_dropout", 0.1), ("std of initial tokens", 1.0))),
    ("gated-more", 0.3, ()),
    ("gated-more", 0.3, (("std of initial tokens", 1.0),)),
    ("gated-more", 0.3, (("gate", "bounded by 3"), ("std of initial tokens", 1.0))),
    (OURS, 0.3, (("tokens in", "encoder and decoder"),)),
)
# The same with LoRA, on fewer tasks to save time.
TRIED_WITH_LORA: Settings = (
    ("gated-lora", 0.01, ()),
    ("gated-lora", 0.003, ()),
    *(
        ("gated-lora", rate, (("LoRA in", place), ("lora_rank", rank), ("num_virtual_tokens", tokens), *others))
        for place, rank, tokens, rate, *others in (
            ("attention and feed-forward", 3, 20, 0.003),
            ("attention and feed-forward", 1, 20, 0.01),
            ("attention", 8, 20, 0.003),
            ("attention", 8, 20, 0.003, ("std of initial tokens", 1.0)),
            ("attention", 3, 80, 0.003),
            ("attention", 2, 20, 0.01),
            ("attention", 2, 20, 0.01, ("std of initial tokens", 1.0)),
            ("attention", 1, 38, 0.01),
            ("encoder's image layers", 1, 40, 0.01),
        )
    ),
)
LORA_TASKS = ("twemoji-line-art", "noto-new", "bccd")
ABLATION_TASKS = ("twemoji", "noto-new")
# After tuning to these tasks, the names that the base model knew are measured: one of drawings, one of photographs.
RETENTION_TASKS = ("twemoji", "bccd")
# Condition numbers for base models that compute the same but are harder to invert. The learning rates to try on them,
# if a method has them, because a worse inverse may only need a smaller rate. And the inverses to try for each method.
CONDITIONS = (30.0, 300.0)
CONDITION_RATES = (0.03, 0.1, 0.3)
TOLERANCES = tuple((("pinv_rtol", tolerance),) for tolerance in (0.03, 0.1))
INVERSES: dict[str, tuple[tuple[tuple[str, Any], ...], ...]] = {
    # () is the full inverse, as published.
    "sdpt": ((), *TOLERANCES, *((("inverse", rule),) for rule in RULES)),
    UNGATED: ((("pinv_rtol", None),), *TOLERANCES),
}


@dataclass(frozen=True)
class Cell:
    """One training run and its evaluation.

    Attributes:
        task: Name of a `tasks.Task`.
        method: A key of `METHODS`, or "zero-shot".
        learning_rate: Learning rate. None if nothing trains.
        shots: Number of images per class. None for all.
        seed: Seed of the choice of images, their order and augmentation, and the initial values.
        split: "val" for choosing, "test" for reporting.
        fields: Fields of `SDPTConfig` that do not have their defaults, as pairs.
        condition: Condition number, see `conditioning`. None for the unchanged base model.
        times: Factor for the usual number of steps.
        retention: Whether this repeats a run from the time when runs did not measure names that the base model knew.
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
    retention: bool = False

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
        if self.retention:
            changes += " retention"
        if self.method == "zero-shot":
            return f"{self.task} zero-shot{changes} {self.split}"
        shots = "all" if self.shots is None else self.shots
        return f"{self.task} {self.method}{changes} {self.learning_rate} {shots} shots seed {self.seed} {self.split}"


Results = dict[str, dict[str, Any]]  # maps the key of a cell to its results


def rates_cells(task: str, methods: Iterable[str]) -> list[Cell]:
    """Plan runs of each method with each of its learning rates, on one task, measured on the validation split."""
    return [Cell(task, name, rate, split="val") for name in methods for rate in METHODS[name].rates]


def best_rate(task: str, method: str, results: Results) -> float | None:
    """Return the learning rate with the highest AP on the validation split. None before all have been measured."""
    cells = rates_cells(task, [method])
    if not all(cell.key in results for cell in cells):
        return None
    return max(cells, key=lambda cell: results[cell.key]["AP"]).learning_rate


def best_rates(task: str, methods: Iterable[str], results: Results) -> dict[str, float]:
    """Return the best learning rates of the methods whose rates have all been measured."""
    best = {name: best_rate(task, name, results) for name in methods}
    return {name: rate for name, rate in best.items() if rate is not None}


def compare_cells(tasks: list[str], rates: dict[str, float], seeds: int, shots: Iterable[int | None]) -> list[Cell]:
    """Plan runs of methods with their learning rates, on several tasks and with several seeds and numbers of images."""
    return [
        Cell(task, name, rate, count, seed)
        for seed in range(seeds)
        for task in tasks
        for count in shots
        for name, rate in rates.items()
    ]


def leaders(tasks: list[str], rates: dict[str, float], results: Results) -> list[str] | None:
    """Return SDPT and the best other methods, by AP with the first seed. None before all are measured."""
    scores: dict[str, float] = {}
    for name, rate in rates.items():
        cells = compare_cells(tasks, {name: rate}, 1, [SHOTS])
        if not all(cell.key in results for cell in cells):
            return None
        scores[name] = mean(results[cell.key]["AP"] for cell in cells)
    others = sorted(scores.keys() - {OURS}, key=scores.__getitem__, reverse=True)
    return [*scores.keys() & {OURS}, *others][:LEADERS] or None


def ablation_tasks(tasks: list[str]) -> list[str]:
    """Return the tasks for comparing settings: those in `ABLATION_TASKS`, or else the first task."""
    return [task for task in ABLATION_TASKS if task in tasks] or tasks[:1]


def retention_tasks(tasks: list[str]) -> list[str]:
    """Return the tasks in `RETENTION_TASKS`."""
    return [task for task in tasks if task in RETENTION_TASKS]


def ablation_cells(tasks: list[str], rates: dict[str, float]) -> list[Cell]:
    """Plan runs without gates with one setting changed and the first seed. `start_cells` has some with all seeds."""
    return [
        Cell(task, UNGATED, rates[UNGATED], fields=((name, value),))
        for task in ablation_tasks(tasks)
        for name, values in ABLATIONS.items()
        for value in values
    ]


def condition_cells(tasks: list[str], methods: Iterable[str], seeds: int) -> list[Cell]:
    """Plan runs of SDPT with several inverses, on base models that differ only in the condition of their projections.

    Inverses that the config cannot select have only the first seed and the highest learning rate.
    """
    task = ablation_tasks(tasks)[0]
    cells = [
        Cell(task, method, rate, seed=seed, fields=inverse, condition=condition)
        for seed in range(seeds)
        for method in methods
        for condition in CONDITIONS
        for inverse in INVERSES.get(method, ())
        for rate in CONDITION_RATES
        if rate in METHODS[method].rates
        if "inverse" not in dict(inverse) or (seed == 0 and rate == max(CONDITION_RATES))
    ]
    # The zero-shot results show that the base models compute the same.
    return [Cell(task, "zero-shot", shots=0, condition=condition) for condition in CONDITIONS if cells] + cells


def longer_cells(tasks: list[str], rates: dict[str, float]) -> list[Cell]:
    """Plan runs with more steps, with the first seed, to see whether the weaker methods only need more steps."""
    return [
        Cell(task, name, rates[name], times=TIMES)
        for names, where in ((LONGER_ON_ALL, tasks), (LONGER, ablation_tasks(tasks)))
        for task in where
        for name in names
        if name in rates
    ]


def start_cells(tasks: list[str], rates: dict[str, float], seeds: int) -> list[Cell]:
    """Plan runs without gates with other initializations: fewer steps with one seed, and all steps with all seeds."""
    return [
        Cell(task, UNGATED, rates[UNGATED], seed=seed, fields=start, times=part)
        for seed in range(seeds)
        for task in ablation_tasks(tasks)
        for start in STARTS
        for part in PARTS
        if seed == 0 or part == 1
    ]


def tried_cells(tasks: list[str], methods: Iterable[str]) -> list[Cell]:
    """Plan runs of gated prompts with the settings that were tried, with the first seed, on validation splits."""
    with_lora = [task for task in tasks if task in LORA_TASKS]
    return [
        Cell(task, method, rate, split="val", fields=fields)
        for settings, where in ((TRIED, tasks), (TRIED_WITH_LORA, with_lora))
        for method, rate, fields in settings
        if method in methods
        for task in where
    ]


def is_main(cell: Cell) -> bool:
    """Return whether a run belongs to the main table, or to the choice of learning rates."""
    changed = bool(cell.fields) or cell.condition is not None or cell.times != 1 or cell.retention
    return not changed and (cell.shots == SHOTS or cell.method == "zero-shot")


def is_diagnosed(cell: Cell) -> bool:
    """Return whether a run measures its prompts before and after training."""
    usual = cell.shots == SHOTS and cell.times == 1 and cell.split == "test" and not cell.fields
    return usual and cell.method in DIAGNOSED and not cell.retention


def measures_known(cell: Cell) -> bool:
    """Return whether a run also measures names that the base model knew before."""
    usual = cell.times == 1 and cell.split == "test" and not cell.fields and cell.condition is None
    # With the first seed and on few tasks, to save time.
    usual = usual and cell.seed == 0 and bool(retention_tasks([cell.task]))
    return usual and (cell.shots == SHOTS or cell.method == "zero-shot")


def retention_cells(cells: Iterable[Cell], results: Results) -> list[Cell]:
    """Plan to repeat the runs that should have measured known names, but are from an earlier version of the suite."""
    return [
        replace(cell, retention=True)
        for cell in cells
        if measures_known(cell) and not cell.retention
        if "known" not in results.get(cell.key, {"known": None})
        if cell.method == "zero-shot" or not METHODS[cell.method].fixed_names
    ]


def plan(tasks: list[str], methods: list[str], seeds: int, results: Results, retention: bool = False) -> list[Cell]:
    """Plan all runs that the results so far allow, in the order to measure them.

    Args:
        tasks: Names of the tasks. Learning rates are chosen on the first one.
        methods: Keys of `METHODS`.
        seeds: Number of seeds.
        results: Results of the runs so far.
        retention: Whether runs measure names that the base model knew before.
    """
    cells = [Cell(task, "zero-shot", shots=0) for task in tasks]
    cells += rates_cells(tasks[0], methods)
    rates = best_rates(tasks[0], methods, results)
    if len(rates) < len(methods):
        return cells
    cells += compare_cells(tasks, rates, seeds, [SHOTS])
    cells += tried_cells(tasks, methods)
    cells += condition_cells(tasks, methods, seeds)
    if UNGATED in rates:
        cells += ablation_cells(tasks, rates)
        cells += start_cells(tasks, rates, seeds)
    cells += longer_cells(tasks, rates)
    first = leaders(tasks, rates, results)
    if first is not None:
        leading = {name: rates[name] for name in first}
        cells += compare_cells(tasks, leading, seeds, FEWER)
        # Only the first seed, because no images are drawn.
        cells += compare_cells(tasks, leading, 1, [None])
    if retention:
        cells += retention_cells(cells, results)
    # The main table first. Then all runs with one seed before the next seed, so that early reports are complete.
    return sorted({cell.key: cell for cell in cells}.values(), key=lambda cell: (not is_main(cell), cell.seed))
