# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Methods that train the representation of the class names: at the input of the detector, or at its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from peft_sdpt.detection.grounding import class_prompt


class TrainedText(nn.Module):
    """A replacement of the text encoder, with one embedding for each token of a single prompt (arXiv 2504.07252).

    The embeddings start from the output of the encoder. The paper starts from random embeddings. With these, no class
    is detected at first, and the paper reports that training on one image per class is unstable.
    """

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(start.clone())

    def forward(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> BaseModelOutput:
        if input_ids.shape[1] != len(self.embeddings):
            raise ValueError(f"the prompt must have {len(self.embeddings)} tokens, got {input_ids.shape[1]}")
        return BaseModelOutput(last_hidden_state=self.embeddings.expand(len(input_ids), -1, -1))


def attach_trained_text(host: nn.Module, processor: Any, class_names: list[str]) -> nn.Module:
    """Replace the text encoder of a frozen base model by trained embeddings of the prompt for these classes."""
    captured = []
    encoder = host.model.text_backbone
    hook = encoder.register_forward_hook(lambda *call: captured.append(call[-1].last_hidden_state))
    text = processor.tokenizer(class_prompt(class_names), return_tensors="pt").to(host.device)
    pixels = torch.zeros(1, 3, 64, 64, device=host.device)
    with torch.no_grad():
        host(pixel_values=pixels, **text)
    hook.remove()
    host.model.text_backbone = TrainedText(captured[0][0])
    return host


class ProbedHead(nn.Module):
    """A class head with a trained offset for the text features that queries are compared with, one row per token.

    `weight` is added to the text features. With zeros, the head is that of the base model, as a linear probe of CLIP
    starts from its class names.
    """

    def __init__(self, head: nn.Module, weight: nn.Parameter) -> None:
        super().__init__()
        self.head, self.weight = head, weight

    def forward(
        self, vision_hidden_state: torch.Tensor, text_hidden_state: torch.Tensor, text_token_mask: torch.Tensor
    ) -> torch.Tensor:
        if text_hidden_state.shape[1] != len(self.weight):
            raise ValueError(f"the prompt must have {len(self.weight)} tokens, got {text_hidden_state.shape[1]}")
        return self.head(
            vision_hidden_state=vision_hidden_state,
            text_hidden_state=text_hidden_state + self.weight,
            text_token_mask=text_token_mask,
        )


def attach_probe(host: nn.Module, processor: Any, class_names: list[str]) -> nn.Module:
    """Add one trained offset to the class heads in the decoder of a frozen base model. Proposals do not change."""
    length = len(processor.tokenizer(class_prompt(class_names)).input_ids)
    weight = nn.Parameter(torch.zeros(length, host.config.d_model, device=host.device))
    host.class_embed = nn.ModuleList(ProbedHead(head, weight) for head in host.class_embed)
    return host
