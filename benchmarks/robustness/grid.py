# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The runs of the comparison, and those from which its settings were chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# The built-in tasks of the table. Settings are tried on the first one.
TASKS = ("twemoji", "noto-new")
# Steps of training with all images of a task, as in `benchmarks.transfer`, unless a cell has more.
STEPS = 150
# The learning rates that `benchmarks.transfer` chose for clean training.
RATES = {
    "gated": 0.3,
    "gated-lora": 0.003,
    "gated-more": 0.3,
    "gated-windows": 0.3,
    "vpt": 0.3,
    "lora": 0.003,
    "full": 0.0001,
}
# The distances of the attacks, of 255. The models train against the second one.
DISTANCES = (1, 2, 4, 8)
EPS = 2
# The base model without training.
BASE_MODEL = "zero-shot"


@dataclass(frozen=True)
class Cell:
    """One training run and the measurement of its robustness.

    Attributes:
        task: Name of a task of `benchmarks.transfer`.
        method: A key of `METHODS` in `methods.py`, or "zero-shot".
        adversarial: "none", or a way of adversarial training.
        seed: Seed of the order and augmentation of the images, the initial values and the attacks.
        split: "val" for choosing, "test" for reporting.
        rate: Learning rate. None for that of `RATES`.
        weight: Weight of the attacked images in the loss.
        eps: Distance of the attacked images, of 255.
        attack_steps: Steps of the attack, or replays. None for the default of `STEPS` in `adversarial.py`.
        loss: Loss of the attack. None for "features" with a bank, and "all" otherwise.
        steps: Number of training steps.
        augmentation: Whether images are augmented. A bank needs images that are not.
    """

    task: str
    method: str
    adversarial: str = "none"
    seed: int = 0
    split: str = "test"
    rate: float | None = None
    weight: float = 1.0
    eps: float = EPS
    attack_steps: int | None = None
    loss: str | None = None
    steps: int = STEPS
    augmentation: bool = True

    @property
    def key(self) -> str:
        changes = [
            f"{name} {value}"
            for name, value, default in (
                ("rate", self.rate, None),
                ("weight", self.weight, 1.0),
                ("eps", self.eps, EPS),
                ("attack steps", self.attack_steps, None),
                ("loss", self.loss, None),
                ("steps", self.steps, STEPS),
                ("augmentation", self.augmentation, True),
            )
            if value != default
        ]
        return " ".join([self.task, self.method, self.adversarial, *changes, f"seed {self.seed}", self.split])


# The rows of the table, as fields of `Cell`.
COMPARED: tuple[dict[str, Any], ...] = (
    {"method": "gated", "adversarial": "none"},
    {"method": "gated", "adversarial": "fast"},
    {"method": "gated", "adversarial": "fast", "weight": 0.5},
    {"method": "gated", "adversarial": "pgd"},
    {"method": "gated", "adversarial": "free"},
    {"method": "gated", "adversarial": "none", "augmentation": False},
    {"method": "gated", "adversarial": "bank", "augmentation": False},
    {"method": "gated-lora", "adversarial": "fast"},
    {"method": "lora", "adversarial": "none"},
    {"method": "lora", "adversarial": "fast"},
    {"method": "full", "adversarial": "fast"},
)
# The runs that are measured with all attacks. The other attacks take four times as long as the rest of a run.
WITH_ALL_ATTACKS = (
    Cell(TASKS[0], BASE_MODEL),
    Cell(TASKS[0], "gated", "none"),
    Cell(TASKS[0], "gated", "fast"),
)


# Settings that were tried with the first seed, on the validation split of the first task: fields of `Cell`.
TRIED: tuple[dict[str, Any], ...] = (
    {"method": "gated", "adversarial": "none"},
    *({"method": "gated", "adversarial": "fast", "rate": rate} for rate in (0.1, None, 1.0)),
    {"method": "gated", "adversarial": "fast", "weight": 0.5},
    *({"method": "gated", "adversarial": "fast", "eps": eps} for eps in (1.0, 4.0)),
    {"method": "gated", "adversarial": "fast", "loss": "class"},
    {"method": "gated", "adversarial": "fast", "steps": 3 * STEPS},
    {"method": "gated", "adversarial": "pgd"},
    *({"method": "gated", "adversarial": "free", "attack_steps": steps} for steps in (2, None)),
    {"method": "gated", "adversarial": "free", "rate": 0.1},
    {"method": "gated", "adversarial": "free", "weight": 0.5},
    {"method": "gated", "adversarial": "free", "steps": 3 * STEPS},
    {"method": "gated", "adversarial": "none", "augmentation": False},
    {"method": "gated", "adversarial": "bank", "augmentation": False},
    {"method": "gated", "adversarial": "bank", "augmentation": False, "eps": 8.0},
    {"method": "gated", "adversarial": "bank", "augmentation": False, "loss": "all"},
    {"method": "gated-more", "adversarial": "fast"},
    {"method": "gated-windows", "adversarial": "fast"},
    {"method": "vpt", "adversarial": "fast"},
    {"method": "gated-lora", "adversarial": "fast"},
    {"method": "lora", "adversarial": "none"},
    *({"method": "lora", "adversarial": "fast", "rate": rate} for rate in (0.001, None, 0.01)),
    {"method": "full", "adversarial": "none"},
    *({"method": "full", "adversarial": "fast", "rate": rate} for rate in (None, 0.0003)),
)


def tried(task: str) -> list[Cell]:
    """Plan the runs with the settings that were tried."""
    return [Cell(task, split="val", **fields) for fields in TRIED]


def plan(tasks: Iterable[str], seeds: int) -> list[Cell]:
    """Plan all runs, in the order to measure them: row after row of the table, then what was tried."""
    tasks = list(tasks)
    cells = [Cell(task, BASE_MODEL) for task in tasks]
    for fields in COMPARED:
        cells += [Cell(task, seed=seed, **fields) for seed in range(seeds) for task in tasks]
    return cells + tried(tasks[0])
