# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The algorithm of the released SDPT code, for comparison only.

Unlike `peft_sdpt`, it inverts both projections in each forward, in float32. It appends prompts to both inputs, runs the
attention of the base model on the longer inputs, and drops the rows of the prompts. A mask hides the text prompts from
the image. It takes a single image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Names of the two projections to invert, in Grounding DINO of transformers and in GLIP.
QUERIES = (("vision_proj", "text_proj"), ("v_proj", "l_proj"))


class ReleasedFusion(nn.Module):
    """A fusion attention with tokens `cpt_input` of shape (1, N, E), the name in the released code."""

    def __init__(self, attention: nn.Module, num_tokens: int = 10) -> None:
        super().__init__()
        self.attention = attention
        names = next(names for names in QUERIES if hasattr(attention, names[0]))
        self.queries = tuple(getattr(attention, name) for name in names)
        weight = self.queries[0].weight
        self.cpt_input = nn.Parameter(weight.new_empty(1, num_tokens, len(weight)).uniform_(-1, 1))

    def forward(self, image: torch.Tensor, text: torch.Tensor, **masks: torch.Tensor | None) -> Any:
        count = self.cpt_input.shape[1]
        image, text = (
            torch.cat([tokens, self._inputs_of(query).to(tokens.dtype)], dim=1)
            for tokens, query in zip((image, text), self.queries, strict=True)
        )
        visible = torch.ones(1, text.shape[1] - count, dtype=torch.long, device=text.device)
        if masks.get("vision_attention_mask") is not None:  # True marks padding
            masks["vision_attention_mask"] = F.pad(masks["vision_attention_mask"], (0, count), value=False)
        if "vision_attention_mask" in masks:
            padding = masks.get("text_attention_mask")
            masks["text_attention_mask"] = F.pad(visible == 0 if padding is None else padding, (0, count), value=True)
        else:  # 1 marks a token
            valid = masks.get("attention_mask_l")
            masks["attention_mask_l"] = F.pad(visible if valid is None else valid, (0, count), value=0)
        image, text = self.attention(image, text, **masks)
        if isinstance(image, tuple):
            return (image[0][:, :-count], image[1]), (text[0][:, :-count], text[1])
        return image[:, :-count], text[:, :-count]

    def _inputs_of(self, query: nn.Linear) -> torch.Tensor:
        inverse = torch.linalg.pinv(query.weight.float())
        return (self.cpt_input.float() - query.bias.float()) @ inverse.T


def attach_released(host: nn.Module, num_tokens: int = 10) -> nn.Module:
    """Replace every fusion attention of a frozen base model."""
    for module in list(host.modules()):
        attention = getattr(module, "attn", None)
        if any(hasattr(attention, name) for name, _ in QUERIES):
            module.attn = ReleasedFusion(attention, num_tokens)
    return host
