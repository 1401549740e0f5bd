# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Results in Markdown: a table of the aims, and tables of time, memory and size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..results import table
from .cells import everything
from .measuring import quartiles
from .methods import METHODS, suitable

# For each table: heading, whether it is about fusion layers, task, and the method that ratios refer to.
TABLES = (
    ("Fusion layer, inference", True, "inference", "host"),
    ("Fusion layer, forward and backward", True, "training", "host"),
    ("Whole model, inference", False, "inference", "host"),
    ("Whole model, training step", False, "training", "lora"),
)
NOT_YET = "TO BE MEASURED"

Results = dict[str, Any]


def ratios(methods: dict[str, Any], name: str, reference: str) -> tuple[float, float, float]:
    """Return quartiles of the ratio of a method's time to the time of `reference` in the same round."""
    pairs = zip(methods[name]["seconds"], methods[reference]["seconds"], strict=True)
    return quartiles([seconds / reference_seconds for seconds, reference_seconds in pairs])


def memory_ratio(methods: dict[str, Any], name: str, reference: str) -> float:
    return methods[name]["peak_bytes"] / methods[reference]["peak_bytes"]


def _beside_weights(methods: dict[str, Any]) -> float:
    """Return the ratio of the peak memory of SDPT and LoRA, without the weights and optimizer states."""
    ours, lora = (methods[name]["peak_bytes"] - methods[name]["held_bytes"] for name in ("sdpt", "lora"))
    return ours / lora


def select(results: Results, is_fusion: bool, task: str) -> list[dict[str, Any]]:
    """Return the cells of a table, in the order of the grid."""
    order = {cell.key: place for place, cell in enumerate(everything())}
    selected = [(key, cell) for key, cell in results["cells"].items()
             if cell["is_fusion"] == is_fusion and cell["task"] == task]  # fmt: skip
    return [cell for _, cell in sorted(selected, key=lambda item: order.get(item[0], len(order)))]


# ---- the aims


def _each(cells: Iterable[dict], value: Callable[[dict], float], bound: float, needed: tuple[str, ...]) -> tuple:
    """Return text and verdict for an aim that bounds a number of each cell."""
    values = [(cell["label"], value(cell["methods"])) for cell in cells if set(needed) <= cell["methods"].keys()]
    if not values:
        return NOT_YET, NOT_YET
    met = sum(number <= bound for _, number in values)
    text = "<br>".join(f"{label}: **{number:.2f}**" for label, number in values)
    return text, "yes" if met == len(values) else f"in {met} of {len(values)}" if met else "no"


def _added_time(cells: list[dict]) -> tuple[str, str]:
    """Time added to the base model. The aim is that SDPT adds at most a fifth of what the released algorithm adds."""
    cells = [cell for cell in cells if cell["host"] == "glip-l-fusion"]
    if not cells:
        return NOT_YET, NOT_YET
    lines, met = [], True
    for cell in cells:
        added = {}
        for name in ("released", "sdpt", "sdpt-eager"):
            rounds = zip(cell["methods"][name]["seconds"], cell["methods"]["host"]["seconds"], strict=True)
            added[name] = quartiles([seconds - base_seconds for seconds, base_seconds in rounds])[1]
        task = "inference" if cell["task"] == "inference" else "forward and backward"
        lines.append(
            f"{task}: the released algorithm adds **{_seconds(added['released'])}**, SDPT **{_seconds(added['sdpt'])}**"
            f" (eager {_seconds(added['sdpt-eager'])})"
        )
        met &= added["released"] > 0 and 5 * added["sdpt"] <= added["released"]
    return "<br>".join(lines), "yes" if met else "no"


def aims(results: Results) -> str:
    """Return a table with each aim and the measured values."""
    layers = {task: select(results, True, task) for task in ("inference", "training")}
    models = {task: select(results, False, task) for task in ("inference", "training")}
    attach = results["cells"].get("grounding-dino-tiny-attach")
    attached = quartiles(attach["methods"]["sdpt"]["seconds"])[1] if attach else None
    epochs = results["cells"].get("small-host-epoch")
    faster = 1 / ratios(epochs["methods"], "cached", "sdpt")[1] if epochs else None

    def to(reference: str) -> Callable[[dict], float]:
        return lambda methods: ratios(methods, "sdpt", reference)[1]

    rows = [
        ("fusion layer, inference: at most 0.9 of the base model's time",
         *_each(layers["inference"], to("host"), 0.9, ("sdpt", "host"))),
        ("fusion layer, forward and backward: at most 0.85 of the base model's time",
         *_each(layers["training"], to("host"), 0.85, ("sdpt", "host"))),
        ("whole model, inference: at most 1.0 of the base model's time",
         *_each(models["inference"], to("host"), 1.0, ("sdpt", "host"))),
        ("training step: at most 0.75 of LoRA's time",
         *_each(models["training"], to("lora"), 0.75, ("sdpt", "lora"))),
        ("training step: at most 0.7 of LoRA's peak memory",
         *_each(models["training"], lambda methods: memory_ratio(methods, "sdpt", "lora"), 0.7, ("sdpt", "lora"))),
        ("the same, without the weights that all methods share",
         *_each(models["training"], _beside_weights, 0.7, ("sdpt", "lora"))),
        ("GLIP-L's fusion layer: SDPT adds at most a fifth of the time that the released algorithm adds",
         *_added_time([*layers["inference"], *layers["training"]])),
        ("attaching to Grounding DINO Tiny: under 1 s",
         *((NOT_YET, NOT_YET) if attached is None else (f"**{attached:.2f} s**", "yes" if attached < 1 else "no"))),
        ("an epoch with cached features: at least 1.8 times faster than without",
         *((NOT_YET, NOT_YET) if faster is None
           else (f"{epochs['label']}: **{faster:.2f}**", "yes" if faster >= 1.8 else "no"))),
    ]  # fmt: skip
    return table(["aim", "measured (medians)", "met"], rows)


# ---- tables


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if abs(value) >= 1 else f"{value * 1e3:.{0 if abs(value) >= 0.1 else 1}f} ms"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.{2 if unit == 'GB' else 0}f} {unit}"
    return f"{value:.0f} B"


def _cell_tables(results: Results, is_fusion: bool, task: str, reference: str) -> str:
    cells = select(results, is_fusion, task)
    if not cells:
        return f"{NOT_YET}\n"
    names = [name for name in suitable(task, is_fusion) if any(name in cell["methods"] for cell in cells)]
    names = [reference] + [name for name in names if name != reference]
    times, memory = [], []
    for cell in cells:
        methods = cell["methods"]
        median = quartiles(methods[reference]["seconds"])[1]
        times.append([cell["label"], _seconds(median)])
        memory.append([cell["label"], _bytes(methods[reference]["peak_bytes"])])
        for name in names[1:]:
            if name not in methods:
                times[-1].append("")
                memory[-1].append("")
                continue
            low, middle, high = ratios(methods, name, reference)
            times[-1].append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
            memory[-1].append(f"{memory_ratio(methods, name, reference):.2f}")
    labels = [METHODS[name].label for name in names]
    head = ["time", f"{labels[0]}: median", *labels[1:]]
    peaks = ["peak memory", labels[0], *labels[1:]]
    return f"{table(head, times)}\n{table(peaks, memory)}"


def _sizetable(results: Results) -> str:
    cell = next((cell for cell in results["cells"].values()
                 if cell["host"] == "grounding-dino-tiny" and cell["task"] == "training"), None)  # fmt: skip
    attach = results["cells"].get("grounding-dino-tiny-attach", {"methods": {}})["methods"]
    rows = []
    for name, method in METHODS.items():
        if not method.trained:
            continue
        measured = cell["methods"].get(name) if cell else None
        trained = f"{measured['trained']:,}".replace(",", " ") if measured else NOT_YET
        attached = _seconds(quartiles(attach[name]["seconds"])[1]) if name in attach else ""
        on_disk = _bytes(measured["saved_bytes"]) if measured else NOT_YET
        rows.append([method.label, method.trains, trained, on_disk, attached])
    return table(["method", "what is trained", "parameters", "on disk", "time to attach"], rows)


def left_out(results: Results) -> str:
    """Return a list of the cells of the whole grid that have no results."""
    missing: dict[str, list[str]] = {}
    for cell in everything():
        key = cell.key
        names = suitable(cell.task, cell.is_fusion)
        measured = results["cells"].get(key, {"methods": {}})["methods"]
        absent = [METHODS[name].label for name in names if name not in measured]
        if absent:
            what = "all methods" if len(absent) == len(names) else ", ".join(absent)
            missing.setdefault(f"{cell.label}: {what}", []).append(cell.task)
    lines = [f"- {what} ({' and '.join(tasks)})." for what, tasks in missing.items()]
    return "\n".join(lines) + "\n" if lines else "Nothing.\n"


def machine(results: Results) -> str:
    about = results["machine"]
    threads = "" if about["device"] == "cuda" else f" with {about['threads']} threads"
    return (
        f"{about['name']}{threads}, {about['dtype']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"peft {about['peft']}, peft_sdpt {about['peft_sdpt']}; at least {about['repeats']} rounds per cell."
    )


def report(results: Results, plot: str) -> str:
    """Return the whole report in Markdown. `plot` is the path of the chart."""
    parts = [f"Measured on {machine(results)}\n", aims(results), f"![Time and peak memory as ratios]({plot})\n"]
    for title, is_fusion, task, reference in TABLES:
        parts += [f"### {title}\n", _cell_tables(results, is_fusion, task, reference)]
    parts += ["### Size\n", _sizetable(results), "### Not measured here\n", left_out(results)]
    return "\n".join(parts)
