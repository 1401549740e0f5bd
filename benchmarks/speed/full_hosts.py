# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Base models of full size with random weights, their inputs, and copies that share their weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    SwinConfig,
)
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFusionLayer

from .glip_fusion import GlipFusionLayer

CLS, SEP, PERIOD = 101, 102, 1012
BOXES = 10

SWIN_TINY = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
SWIN_BASE = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12}


def detector(model_class: type, config_class: type, swin: dict[str, Any], **changes: Any) -> nn.Module:
    """Return a detector whose outputs depend on prompts. Other random weights would hide their effect."""
    backbone = SwinConfig(image_size=384, out_features=["stage2", "stage3", "stage4"], **swin)
    host = model_class(config_class(backbone_config=backbone, **changes))
    with torch.no_grad():
        for name, parameter in host.named_parameters():
            if name.endswith(("vision_param", "text_param")):
                parameter.fill_(0.7)
            elif "bbox_embed" in name:
                parameter.normal_(std=0.02)
    return host


MODELS: dict[str, Callable[[], nn.Module]] = {
    "grounding-dino-tiny": partial(detector, GroundingDinoForObjectDetection, GroundingDinoConfig, SWIN_TINY),
    "grounding-dino-base": partial(detector, GroundingDinoForObjectDetection, GroundingDinoConfig, SWIN_BASE),
    "mm-grounding-dino-tiny": partial(detector, MMGroundingDinoForObjectDetection, MMGroundingDinoConfig, SWIN_TINY),
}


class Fusion(nn.Module):
    """A single fusion layer as a base model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, image: torch.Tensor, text: torch.Tensor, **masks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        image, text = self.layers[0](image, text, **masks)
        # The layer of Grounding DINO also returns attention weights.
        return tuple(part[0] if isinstance(part, tuple) else part for part in (image, text))


def grounding_dino_fusion() -> nn.Module:
    layer = GroundingDinoFusionLayer(GroundingDinoConfig())
    nn.init.constant_(layer.vision_param, 0.7)
    nn.init.constant_(layer.text_param, 0.7)
    return Fusion(layer)


def glip_fusion() -> nn.Module:
    return Fusion(GlipFusionLayer())


FUSIONS: dict[str, Callable[[], nn.Module]] = {
    "grounding-dino-fusion": grounding_dino_fusion,
    "glip-l-fusion": glip_fusion,
}
# Embedding dimension of image and text tokens, and strides of the feature levels of the image.
FUSION_SHAPES = {
    "grounding-dino-fusion": (256, 256, (8, 16, 32, 64)),
    "glip-l-fusion": (256, 768, (8, 16, 32, 64, 128)),
}


def make_host(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Return a base model in evaluation mode, with the same weights in each call."""
    torch.manual_seed(0)
    return {**MODELS, **FUSIONS}[name]().to(device, dtype).eval()


def image_tokens(size: tuple[int, int], strides: tuple[int, ...]) -> int:
    """Return the number of tokens of an image. Each level has half the height and width of the one before, rounded up.

    Example:
        >>> image_tokens((480, 640), (8, 16, 32, 64)), image_tokens((800, 1333), (8, 16, 32, 64))
        (6380, 22223)
    """
    return sum(math.prod(math.ceil(side / stride) for side in size) for stride in strides)


def fusion_inputs(name: str, size: tuple[int, int], tokens: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the inputs of a fusion layer as its model makes them, with masks: a single image without padding."""
    image_width, text_width, strides = FUSION_SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    count = image_tokens(size, strides)
    inputs = {
        "image": torch.randn(1, count, image_width, generator=generator).to(device, dtype),
        "text": torch.randn(1, tokens, text_width, generator=generator).to(device, dtype),
    }
    if name == "glip-l-fusion":
        return {**inputs, "attention_mask_l": torch.ones(1, tokens, dtype=torch.long, device=device)}
    padding = {"attention_mask_vision": count, "attention_mask_text": tokens}
    return inputs | {key: torch.zeros(1, length, dtype=torch.bool, device=device) for key, length in padding.items()}


def model_inputs(size: tuple[int, int], tokens: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return an image of noise, and a prompt of `tokens` tokens, with classes of three words and a full stop."""
    generator = torch.Generator().manual_seed(0)
    # Above the ids of single letters, and inside the vocabulary of the small models in tests.
    ids = torch.randint(PERIOD + 1, PERIOD + 80, (1, tokens), generator=generator)
    ids[:, 4:-2:4] = PERIOD
    ids[:, 0], ids[:, -2], ids[:, -1] = CLS, PERIOD, SEP
    inputs = {
        "pixel_values": torch.randn(1, 3, *size, generator=generator).to(dtype),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def labels(inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return ten boxes with classes of the prompt, spread over the image."""
    classes = int((inputs["input_ids"] == PERIOD).sum())
    places = (torch.arange(BOXES) + 0.5) / BOXES
    boxes = torch.stack([places, places.flip(0), 0.1 + 0.2 * places, 0.3 - 0.2 * places], dim=1)
    device = inputs["input_ids"].device
    return [{"class_labels": (torch.arange(BOXES) % classes).to(device), "boxes": boxes.to(device)}]


def sharing_copy(host: nn.Module) -> nn.Module:
    """Return a frozen copy of a base model that shares its memory, so that methods share the weights."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in host.buffers()}
    for parameter in host.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
    return copy.deepcopy(host, memo)
