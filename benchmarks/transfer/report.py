# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Results of the suite in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from ..results import table
from .grid import (
    ABLATIONS,
    ALL_SHOTS,
    CONDITION_RATES,
    CONDITIONS,
    DIAGNOSED,
    INVERSES,
    LONGER,
    OURS,
    PARTS,
    SHOTS,
    STARTS,
    STEPS,
    TIMES,
    Cell,
    ablation_tasks,
    best_rates,
    leaders,
    plan,
    rates_cells,
)
from .methods import METHODS
from .tasks import DIFFERENCES

Results = dict[str, Any]


class Runs:
    """The results of the runs, for look-ups."""

    def __init__(self, results: Results) -> None:
        self.cells = results["cells"]
        self.tasks: list[str] = results["tasks"]
        self.seeds: int = results["seeds"]
        self.methods: list[str] = results["methods"]
        self.rates = best_rates(self.tasks[0], self.methods, self.cells)
        self.leaders = leaders(self.tasks, self.rates, self.cells)

    def values(self, task: str, method: str, metric: str = "AP", **which: Any) -> list[float]:
        """A metric for each seed that has been measured. `which` are arguments of `cells_of`."""
        return [cell[metric] for cell in self.cells_of(task, method, **which)]

    def cells_of(
        self, task: str, method: str, shots: int | None = SHOTS, rate: float | None = None, fields: tuple = (),
        condition: float | None = None, times: float = 1, seeds: int | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """The results for each seed that has been measured, or for the first `seeds` of them."""
        if method == "zero-shot":
            cells = [Cell(task, method, shots=0, condition=condition)]
        else:
            rate = rate or self.rates.get(method)
            cells = [
                Cell(task, method, rate, shots, seed, fields=fields, condition=condition, times=times)
                for seed in range(seeds or self.seeds)
            ]
        return [self.cells[cell.key] for cell in cells if cell.key in self.cells]

    def over_tasks(self, method: str, metric: str = "AP", shots: int | None = SHOTS) -> list[float]:
        """The mean over all tasks, for each seed that has been measured on all of them."""
        of_tasks = [self.cells_of(task, method, shots=shots) for task in self.tasks]
        by_seed = [{cell["seed"]: cell[metric] for cell in cells} for cells in of_tasks]
        return [mean(task[seed] for task in by_seed) for seed in by_seed[0] if all(seed in task for task in by_seed)]

    def trained(self, method: str) -> int | None:
        """Number of trained parameters on the first task."""
        return next((cell["trained"] for cell in self.cells_of(self.tasks[0], method)), None)


# For each measure of `diagnose`, its heading in the table and its format.
_PROMPT_MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "image_tokens": ("image tokens", "{:.1f}".format),
    "image_prompts": ("image prompts", "{:.1f}".format),
    "text_tokens": ("text tokens", "{:.1f}".format),
    "text_prompts": ("text prompts", "{:.1f}".format),
    "image_attention": ("attention of image", "{:.1%}".format),
    "text_attention": ("attention of text", "{:.1%}".format),
    "gradient": ("gradient", "{:.4f}".format),
    "unreached": ("out of reach", "{:.0%}".format),
}


def spread(values: list[float]) -> str:
    """The mean in percent and, for several values, the standard deviation."""
    if not values:
        return ""
    text = f"{100 * mean(values):.1f}"
    return f"{text} ± {100 * stdev(values):.1f}" if len(values) > 1 else text


def _bold(text: str) -> str:
    return text and f"**{text}**"


def _thousands(value: int | None) -> str:
    return "" if value is None else f"{value:,}".replace(",", " ")


def _comparison(runs: Runs, metric: str) -> str:
    rows = []
    for name in ("zero-shot", *runs.methods):
        trained = 0 if name == "zero-shot" else runs.trained(name)
        rows.append(
            [
                "zero-shot" if name == "zero-shot" else METHODS[name].label,
                _thousands(trained),
                "" if name == "zero-shot" else f"{runs.rates.get(name, '')}",
                *(spread(runs.values(task, name, metric)) for task in runs.tasks),
                _bold(spread(runs.over_tasks(name, metric))),
            ]
        )
    return table(["method", "trained", "rate", *runs.tasks, "mean"], rows)


def _shots(runs: Runs) -> str:
    if runs.leaders is None:
        return "Not yet.\n"
    rows = []
    for task in runs.tasks:
        for name in runs.leaders:
            rows.append(
                [task, METHODS[name].label, *(spread(runs.values(task, name, shots=count)) for count in ALL_SHOTS)]
            )
    for name in runs.leaders:
        means = [spread(runs.over_tasks(name, shots=count)) for count in ALL_SHOTS]
        rows.append(["**mean**", METHODS[name].label, *map(_bold, means)])
    return table(["task", "method", *("all" if c is None else f"{c} per class" for c in ALL_SHOTS)], rows)


def _ablations(runs: Runs) -> str:
    tasks = ablation_tasks(runs.tasks)
    rows = [
        ["defaults", "", *(spread(runs.values(task, OURS)) for task in tasks)],
        # For comparison with the settings that have only the first seed.
        ["defaults, first seed", "", *(spread(runs.values(task, OURS, seeds=1)) for task in tasks)],
    ]
    for name, values in ABLATIONS.items():
        for value in values:
            fields = ((name, value),)
            text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            rows.append([f"`{name}`", text, *(spread(runs.values(task, OURS, fields=fields)) for task in tasks)])
    return table(["setting", "value", *tasks], rows)


def _conditions(runs: Runs) -> str:
    task = ablation_tasks(runs.tasks)[0]
    rows = []
    for condition in CONDITIONS:
        host = f"{condition:g} times worse"
        floor = spread(runs.values(task, "zero-shot", condition=condition))
        rows.append([host, "zero-shot", "", *(floor for _ in CONDITION_RATES)])
        for method in (name for name in runs.methods if name in INVERSES):
            for inverse in INVERSES[method]:
                values = [
                    runs.values(task, method, rate=rate, fields=inverse, condition=condition)
                    for rate in CONDITION_RATES
                ]
                rule = " ".join(f"{name}={value}" for name, value in inverse) or "pinv_rtol=None"
                rows.append([host, METHODS[method].label, rule.removeprefix("inverse="), *map(spread, values)])
    return table(
        ["condition of the projections", "otherwise", "inverse", *(f"rate {rate}" for rate in CONDITION_RATES)], rows
    )


def _rates(runs: Runs) -> str:
    """AP of all methods with all learning rates on the validation split. The chosen rates are bold."""
    rates = sorted({rate for name in runs.methods for rate in METHODS[name].rates})
    rows = []
    for name in runs.methods:
        cells = [cell for cell in rates_cells(runs.tasks[0], [name]) if cell.key in runs.cells]
        texts = {cell.learning_rate: spread([runs.cells[cell.key]["AP"]]) for cell in cells}
        if name in runs.rates:
            texts[runs.rates[name]] = _bold(texts[runs.rates[name]])
        rows.append([METHODS[name].label, *(texts.get(rate, "") for rate in rates)])
    return table(["method", *map(str, rates)], rows)


def _longer(runs: Runs) -> str:
    tasks = ablation_tasks(runs.tasks)
    rows = []
    for name in LONGER:
        if name in runs.rates:
            measured = [runs.values(task, name, times=n, seeds=1) for task in tasks for n in (1, TIMES)]
            rows.append([METHODS[name].label, *map(spread, measured)])
    return table(["method", *(f"{task}, {n * STEPS} steps" for task in tasks for n in (1, TIMES))], rows)


def _starts(runs: Runs) -> str:
    tasks = ablation_tasks(runs.tasks)
    rows = []
    for start in STARTS:
        measured = [runs.values(task, OURS, fields=start, times=part, seeds=1) for task in tasks for part in PARTS]
        rows.append([dict(start).get("init_weights", "normal, the default"), *map(spread, measured)])
    return table(["`init_weights`", *(f"{task}, {round(n * STEPS)} steps" for task in tasks for n in PARTS)], rows)


def _prompts(runs: Runs) -> str:
    """Measures of the prompts in each fusion layer before and after training, means over seeds."""
    rows = []
    for task in ablation_tasks(runs.tasks):
        for method, condition in (*((name, None) for name in DIAGNOSED), *(("sdpt", worse) for worse in CONDITIONS)):
            cells = [cell for cell in runs.cells_of(task, method, condition=condition) if "end" in cell]
            label = METHODS[method].label + ("" if condition is None else f", condition {condition:g} times worse")
            for layer in range(len(cells[0]["end"]) if cells else 0):
                row = [task, label, f"{layer}"]
                for measure, (_, show) in _PROMPT_MEASURES.items():
                    start, end = (mean(cell[when][layer][measure] for cell in cells) for when in ("start", "end"))
                    row.append(f"{show(start)} → {show(end)}")
                rows.append(row)
    return table(["task", "method", "layer", *(head for head, _ in _PROMPT_MEASURES.values())], rows)


def missing(results: Results) -> int:
    """Number of runs in the plan that have not been made."""
    planned = plan(results["tasks"], results["methods"], results["seeds"], results["cells"])
    return sum(cell.key not in results["cells"] for cell in planned)


def report(results: Results) -> str:
    """The whole report in Markdown."""
    runs, about = Runs(results), results["machine"]
    tasks = [[name, DIFFERENCES.get(name, "")] for name in runs.tasks]
    left = missing(results)
    devices = Counter(cell["on"] for cell in runs.cells.values())
    count = f"{len(runs.cells)} runs"
    if devices:
        count += f" ({', '.join(f'{number} on {name}' for name, number in devices.items())})"
    parts = [
        f"Base model: {about['host']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"peft {about['peft']}, peft_sdpt {about['peft_sdpt']}. {count}"
        + (f"; {left} more are planned.\n" if left else ".\n"),
        table(["task", "what differs from pre-training"], tasks),
        "± is the standard deviation over seeds. Values without ± have one seed. Means are over the seeds that all "
        "tasks have.\n",
        f"### {SHOTS} images per class: AP\n",
        _comparison(runs, "AP"),
        f"### {SHOTS} images per class: AP50\n",
        _comparison(runs, "AP50"),
        "![AP and trained parameters](transfer-parameters.svg)\n",
        "### Few and many images: AP\n",
        _shots(runs),
        "![AP and images per class](transfer-shots.svg)\n",
        f"### Settings, {SHOTS} images per class: AP\n",
        _ablations(runs),
        f"### The inverse, {SHOTS} images per class: AP on {ablation_tasks(runs.tasks)[0]}\n",
        _conditions(runs),
        f"### More steps, {SHOTS} images per class, the first seed: AP\n",
        _longer(runs),
        f"### Initializations, {SHOTS} images per class, the first seed: AP\n",
        _starts(runs),
        f"### Learning rates, {SHOTS} images per class: AP on the validation split of {runs.tasks[0]}\n",
        _rates(runs),
        "### Measures of prompts\n",
        _prompts(runs),
    ]
    return "\n".join(parts)
