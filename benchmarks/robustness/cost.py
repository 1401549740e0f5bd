# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What a step of adversarial training costs, relative to a step on clean images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from statistics import median
from typing import Any

from accelerate import Accelerator
from transformers import AutoProcessor

from peft_sdpt.detection.adversarial import make_views
from peft_sdpt.detection.loss import GroundedDetectionLoss
from peft_sdpt.detection.samples import TrainingSamples
from peft_sdpt.training import trained_parameters

from ..speed.measuring import in_turns
from ..transfer.one_text import text_computed_once
from ..transfer.running import load_host
from ..transfer.tasks import Task
from ..transfer.tuning import BATCH, moved
from .methods import METHODS

# The ways to measure: the way of adversarial training, and the weight of attacked images.
SUBJECTS = {
    "clean images": ("none", 1.0),
    "bank": ("bank", 1.0),
    "free": ("free", 1.0),
    "fast": ("fast", 1.0),
    "fast, half of the loss on clean images": ("fast", 0.5),
    "pgd, 3 steps": ("pgd", 1.0),
}
ROUNDS = 7


def step_costs(task: Task, model_name: str, device: str) -> dict[str, float]:
    """Measure the time of a training step of SDPT with each way, without reading images.

    Args:
        task: The task whose images are used.
        model_name: Folder or Hub id of the base model.
        device: "cpu" or "cuda".

    Returns:
        For each way, the median over rounds of its time relative to a step on clean images in the same round.
    """
    processor = AutoProcessor.from_pretrained(model_name)
    data = task.load("train")
    model = METHODS["gated"].attach(load_host(model_name, device), processor, data.class_names, {}).train()
    data = data.subset(list(range(BATCH)))
    samples = TrainingSamples(data, BATCH, processor, model.config.max_text_len, 0, augmentation=False)
    inputs, labels = samples.collate([samples[number] for number in range(BATCH)])
    moved_labels = [moved(label, device) for label in labels]
    loss_function = GroundedDetectionLoss(model.config)
    trained = list(trained_parameters(model).values())

    def subject(way: str, weight: float, folder: str) -> Callable[[], Any]:
        views = make_views(way, model, loss_function, processor.image_processor, weight=weight, folder=folder)
        views.prepare(samples, BATCH, Accelerator(cpu=device == "cpu"))
        views.begin()

        def step() -> None:
            for view in views.of_batch(0, inputs, labels):
                loss = view.weight * loss_function(model(**view.inputs), moved_labels)
                loss.backward()
            for parameter in trained:
                parameter.grad = None

        return lambda: step

    with tempfile.TemporaryDirectory() as folder, text_computed_once(model):
        subjects = {name: subject(way, weight, folder) for name, (way, weight) in SUBJECTS.items()}
        for start in subjects.values():
            start()()
        seconds = in_turns(subjects, ROUNDS, device, seconds=0.0)
    clean = seconds["clean images"]
    return {name: median(one / other for one, other in zip(each, clean, strict=True)) for name, each in seconds.items()}
