# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Training any method, with the same samples, schedule and loss for all methods."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from peft_sdpt.detection.adversarial import Views
from peft_sdpt.detection.data import DetectionSplit
from peft_sdpt.detection.loss import GroundedDetectionLoss
from peft_sdpt.detection.samples import TrainingSamples
from peft_sdpt.training import trained_parameters

# Smaller batches than in train_detection.py, because there are many steps and few images. Other settings are the same.
BATCH, WARM_UP, MAX_GRAD_NORM = 8, 10, 1.0


class Diverged(Exception):
    """A loss or a gradient is not finite any more. The argument is the step."""


def batches(
    processor: Any, model: nn.Module, data: DetectionSplit, num_images: int, seed: int, augmentation: bool = True
) -> DataLoader:
    """Yield batches of this many training images, augmented as in train_detection.py."""
    samples = TrainingSamples(data, num_images, processor, model.config.max_text_len, seed, augmentation)
    return DataLoader(samples, BATCH, collate_fn=samples.collate)


def moved(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    """Move the tensors to a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def tune(
    model: nn.Module,
    processor: Any,
    data: DetectionSplit,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    prompts: str = "",
    prompt_rate: float | None = None,
    device: str = "cpu",
    augmentation: bool = True,
    views: Views | None = None,
) -> dict[str, Any]:
    """Train the parameters that require gradients, with AdamW without weight decay and a cosine schedule.

    Args:
        model: A Grounding DINO or MM Grounding DINO with a method attached.
        processor: Its processor.
        data: The training images, which are augmented as in train_detection.py.
        steps: Number of optimizer steps with `BATCH` images each.
        learning_rate: Highest learning rate.
        seed: Seed of the order and augmentation of the images.
        prompts: A regular expression for the names of parameters with another learning rate.
        prompt_rate: This learning rate. None if all have the same.
        device: Device of the model.
        augmentation: Whether to augment the images.
        views: What each step trains on. None for clean images.

    Returns:
        `losses` of each step, and `seconds`.

    Raises:
        Diverged: A loss or a gradient is not finite any more.
    """
    named = trained_parameters(model)
    trained = list(named.values())
    tokens = [parameter for name, parameter in named.items() if re.search(prompts, name)]
    rest = [parameter for name, parameter in named.items() if not re.search(prompts, name)]
    groups = [{"params": tokens, "lr": learning_rate if prompt_rate is None else prompt_rate}, {"params": rest}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP, steps)
    loss_function = GroundedDetectionLoss(model.config)
    model.train()
    views = views or Views(model)
    losses: list[float] = []
    begin = time.perf_counter()
    num_batches = math.ceil(steps / views.replays)
    for inputs, labels in batches(processor, model, data, num_batches * BATCH, seed, augmentation):
        moved_labels = [moved(label, device) for label in labels]
        views.begin()
        for _ in range(min(views.replays, steps - len(losses))):
            total = 0.0
            for view in views.of_batch(0, inputs, labels):
                outputs = model(**view.inputs)
                if not outputs.pred_boxes.isfinite().all():
                    raise Diverged(len(losses))
                loss = view.weight * loss_function(outputs, moved_labels)
                loss.backward()
                total += loss.item()
            norm = nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            losses.append(total)
            if not (math.isfinite(total) and norm.isfinite()):
                raise Diverged(len(losses) - 1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return {"losses": losses, "seconds": time.perf_counter() - begin}
