# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""One run of the suite: a fresh base model with a method attached, training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from peft_sdpt import initialize_sdpt_prototypes
from peft_sdpt.detection.data import DetectionSplit, few_shot
from peft_sdpt.detection.loss import GroundedDetectionLoss
from peft_sdpt.detection.metrics import average_precision
from peft_sdpt.detection.prediction import detect_split
from peft_sdpt.detection.saved_adapter import set_image_size
from peft_sdpt.errors import InputError
from peft_sdpt.training import trained_parameters

from .conditioning import make_ill_conditioned
from .diagnosis import diagnose
from .grid import Cell, is_diagnosed, measures_known
from .methods import METHODS
from .one_text import text_computed_once
from .retention import at_scales, has_known_names, known_split
from .tasks import Task
from .tuning import BATCH, Diverged, batches, moved, tune

EVAL_BATCH_SIZE = 16
PROTOTYPE_BATCHES = 4
DIAGNOSED_BATCHES = 2
NO_DETECTIONS = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}


def run_cell(cell: Cell, task: Task, model_name: str, device: str) -> dict[str, Any]:
    """Train and measure a cell.

    Returns:
        `AP`, `AP50` and `AP75`. If something trains, also `trained`, the number of trained parameters, `losses` of each
        step, `seconds` of training and `pictures`, the number of images. For some runs of SDPT, `start` and `end`, the
        results of `diagnose` before and after training. For runs that measure the names that the base model knew,
        `known`, the AP on them, or None if the method only knows the names of the task; and if SDPT has gates,
        `scaled`, which maps the scale of the gates to the AP of the task and that on known names. A run whose loss is
        not finite any more has an AP of 0, and `diverged`, the step.
    """
    processor = AutoProcessor.from_pretrained(model_name)
    if task.image_size:
        set_image_size(processor, task.image_size)
    model = load_host(model_name, device)
    if cell.condition is not None:
        make_ill_conditioned(model, cell.condition)
    result: dict[str, Any] = {}
    keeps_names = cell.method == "zero-shot" or not METHODS[cell.method].fixed_names
    known = measures_known(cell) and has_known_names(model_name)
    nothing = {**NO_DETECTIONS, **({"known": 0.0 if keeps_names else None} if known else {})}
    if cell.method != "zero-shot":
        data = task.load("train")
        if cell.shots is not None:
            data = data.subset(few_shot(data, cell.shots, cell.seed))
        method = METHODS[cell.method]
        torch.manual_seed(cell.seed)
        model = method.attach(model, processor, data.class_names, dict(cell.fields))
        if ("init_weights", "prototypes") in cell.fields:
            initialize_sdpt_prototypes(model, batches(processor, model, data, BATCH * PROTOTYPE_BATCHES, cell.seed))
        if method.start:
            method.start(model, _on_device(batches(processor, model, data, len(data), cell.seed), device))
        result["pictures"] = len(data)
        result["trained"] = sum(parameter.numel() for parameter in trained_parameters(model).values())
        diagnosed = is_diagnosed(cell)
        try:
            with text_computed_once(model):
                if diagnosed:
                    result["start"] = _diagnose(model, processor, data, cell.seed, device)
                result |= tune(
                    model,
                    processor,
                    data,
                    steps=cell.steps,
                    learning_rate=cell.learning_rate,
                    seed=cell.seed,
                    prompts=method.prompts,
                    prompt_rate=method.rate_of_tokens(cell.learning_rate),
                    device=device,
                )
                if diagnosed:
                    result["end"] = _diagnose(model, processor, data, cell.seed, device)
        except Diverged as error:
            return {**result, **nothing, "diverged": error.args[0]}
    held_out = task.load(cell.split)
    try:
        result = {**_average_precision(model, processor, held_out, device), **result}
        if known and keeps_names:
            # As in pre-training, whatever the image size of the task.
            usual = AutoProcessor.from_pretrained(model_name)
            result["known"] = _average_precision(model, usual, known_split(), device)["AP"]
            scaled = at_scales(
                model,
                lambda: (
                    _average_precision(model, processor, held_out, device)["AP"],
                    _average_precision(model, usual, known_split(), device)["AP"],
                ),
            )
            result |= {"scaled": scaled} if scaled else {}
        elif known:
            result["known"] = None
    except InputError:  # the scores are not finite after the last step
        return {**result, **nothing, "diverged": cell.steps}
    return result


def _average_precision(model: nn.Module, processor: Any, data: DetectionSplit, device: str) -> dict[str, float]:
    """`average_precision` of a model on a split. Its text is computed for these names, not for those of training.

    Raises:
        InputError: The scores are not finite.
    """
    with text_computed_once(model):
        rows = detect_split(model, processor, data, EVAL_BATCH_SIZE, Accelerator(cpu=device == "cpu"))
    return average_precision(data, rows)


def _diagnose(model: nn.Module, processor: Any, data: DetectionSplit, seed: int, device: str) -> list[dict[str, float]]:
    """`diagnose` on a few batches of the training images."""
    some = batches(processor, model, data, BATCH * DIAGNOSED_BATCHES, seed)
    return diagnose(model, _on_device(some, device), GroundedDetectionLoss(model.config))


def _on_device(batches: Iterable[tuple[Any, list[Any]]], device: str) -> Iterator[tuple[Any, list[Any]]]:
    return ((moved(inputs, device), [moved(label, device) for label in labels]) for inputs, labels in batches)


def load_host(model_name: str, device: str) -> nn.Module:
    """Load the base model in float32 and freeze it."""
    model = AutoModelForZeroShotObjectDetection.from_pretrained(model_name, dtype=torch.float32)
    return model.requires_grad_(False).to(device)
