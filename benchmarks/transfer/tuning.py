# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""One training run of any method: the same samples, schedule and loss for all."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from coco_data import DetectionSplit
from peft_sdpt.loss import GroundedDetectionLoss
from training_data import TrainingSamples

# As in the main job.
BATCH, WARM_UP, MAX_GRAD_NORM = 12, 10, 1.0


class Diverged(Exception):
    """A loss or a gradient is not finite any more."""


def tune(
    model: nn.Module,
    processor: Any,
    data: DetectionSplit,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
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

    Returns:
        `losses`, one a step, and `seconds`.

    Raises:
        Diverged: in which step, as its argument.
    """
    samples = TrainingSamples(data, steps * BATCH, processor, model.config.max_text_len, seed)
    loader = DataLoader(samples, BATCH, collate_fn=samples.collate)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP, steps)
    loss_function = GroundedDetectionLoss(model.config)
    model.train()
    losses, begin = [], time.perf_counter()
    for inputs, labels in loader:
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        labels = [{name: tensor.to(device) for name, tensor in label.items()} for label in labels]
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
