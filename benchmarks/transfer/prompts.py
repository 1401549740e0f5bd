# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Other prompts for fusion layers, to compare with unified prototype tokens and inverse projections.

They enter the attention in the same way as those of SDPT, so that only the trained parameters differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.activations import QuickGELUActivation

from peft_sdpt.attention import Prompts
from peft_sdpt.detection.prediction import evaluation_mode
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


class TransformerMap(nn.Module):
    """The map between prompts of two modalities in MuDPT: a transformer block over the tokens of a layer.

    As in `trainers/uumudpt.py` of its released code (github.com/Mechrev0/MuDPT), the only trainer there with such maps
    in both directions. It maps `(N, width)` to `(N, out)`. Heads are 64 wide.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first_norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, max(1, width // 64))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), QuickGELUActivation(), nn.Linear(4 * width, width))
        self.projection = nn.Linear(width, out)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.first_norm(tokens)
        normed = self.attention_norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        tokens = tokens + self.mlp(self.mlp_norm(tokens))
        return self.projection(self.last_norm(tokens))


class CoupledPrompts(nn.Module):
    """Image and text prompts that each add a trained map of the other, as in MuDPT (arXiv 2306.11400).

    The deep prompts, their initialization and their coupling are those of MuDPT, with one map per direction for all
    layers. But the prompts are in the fusion layers, where the modalities of this base model meet, not in two separate
    encoders.

    Args:
        widths: Widths of image and text prompts.
        maps: The map from image prompts to text, and the map from text prompts to the image.
        num_tokens: Number of tokens per modality.
        text_gets_image: Whether the text prompts add a map of the image prompts.
    """

    def __init__(
        self, widths: tuple[int, int], maps: nn.ModuleList, num_tokens: int, text_gets_image: bool = True
    ) -> None:
        super().__init__()
        self.own = InputPrompts(widths, (True, True), num_tokens, size=0.02)
        self.maps, self.text_gets_image = maps, text_gets_image

    def forward(self) -> list[torch.Tensor]:
        image, text = self.own()
        return [image + self.maps[1](text), text + self.maps[0](image) if self.text_gets_image else text]


# The kinds of `CoupledPrompts`, with the class of their maps.
COUPLINGS: dict[str, type[nn.Module]] = {"coupled": nn.Linear, "coupled by transformers": TransformerMap}


def attach_prompts(host: nn.Module, kind: str, num_tokens: int) -> nn.Module:
    """Add prompts to every fusion layer of a frozen base model.

    Args:
        host: The base model, which is changed.
        kind: "image", "text" or "both" for `InputPrompts`, "learned" for `LearnedProjections`, a key of `COUPLINGS`
            for `CoupledPrompts`.
        num_tokens: Number of tokens per modality and layer.
    """
    layers = {name: declaration for name, declaration in find_hosts(host).items() if declaration.adapted_by_default}
    maps = None
    for name, declaration in layers.items():
        layer = host.get_submodule(name)
        projections = declaration.projections(layer)
        widths = tuple(projection.in_features for projection in projections)
        if kind in COUPLINGS:
            first = maps is None
            if maps is None:
                coupling = COUPLINGS[kind]
                maps = nn.ModuleList([coupling(widths[0], widths[1]), coupling(widths[1], widths[0])])
            # In the released code, the text prompts of the first layer are the context, which adds nothing. The row
            # with linear maps was measured with coupled prompts in every layer, and stays comparable.
            make: nn.Module = CoupledPrompts(widths, maps, num_tokens, kind == "coupled" or not first)
        elif kind == "learned":
            make = LearnedProjections(widths, projections[0].out_features, num_tokens)
        else:
            make = InputPrompts(widths, (kind != "text", kind != "image"), num_tokens)
        device = projections[0].weight.device
        parent, _, child = name.rpartition(".")
        setattr(host.get_submodule(parent), child, PromptedFusion(layer, declaration, make.to(device)))
    return host


@torch.no_grad()
def start_from_inputs(model: nn.Module, batches: Iterable[tuple[Mapping[str, torch.Tensor], Any]]) -> None:
    """Start image prompts as random image tokens of the base model, as Self-Prompt Tuning does (arXiv 2402.02382).

    Each fusion layer gets different rows of its own input, uniformly drawn from all images and positions, as with
    `prompt_sample_type="random"` in the released code (github.com/WangYZ1608/Self-Prompt-Tuning). The base model is in
    evaluation mode and sees no prompts. Padding is left out.

    Args:
        model: A model with image prompts by `attach_prompts`.
        batches: Inputs of the model, and labels, which are not used.

    Raises:
        ValueError: The batches have fewer image tokens than a layer has prompts.
    """
    layers = [module for module in model.modules() if isinstance(module, PromptedFusion)]
    drawn = [_Drawn(len(layer.make.image)) for layer in layers]
    for layer, rows in zip(layers, drawn, strict=True):
        layer.forward = partial(_see, layer, rows)  # until it is deleted below
    try:
        with evaluation_mode(model):
            for inputs, _ in batches:
                model(**inputs)
    finally:
        for layer in layers:
            del layer.forward
    for layer, rows in zip(layers, drawn, strict=True):
        layer.make.image.copy_(rows.drawn())


def _see(layer: PromptedFusion, rows: _Drawn, *args: Any, **kwargs: Any) -> Any:
    bound = layer.host.bind(args, kwargs)
    tokens, padding = bound[layer.host.image_tokens], bound.get(layer.host.image_mask)
    rows.add(tokens.flatten(0, 1) if padding is None else tokens[~padding])
    return layer.layer(*args, **kwargs)


class _Drawn:
    """A number of different rows, uniformly drawn from rows that come in parts and need not be kept."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows: torch.Tensor | None = None
        self.keys = torch.empty(0)

    def add(self, rows: torch.Tensor) -> None:
        # The rows with the largest of random keys are a uniform choice.
        self.keys = torch.cat([self.keys, torch.rand(len(rows))])
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows])
        best = self.keys.topk(min(self.number, len(self.keys))).indices
        self.keys, self.rows = self.keys[best], self.rows[best.to(rows.device)]

    def drawn(self) -> torch.Tensor:
        if self.rows is None or len(self.rows) < self.number:
            raise ValueError(f"{self.number} prompts need as many image tokens, got {len(self.keys)}")
        return self.rows
