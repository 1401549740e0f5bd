# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO and MM Grounding DINO of transformers."""

from functools import partial

import torch
from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)

from tests.helpers.detectors import LAYERS, WIDTH, make_host, model_inputs

from . import Case, on_meta

CLASSES = {
    "grounding_dino": (GroundingDinoConfig, GroundingDinoForObjectDetection),
    "mm_grounding_dino": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
}


def outputs(model, inputs):
    result = model(**inputs)
    # Scores of padded text positions are -inf; both samples have six others at least.
    return torch.cat([result.logits[..., :6].flatten(1), result.pred_boxes.flatten(1)], dim=1)


def full_size(name):
    config_class, model_class = CLASSES[name]
    swin = SwinConfig(image_size=384, window_size=7, out_features=["stage2", "stage3", "stage4"])
    return on_meta(model_class, config_class(backbone_config=swin))


CASES = [
    Case(
        name=name,
        make=partial(make_host, name),
        inputs=lambda padding: model_inputs(padding=padding),
        outputs=outputs,
        layers=dict.fromkeys(LAYERS, WIDTH),
        full_size=partial(full_size, name),
        full_size_layers=6,
        sides=dict.fromkeys(LAYERS, 2),
        image_reads=True,
    )
    for name in CLASSES
]
