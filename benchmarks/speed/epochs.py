# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measuring an epoch of training the small base model, with and without cached features of its backbones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from examples.pictograms import scene_split
from examples.pictograms.tasks import TASKS
from peft_sdpt import SDPTConfig
from peft_sdpt.detection.feature_cache import FeatureCache
from peft_sdpt.detection.loss import GroundedDetectionLoss
from peft_sdpt.detection.samples import TrainingSamples
from peft_sdpt.training import trained_parameters

from .. import EXAMPLES
from ..peers import PUBLISHED
from .measuring import in_turns

NUM_IMAGES, BATCH_SIZE = 120, 12


def measure_epochs(repeats: int, device: str, tick: Callable[[str], None] = lambda _: None) -> dict[str, dict]:
    """Measure the seconds of each round of `sdpt` and of `cached`, whose features were all stored before.

    The images are generated before the rounds. An epoch processes and batches them, as in training.
    """
    host = AutoModelForZeroShotObjectDetection.from_pretrained(EXAMPLES / "host", dtype=torch.float32)
    model = get_peft_model(host, SDPTConfig(**PUBLISHED)).to(device).train()
    task = TASKS["twemoji"]
    data = scene_split([(1, number) for number in range(NUM_IMAGES)], task.classes(), look=task.look)
    processor = AutoProcessor.from_pretrained(EXAMPLES / "host")
    samples = TrainingSamples(data, NUM_IMAGES, processor, model.config.max_text_len, seed=0, augmentation=False)
    loader = DataLoader(samples, BATCH_SIZE, collate_fn=samples.collate)
    loss_function = GroundedDetectionLoss(model.config)
    trained = list(trained_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-7)

    def on_device(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    def epoch() -> None:
        for inputs, labels in loader:
            loss_function(model(**on_device(inputs)), [on_device(label) for label in labels]).backward()
            optimizer.step()
            optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        features = FeatureCache(Path(folder), model)

        def cached_epoch() -> None:
            with features.used():
                epoch()

        tick("cached")
        cached_epoch()
        runs = {"sdpt": epoch, "cached": cached_epoch}
        subjects = {name: lambda run=run: run for name, run in runs.items()}
        return {name: {"seconds": each} for name, each in in_turns(subjects, repeats, device, tick).items()}
