# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""One training run of any method: the same samples, schedule and loss for all."""

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

from peft_sdpt.detection.data import DetectionSplit
from peft_sdpt.detection.loss import GroundedDetectionLoss
from peft_sdpt.detection.samples import TrainingSamples

from ..peers import trained_parameters

# Steps are many and pictures few: smaller batches than the main job's, with the rest as there.
BATCH, WARM_UP, MAX_GRAD_NORM = 8, 10, 1.0


class Diverged(Exception):
    """A loss or a gradient is not finite any more."""


def batches(processor: Any, model: nn.Module, data: DetectionSplit, pictures: int, seed: int) -> DataLoader:
    """So many training pictures, augmented as in the main job, in batches."""
    samples = TrainingSamples(data, pictures, processor, model.config.max_text_len, seed)
    return DataLoader(samples, BATCH, collate_fn=samples.collate)


def moved(tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
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
    prompt_factor: float = 1.0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train what of `model` requires gradients, with AdamW without weight decay and a cosine schedule.

    Args:
        model: a detector of the Grounding DINO kind with what a method put onto it.
        processor: the detector's.
        data: the training pictures; they are augmented as in the main job.
        steps: optimizer steps, of `BATCH` pictures each.
        learning_rate: its highest.
        seed: of the order and augmentation of pictures.
        prompts: a regular expression for the names of those that have another learning rate.
        prompt_factor: what that is times the rate of the rest.

    Returns:
        `losses`, one a step, and `seconds`.

    Raises:
        Diverged: in which step, as its argument.
    """
    named = trained_parameters(model)
    trained = list(named.values())
    tokens = [parameter for name, parameter in named.items() if re.search(prompts, name)]
    rest = [parameter for name, parameter in named.items() if not re.search(prompts, name)]
    groups = [{"params": tokens, "lr": prompt_factor * learning_rate}, {"params": rest}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP, steps)
    loss_function = GroundedDetectionLoss(model.config)
    model.train()
    losses, begin = [], time.perf_counter()
    for inputs, labels in batches(processor, model, data, steps * BATCH, seed):
        inputs, labels = moved(inputs, device), [moved(label, device) for label in labels]
        outputs = model(**inputs)
        if not outputs.pred_boxes.isfinite().all():
            raise Diverged(len(losses))
        loss = loss_function(outputs, labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        losses.append(loss.item())
        if not (math.isfinite(losses[-1]) and norm.isfinite()):
            raise Diverged(len(losses) - 1)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {"losses": losses, "seconds": time.perf_counter() - begin}
