# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The cells to measure: each is a base model, an image size, a prompt length and a task."""

from __future__ import annotations

from dataclasses import dataclass

# Height and width in pixels. The processors of Grounding DINO resize most photos to the second size.
SMALL, LARGE = (480, 640), (800, 1333)
SHORT, LONG = 32, 256  # text tokens; Grounding DINO takes at most 256
# The methods that the default run on a CPU measures in cells that take minutes per method.
FEW = ("host", "sdpt", "lora")

LABELS = {
    "grounding-dino-tiny": "Grounding DINO Tiny",
    "grounding-dino-base": "Grounding DINO Base",
    "mm-grounding-dino-tiny": "MM Grounding DINO Tiny",
    "grounding-dino-fusion": "Grounding DINO",
    "glip-l-fusion": "GLIP-L",
    "small-host": "small base model, 96x96, 40 class names",
}
# Tasks of cells without an image size and a prompt length.
SHAPELESS = ("attach", "epoch")


@dataclass(frozen=True)
class Cell:
    """A measurement of several methods, in one process.

    Attributes:
        host: Name of the base model, a key of `full_hosts.MODELS` or `full_hosts.FUSIONS`.
        task: "inference". "training" is a step with its optimizer for a model, and forward and backward for a fusion
            layer. "attach" makes an adapter. "epoch" is an epoch of training on the data of `epochs`.
        size: Height and width of the image in pixels.
        tokens: Number of text tokens.
        methods: Keys of `methods.METHODS`. None for all that suit the task.
    """

    host: str
    task: str
    size: tuple[int, int] = SMALL
    tokens: int = SHORT
    methods: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        shape = "" if self.task in SHAPELESS else f"-{self.size[0]}x{self.size[1]}-{self.tokens}"
        return f"{self.host}{shape}-{self.task}"

    @property
    def label(self) -> str:
        name = LABELS.get(self.host, self.host)
        return name if self.task in SHAPELESS else f"{name}, {self.size[0]}x{self.size[1]}, {self.tokens} tokens"

    @property
    def is_fusion(self) -> bool:
        return self.host.endswith("-fusion")


def everything() -> list[Cell]:
    """Return all cells, quick ones first."""
    shapes = [(size, tokens) for size in (SMALL, LARGE) for tokens in (SHORT, LONG)]
    tasks = ("inference", "training")
    cells = [Cell("grounding-dino-tiny", "attach"), Cell("small-host", "epoch")]
    cells += [Cell("grounding-dino-fusion", task, *shape) for task in tasks for shape in shapes]
    cells += [Cell("glip-l-fusion", task, LARGE, LONG) for task in tasks]
    models = ("grounding-dino-tiny", "mm-grounding-dino-tiny", "grounding-dino-base")
    cells += [Cell(model, task, *shape) for shape in shapes for model in models for task in tasks]
    return cells


def affordable() -> list[Cell]:
    """Return the cells that two CPU cores measure in about an hour. Larger sizes and models have only a few methods."""
    tiny = "grounding-dino-tiny"
    tasks = ("inference", "training")
    whole = {(tiny, task, SMALL, tokens) for task in tasks for tokens in (SHORT, LONG)}
    # A step of LoRA at the larger size needs about ten gigabytes.
    few = {(tiny, task, LARGE, tokens) for task in tasks for tokens in (SHORT, LONG)}
    few |= {(host, task, SMALL, SHORT) for task in tasks for host in ("mm-grounding-dino-tiny", "grounding-dino-base")}
    cells = []
    for cell in everything():
        place = (cell.host, cell.task, cell.size, cell.tokens)
        if cell.is_fusion or cell.task in SHAPELESS or place in whole:
            cells.append(cell)
        elif place in few:
            cells.append(Cell(*place, methods=FEW))
    return cells
