# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Other prompts for fusion layers, to compare with unified prototype tokens and inverse projections.

They enter the attention in the same way as those of SDPT, so that only the trained parameters differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_sdpt.attention import Prompts
from peft_sdpt.hosts import FusionHost, find_hosts


class PromptedFusion(nn.Module):
    """A fusion layer with the image prompts, text prompts or both that `make` returns."""

    def __init__(self, layer: nn.Module, host: FusionHost, make: nn.Module) -> None:
        super().__init__()
        self.layer, self.host, self.make = layer, host, make

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.host.attend(self.layer, args, kwargs, [Prompts(tokens) for tokens in self.make()])


class InputPrompts(nn.Module):
    """Prompts that are trained in the space of the inputs, shape (N, d): image prompts, text prompts or both.

    They start from a normal distribution with the standard deviation `size`. With 1, they are as large as tokens after
    a layer norm.
    """

    def __init__(self, widths: tuple[int, int], sides: tuple[bool, bool], num_tokens: int, size: float = 1.0) -> None:
        super().__init__()
        for name, width, used in zip(("image", "text"), widths, sides, strict=True):
            setattr(self, name, nn.Parameter(torch.randn(num_tokens, width) * size) if used else None)

    def forward(self) -> list[torch.Tensor | None]:
        return [self.image, self.text]


class LearnedProjections(nn.Module):
    """Unified tokens of shape (N, E), with trained projections instead of inverses, an ablation of the paper."""

    def __init__(self, widths: tuple[int, int], width: int, num_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(nn.init.uniform_(torch.empty(num_tokens, width), -1, 1))
        self.projections = nn.ModuleList(nn.Linear(width, each) for each in widths)

    def forward(self) -> list[torch.Tensor]:
        return [projection(self.tokens) for projection in self.projections]


class CoupledPrompts(nn.Module):
    """Image and text prompts that each add a trained projection of the other, as in MuDPT (arXiv 2306.11400).

    The deep prompts, their initialization and their coupling are those of MuDPT, with one linear map per direction for
    all layers. But the prompts are in the fusion layers, where the modalities of this base model meet, not in two
    separate encoders.
    """

    def __init__(self, widths: tuple[int, int], maps: nn.ModuleList, num_tokens: int) -> None:
        super().__init__()
        self.own = InputPrompts(widths, (True, True), num_tokens, size=0.02)
        self.maps = maps  # from image prompts to text, and from text prompts to image

    def forward(self) -> list[torch.Tensor]:
        image, text = self.own()
        return [image + self.maps[1](text), text + self.maps[0](image)]


def attach_prompts(host: nn.Module, kind: str, num_tokens: int) -> nn.Module:
    """Add prompts to every fusion layer of a frozen base model.

    Args:
        host: The base model, which is changed.
        kind: "image", "text" or "both" for `InputPrompts`, "learned" for `LearnedProjections`, "coupled" for
            `CoupledPrompts`.
        num_tokens: Number of tokens per modality and layer.
    """
    layers = find_hosts(host)
    maps = None
    for name, declaration in layers.items():
        layer = host.get_submodule(name)
        projections = declaration.projections(layer)
        widths = tuple(projection.in_features for projection in projections)
        if kind == "coupled":
            if maps is None:
                maps = nn.ModuleList([nn.Linear(widths[0], widths[1]), nn.Linear(widths[1], widths[0])])
            make: nn.Module = CoupledPrompts(widths, maps, num_tokens)
        elif kind == "learned":
            make = LearnedProjections(widths, projections[0].out_features, num_tokens)
        else:
            make = InputPrompts(widths, (kind != "text", kind != "image"), num_tokens)
        device = projections[0].weight.device
        parent, _, child = name.rpartition(".")
        setattr(host.get_submodule(parent), child, PromptedFusion(layer, declaration, make.to(device)))
    return host
