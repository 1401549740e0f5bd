# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Results of the suite in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

from ..results import table
from .grid import (
    ABLATIONS,
    ALL_SHOTS,
    CONDITION_RATES,
    CONDITIONS,
    DIAGNOSED,
    FEWER,
    INVERSES,
    LONGER,
    LONGER_ON_ALL,
    LORA_TASKS,
    PARTS,
    SHOTS,
    STARTS,
    STEPS,
    TIMES,
    TRIED,
    TRIED_WITH_LORA,
    UNGATED,
    Cell,
    Settings,
    ablation_tasks,
    best_rates,
    leaders,
    plan,
    rates_cells,
    retention_tasks,
)
from .methods import METHODS
from .retention import NUM_IMAGES, NUM_NAMES, SCALES
from .tasks import DIFFERENCES

Results = dict[str, Any]


class Runs:
    """Look-up of results by task, method and setting."""

    def __init__(self, results: Results) -> None:
        self.cells = results["cells"]
        self.tasks: list[str] = results["tasks"]
        self.seeds: int = results["seeds"]
        self.methods: list[str] = results["methods"]
        self.retention: bool = results.get("retention", False)
        self.retention_tasks = retention_tasks(self.tasks)
        self.rates = best_rates(self.tasks[0], self.methods, self.cells)
        self.leaders = leaders(self.tasks, self.rates, self.cells)

    def values(self, task: str, method: str, metric: str = "AP", **which: Any) -> list[float]:
        """One value for each measured seed. `which` is passed to `cells_of`."""
        return [cell[metric] for cell in self.cells_of(task, method, **which)]

    def cells_of(
        self, task: str, method: str, shots: int | None = SHOTS, rate: float | None = None, fields: tuple = (),
        condition: float | None = None, times: float = 1, seeds: int | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Results of all measured seeds, or of the first `seeds` of them."""
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
        """Mean over all tasks, for each seed that was measured on all of them."""
        of_tasks = [self.cells_of(task, method, shots=shots) for task in self.tasks]
        by_seed = [{cell["seed"]: cell[metric] for cell in cells} for cells in of_tasks]
        return [mean(task[seed] for task in by_seed) for seed in by_seed[0] if all(seed in task for task in by_seed)]

    def retained(self, task: str, method: str) -> dict[str, Any] | None:
        """Results of the run that measured the names that the base model knew. None if there is none."""
        cell = Cell(task, method, shots=0) if method == "zero-shot" else Cell(task, method, self.rates.get(method))
        measured = [self.cells.get(each.key, {}) for each in (cell, replace(cell, retention=True))]
        return next((each for each in measured if each.get("known") is not None), None)

    def retained_on_all(self, method: str) -> list[dict[str, Any]] | None:
        """`retained` of each of `retention_tasks`. None before all are measured."""
        cells = [self.retained(task, method) for task in self.retention_tasks]
        return None if None in cells else [cell for cell in cells if cell is not None]

    def trained(self, method: str) -> int | None:
        """Number of trained parameters on the first task."""
        return next((cell["trained"] for cell in self.cells_of(self.tasks[0], method)), None)


# For each value that `diagnose` returns: the heading of its column, and how a value is printed.
_PROMPT_MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "image_tokens": ("norm of image tokens", "{:.1f}".format),
    "image_prompts": ("norm of image prompts", "{:.1f}".format),
    "text_tokens": ("norm of text tokens", "{:.1f}".format),
    "text_prompts": ("norm of text prompts", "{:.1f}".format),
    "image_attention": ("image attention on prompts", "{:.1%}".format),
    "text_attention": ("text attention on prompts", "{:.1%}".format),
    "gradient": ("gradient norm", "{:.4f}".format),
    "unreached": ("unreachable share", "{:.0%}".format),
}


# Rules of `inverses` that `SDPTConfig` does not offer.
_INVERSE_LABELS = {
    "inverse=0.1 of images alone": "pinv_rtol=0.1 for image projections only",
    "inverse=0.1 of text alone": "pinv_rtol=0.1 for text projections only",
    "inverse=ridge 0.1": "ridge, 0.1",
    "inverse=scaled": "scaled",
    "inverse=quiet start": "full, with small initial prompts",
}


def spread(values: list[float]) -> str:
    """Return the mean in percent, with the standard deviation if there are several values."""
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
        if not any(runs.values(task, name) for task in runs.tasks):
            continue
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
    return table(["method", "trained parameters", "learning rate", *runs.tasks, "mean"], rows)


def _retention(runs: Runs) -> str:
    """Return a table of AP on some tasks, and on known names after tuning to each."""
    rows = []
    for name in ("zero-shot", *runs.methods):
        if name != "zero-shot" and METHODS[name].fixed_names:
            continue
        cells = [runs.retained(task, name) for task in runs.retention_tasks]
        if any(cells):
            label = "zero-shot" if name == "zero-shot" else METHODS[name].label
            pairs = [[] if cell is None else [cell["AP"], cell["known"]] for cell in cells]
            rows.append([label, *(text for pair in pairs for text in (map(spread, zip(pair)) if pair else ("", "")))])
    heads = [head for task in runs.retention_tasks for head in (task, f"known names after {task}")]
    return table(["method", *heads], rows)


def _scales(runs: Runs) -> str:
    """Return a table of mean AP on tasks and on known names with scaled gates, for the methods that have gates."""
    rows = []
    for name in runs.methods:
        cells = runs.retained_on_all(name) or [{}]
        if all("scaled" in cell for cell in cells):
            pairs = [[cell["scaled"][str(scale)] for cell in cells] for scale in SCALES]
            pairs.append([(cell["AP"], cell["known"]) for cell in cells])
            means = [mean(values) for measured in pairs for values in zip(*measured, strict=True)]
            rows.append([METHODS[name].label, *(spread([value]) for value in means)])
    heads = [f"{what}, scale {scale:g}" for scale in (*SCALES, 1) for what in ("tasks", "known names")]
    return table(["method", *heads], rows) if rows else ""


def _shots(runs: Runs) -> str:
    names = [name for name in runs.methods if name in (runs.leaders or []) or runs.over_tasks(name, shots=FEWER[0])]
    if not names:
        return "Not yet.\n"
    rows = []
    for task in runs.tasks:
        for name in names:
            rows.append(
                [task, METHODS[name].label, *(spread(runs.values(task, name, shots=count)) for count in ALL_SHOTS)]
            )
    for name in names:
        means = [spread(runs.over_tasks(name, shots=count)) for count in ALL_SHOTS]
        rows.append(["**mean**", METHODS[name].label, *map(_bold, means)])
    return table(["task", "method", *("all" if c is None else f"{c} per class" for c in ALL_SHOTS)], rows)


def _ablations(runs: Runs) -> str:
    tasks = ablation_tasks(runs.tasks)
    rows = [
        ["defaults", "", *(spread(runs.values(task, UNGATED)) for task in tasks)],
        # Settings that were run with this seed alone are compared with this row.
        ["defaults, seed 0", "", *(spread(runs.values(task, UNGATED, seeds=1)) for task in tasks)],
    ]
    for name, values in ABLATIONS.items():
        for value in values:
            fields = ((name, value),)
            text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            rows.append([f"`{name}`", text, *(spread(runs.values(task, UNGATED, fields=fields)) for task in tasks)])
    return table(["setting", "value", *tasks], rows)


def _tried(runs: Runs, settings: Settings, tasks: list[str]) -> str:
    """Return a table of the settings of gated prompts that were tried, the best first."""
    rows = []
    for method, rate, fields in settings:
        cells = [Cell(task, method, rate, split="val", fields=fields) for task in tasks]
        values = [runs.cells[cell.key]["AP"] if cell.key in runs.cells else None for cell in cells]
        if any(value is not None for value in values) and method in runs.methods:
            known = [value for value in values if value is not None]
            total = mean(known) if len(known) == len(values) else None
            label = ", ".join(f"{name}: {_short(value)}" for name, value in fields) or "defaults"
            texts = ["" if value is None else spread([value]) for value in values]
            row = [METHODS[method].label, f"{rate}", label, *texts, _bold("" if total is None else spread([total]))]
            rows.append((total or 0, row))
    rows.sort(key=lambda row: -row[0])
    return table(["method", "learning rate", "setting", *tasks, "mean"], [row for _, row in rows])


def _short(value: Any) -> str:
    return f"{len(value)} of {value[0]}" if isinstance(value, tuple) else f"{value}"


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
                rows.append([host, METHODS[method].label, _INVERSE_LABELS.get(rule, rule), *map(spread, values)])
    return table(
        ["condition number", "method", "inverse", *(f"learning rate {rate}" for rate in CONDITION_RATES)], rows
    )


def _rates(runs: Runs) -> str:
    """Return a table of the AP of each method at each learning rate on the validation split. The best rate is bold."""
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
    rows = []
    for name in (*LONGER_ON_ALL, *LONGER):
        if name in runs.rates:
            measured = [[spread(runs.values(task, name, times=n, seeds=1)) for n in (1, TIMES)] for task in runs.tasks]
            rows.append([METHODS[name].label, *(f"{short} → {long}" if long else "" for short, long in measured)])
    return table(["method", *runs.tasks], rows)


def _starts(runs: Runs) -> str:
    tasks = ablation_tasks(runs.tasks)
    rows = []
    for start in STARTS:
        measured = [runs.values(task, UNGATED, fields=start, times=part, seeds=1) for task in tasks for part in PARTS]
        rows.append([dict(start).get("init_weights", "normal (default)"), *map(spread, measured)])
    return table(["`init_weights`", *(f"{task}, {round(n * STEPS)} steps" for task in tasks for n in PARTS)], rows)


def _prompts(runs: Runs) -> str:
    """Return a table of values before and after training for each fusion layer, as means over seeds."""
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
    """Return the number of planned runs without a result."""
    planned = plan(
        results["tasks"], results["methods"], results["seeds"], results["cells"], results.get("retention", False)
    )
    return sum(cell.key not in results["cells"] for cell in planned)


def _retention_parts(runs: Runs) -> list[str]:
    if not runs.retention:
        return []
    parts = [
        f"### Names that the base model knew, {SHOTS} images per class, seed 0: AP after tuning\n",
        f"AP on the tasks {' and '.join(runs.retention_tasks)}, and after each on {NUM_IMAGES} scenes with {NUM_NAMES} "
        "names of the pre-training that no task uses. These scenes look as in pre-training. Methods that replace the "
        "class names of a task cannot detect other names.\n",
        _retention(runs),
        "![AP on tasks and on known names](transfer-retention.svg)\n",
    ]
    if scales := _scales(runs):
        parts += [
            "Means of both tasks with `set_scale`. The scale 0 is the base model, and 1 is the adapter.\n",
            scales,
        ]
    return parts


def report(results: Results) -> str:
    """Return the whole report in Markdown."""
    runs, about = Runs(results), results["machine"]
    tasks = [[name, DIFFERENCES.get(name, "")] for name in runs.tasks]
    left = missing(results)
    devices = Counter(cell["on"] for cell in runs.cells.values())
    count = f"{len(runs.cells)} runs"
    if devices:
        count += f" ({', '.join(f'{number} on {name}' for name, number in devices.items())})"
    parts = [
        f"Base model `{about['host']}`, torch {about['torch']}, transformers {about['transformers']}, "
        f"peft {about['peft']}, peft_sdpt {about['peft_sdpt']}. {count}"
        + (f"; {left} more are known to be missing.\n" if left else ".\n"),
        table(["task", "what differs from pre-training"], tasks),
        "Values with ± are the mean and the sample standard deviation over seeds. Values without ± come from one seed. "
        "The column `mean` averages all tasks over the seeds that all of them have.\n",
        f"### {SHOTS} images per class: AP\n",
        _comparison(runs, "AP"),
        f"### {SHOTS} images per class: AP50\n",
        _comparison(runs, "AP50"),
        "![AP and trained parameters](transfer-parameters.svg)\n",
        *_retention_parts(runs),
        "### Few and many images: AP\n",
        _shots(runs),
        "![AP and images per class](transfer-shots.svg)\n",
        "### Settings of gated prompts that were tried, 10 images per class, seed 0: AP on validation splits\n",
        _tried(runs, TRIED, runs.tasks),
        "These settings have LoRA. The learning rate is that of LoRA, and tokens and gates have 0.3.\n",
        _tried(runs, TRIED_WITH_LORA, [task for task in runs.tasks if task in LORA_TASKS]),
        f"### Settings of SDPT without gates, {SHOTS} images per class: AP\n",
        _ablations(runs),
        f"### Inverses on ill-conditioned base models, {SHOTS} images per class: "
        f"AP on {ablation_tasks(runs.tasks)[0]}\n",
        _conditions(runs),
        f"### More steps, {SHOTS} images per class, seed 0: AP after {STEPS} and {TIMES * STEPS} steps\n",
        _longer(runs),
        f"### Initial tokens without gates, {SHOTS} images per class, seed 0: AP\n",
        _starts(runs),
        f"### Learning rates, {SHOTS} images per class: AP on the validation split of {runs.tasks[0]}\n",
        _rates(runs),
        "### Norms, attention and gradients of the prompts\n",
        _prompts(runs),
    ]
    return "\n".join(parts)
