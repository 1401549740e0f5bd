# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What is measured: each cell is a host, an image size, a length of prompt and a task."""

from __future__ import annotations

from dataclasses import dataclass

# Height and width in pixels; the second is what the processors of Grounding DINO make of most photographs.
SMALL, LARGE = (480, 640), (800, 1333)
SHORT, LONG = 32, 256  # text tokens; 256 is the most that Grounding DINO takes
# Methods that the cells of the default run on a CPU which take minutes a method are limited to.
FEW = ("host", "sdpt", "lora")

LABELS = {
    "grounding-dino-tiny": "Grounding DINO Tiny",
    "grounding-dino-base": "Grounding DINO Base",
    "mm-grounding-dino-tiny": "MM Grounding DINO Tiny",
    "grounding-dino-fusion": "Grounding DINO",
    "glip-l-fusion": "GLIP-L",
    "small-host": "small base model, 96x96, 40 class names",
}
# Tasks of a cell that has no image size and no length of prompt of its own.
SHAPELESS = ("attach", "epoch")


@dataclass(frozen=True)
class Cell:
    """Measured in one process, all methods in turns.

    Attributes:
        host: a key of `full_hosts.MODELS` or `full_hosts.FUSIONS`.
        task: "inference"; "training", which is a step with its optimizer of a model, and forward and backward of a
            fusion layer; "attach", the making of an adapter; "epoch", an epoch of training on the data of `epochs`.
        size: of the image, in pixels.
        tokens: of the text.
        methods: keys of `methods.METHODS`; None for all that suit.
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
    """The whole grid, quick cells first."""
    shapes = [(size, tokens) for size in (SMALL, LARGE) for tokens in (SHORT, LONG)]
    tasks = ("inference", "training")
    cells = [Cell("grounding-dino-tiny", "attach"), Cell("small-host", "epoch")]
    cells += [Cell("grounding-dino-fusion", task, *shape) for task in tasks for shape in shapes]
    cells += [Cell("glip-l-fusion", task, LARGE, LONG) for task in tasks]
    models = ("grounding-dino-tiny", "mm-grounding-dino-tiny", "grounding-dino-base")
    cells += [Cell(model, task, *shape) for shape in shapes for model in models for task in tasks]
    return cells


def affordable() -> list[Cell]:
    """What a CPU of two cores measures in about an hour: whole models in full at one size, others with few methods."""
    tiny = "grounding-dino-tiny"
    tasks = ("inference", "training")
    whole = {(tiny, task, SMALL, tokens) for task in tasks for tokens in (SHORT, LONG)}
    # A step of LoRA's at the larger size holds about ten gigabytes.
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
