# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts of fusion layers that are not unified prototype tokens: the rivals of inverse projections.

They reach the attention the way that SDPT's do, so that a comparison is one of what is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_sdpt.attention import Prompts
from peft_sdpt.hosts import FusionHost, find_hosts


class PromptedFusion(nn.Module):
    """A fusion layer with prompts for its image tokens, its text tokens, or both, as `make` gives them."""

    def __init__(self, layer: nn.Module, host: FusionHost, make: nn.Module) -> None:
        super().__init__()
        self.layer, self.host, self.make = layer, host, make

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.host.attend(self.layer, args, kwargs, [Prompts(tokens) for tokens in self.make()])


class InputPrompts(nn.Module):
    """Tokens that are trained as the layer's inputs `(N, d)`: image prompts, text prompts, or both.

    They start normal, with a standard deviation `size`: 1 is as large as tokens that a layer norm has been over.
    """

    def __init__(self, widths: tuple[int, int], sides: tuple[bool, bool], num_tokens: int, size: float = 1.0) -> None:
        super().__init__()
        for name, width, used in zip(("image", "text"), widths, sides, strict=True):
            setattr(self, name, nn.Parameter(torch.randn(num_tokens, width) * size) if used else None)

    def forward(self) -> list[torch.Tensor | None]:
        return [self.image, self.text]


class LearnedProjections(nn.Module):
    """Unified tokens `(N, E)`, with trained projections in the place of the inverses (the paper's ablation)."""

    def __init__(self, widths: tuple[int, int], width: int, num_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(nn.init.uniform_(torch.empty(num_tokens, width), -1, 1))
        self.projections = nn.ModuleList(nn.Linear(width, each) for each in widths)

    def forward(self) -> list[torch.Tensor]:
        return [projection(self.tokens) for projection in self.projections]


class CoupledPrompts(nn.Module):
    """Image and text prompts that each gain a trained projection of the other, as in MuDPT (arXiv 2306.11400).

    Its deep prompts, its start and its coupling, one linear map a direction for all layers; in the fusion layers, where
    this host's modalities meet, not in two separate encoders.
    """

    def __init__(self, widths: tuple[int, int], maps: nn.ModuleList, num_tokens: int) -> None:
        super().__init__()
        self.own = InputPrompts(widths, (True, True), num_tokens, size=0.02)
        self.maps = maps  # of image prompts to text, and of text prompts to image

    def forward(self) -> list[torch.Tensor]:
        image, text = self.own()
        return [image + self.maps[1](text), text + self.maps[0](image)]


def attach_prompts(host: nn.Module, kind: str, num_tokens: int) -> nn.Module:
    """Give every fusion layer of a frozen host prompts.

    Args:
        kind: "image", "text" or "both" for `InputPrompts`; "learned" for `LearnedProjections`; "coupled" for
            `CoupledPrompts`.
        num_tokens: of each modality and layer.
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
