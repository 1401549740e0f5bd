# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Deep visual prompt tuning of a Swin backbone (arXiv 2203.12119), with new prompts for each block.

As in its released code, the prompts join the tokens of every window and take no part in merging patches. In each block,
they go through the first norm of the block. The next block replaces them by its own prompts, so their outputs need not
be computed. They only serve as keys and values of every window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.swin.modeling_swin import SwinAttention, SwinLayer, eager_attention_forward


class PromptedWindows(nn.Module):
    """Window attention of a block with `prompts`, shape (P, C)."""

    def __init__(self, attention: SwinAttention, norm: nn.LayerNorm, num_tokens: int) -> None:
        super().__init__()
        self.attention, self.norm = attention, norm
        weight = attention.k_proj.weight
        self.prompts = nn.Parameter(nn.init.xavier_uniform_(weight.new_empty(num_tokens, weight.shape[1])))

    def forward(self, windows: torch.Tensor, attention_mask: torch.Tensor | None = None, **_) -> tuple:
        attention = self.attention
        prompts = self.norm(self.prompts).expand(len(windows), -1, -1)
        queries = self._heads(attention.q_proj(windows))
        keys, values = (
            self._heads(torch.cat([projection(windows), projection(prompts)], dim=1))
            for projection in (attention.k_proj, attention.v_proj)
        )
        bias = attention.relative_position_bias()
        if attention_mask is not None:
            samples = len(windows) // len(attention_mask)
            bias = bias + attention_mask[:, None].repeat(samples, 1, 1, 1)
        # The attention kernel of the base model, so that the comparison is about methods.
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention_forward
        )
        read, weights = interface(
            attention,
            queries,
            keys,
            values,
            F.pad(bias, (0, len(self.prompts))).to(queries.dtype),
            dropout=attention.attention_dropout if self.training else 0.0,
            scaling=attention.scaling,
        )
        return attention.o_proj(read.flatten(2)), weights

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.attention.num_attention_heads, -1)).transpose(1, 2)


def attach_window_prompts(host: nn.Module, num_tokens: int = 10) -> nn.Module:
    """Give every block in the backbone of a frozen base model its own prompts."""
    for block in [module for module in host.modules() if isinstance(module, SwinLayer)]:
        block.attention = PromptedWindows(block.attention, block.layernorm_before, num_tokens)
    return host
