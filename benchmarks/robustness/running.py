# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""One run: training with or without attacks, and AP after several attacks."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoProcessor

from peft_sdpt.detection.adversarial import Views, make_views
from peft_sdpt.detection.attacks import Attack
from peft_sdpt.detection.data import DetectionSplit
from peft_sdpt.detection.loss import GroundedDetectionLoss
from peft_sdpt.detection.metrics import average_precision
from peft_sdpt.detection.robustness import Adversary, Change, RandomSigns, detect_changed
from peft_sdpt.detection.samples import TrainingSamples
from peft_sdpt.training import trained_parameters

from ..transfer.one_text import text_computed_once
from ..transfer.running import load_host
from ..transfer.tasks import Task
from ..transfer.tuning import Diverged, tune
from .grid import BASE_MODEL, DISTANCES, EPS, RATES, WITH_ALL_ATTACKS, Cell
from .methods import METHODS

# Number of steps of PGD for the table, and for choosing settings on a validation split.
ATTACK_STEPS = {"test": 20, "val": 10}
# Images of a split that are attacked, and images per batch on a CPU and on a GPU.
NUM_IMAGES = 64
BATCH_SIZES = {"cpu": 16, "cuda": 64}


def run_cell(cell: Cell, task: Task, model_name: str, device: str, num_images: int = NUM_IMAGES) -> dict[str, Any]:
    """Train and measure a cell.

    Args:
        cell: The cell.
        task: Its task.
        model_name: Folder or Hub id of the base model.
        device: "cpu" or "cuda".
        num_images: Number of images to measure on.

    Returns:
        `clean`, the AP without attack; `pgd`, which maps distances to AP; `images`, their number. If something trains,
        also `trained`, the number of trained parameters, and `losses` and `seconds` of training. For
        `WITH_ALL_ATTACKS`, also `transfer`, `features` and `vanish`, which map distances to AP, and `signs`, the AP
        after random signs. A run whose loss is not finite any more has an AP of 0, and `diverged`, the step.
    """
    processor = AutoProcessor.from_pretrained(model_name)
    model = load_host(model_name, device)
    result: dict[str, Any] = {}
    if cell.method != BASE_MODEL:
        data = task.load("train")
        method = METHODS[cell.method]
        torch.manual_seed(cell.seed)
        model = method.attach(model, processor, data.class_names, {})
        result["trained"] = sum(parameter.numel() for parameter in trained_parameters(model).values())
        rate = RATES[cell.method] if cell.rate is None else cell.rate
        try:
            with tempfile.TemporaryDirectory() as folder, text_computed_once(model):
                result |= tune(
                    model,
                    processor,
                    data,
                    steps=cell.steps,
                    learning_rate=rate,
                    seed=cell.seed,
                    prompts=method.prompts,
                    prompt_rate=method.rate_of_tokens(rate),
                    device=device,
                    augmentation=cell.augmentation,
                    views=prepare_views(cell, model, processor, data, device, folder),
                )
        except Diverged as error:
            return {**result, "clean": 0.0, "pgd": {str(EPS): 0.0}, "images": num_images, "diverged": error.args[0]}
    held_out = task.load(cell.split)
    held_out = held_out.subset(list(range(min(num_images, len(held_out)))))
    base_model = load_host(model_name, device)
    with text_computed_once(model), text_computed_once(base_model):
        steps, all_attacks = ATTACK_STEPS[cell.split], cell in WITH_ALL_ATTACKS
        return result | measure(model, base_model, processor, held_out, device, steps, all_attacks)


def prepare_views(
    cell: Cell, model: nn.Module, processor: Any, data: DetectionSplit, device: str, folder: str
) -> Views:
    """Return what the steps of a cell train on. A bank is made now, in the folder."""
    views = make_views(
        cell.adversarial,
        model,
        GroundedDetectionLoss(model.config),
        processor.image_processor,
        eps=cell.eps / 255,
        steps=cell.attack_steps,
        loss=cell.loss,
        weight=cell.weight,
        seed=cell.seed,
        folder=folder,
    )
    samples = TrainingSamples(data, len(data), processor, model.config.max_text_len, cell.seed, augmentation=False)
    views.prepare(samples, BATCH_SIZES[device], Accelerator(cpu=device == "cpu"))
    return views


def measure(
    model: nn.Module,
    base_model: nn.Module,
    processor: Any,
    data: DetectionSplit,
    device: str,
    steps: int,
    all_attacks: bool,
) -> dict[str, Any]:
    """Measure AP after attacks with this many steps; see `run_cell`."""

    def precision(change: Change | None) -> float:
        (rows,) = detect_changed(model, processor, data, change, BATCH_SIZES[device])
        return average_precision(data, rows)["AP"]

    def after(distance: float, loss: str = "all", attacked: nn.Module | None = None) -> float:
        attack = Attack(eps=distance / 255, steps=steps, loss=loss)
        return precision(Adversary(model, processor, data, attack, attacked=attacked))

    distances = DISTANCES if all_attacks else (EPS,)
    result = {
        "clean": precision(None),
        "pgd": {str(distance): after(distance) for distance in distances},
        "images": len(data),
    }
    if all_attacks:
        result["signs"] = precision(RandomSigns(processor, EPS / 255))
        result["transfer"] = {str(EPS): after(EPS, attacked=base_model)}
        result["features"] = {str(distance): after(distance, "features") for distance in (EPS, max(DISTANCES))}
        result["vanish"] = {str(EPS): after(EPS, "vanish")}
    return result
