# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The fusion layer of GLIP-L (microsoft/GLIP), rewritten because GLIP itself cannot be installed any more.

The names of attributes and arguments are those of GLIP, by which SDPT and the other methods find the layer.
"""
# ruff: noqa: E741 - GLIP calls its text tokens `l`.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BiMultiHeadAttention(nn.Module):
    """Attention in both directions from one matrix of logits. All weights are computed, as in GLIP."""

    def __init__(self, v_dim: int, l_dim: int, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.scale = (embed_dim // num_heads) ** -0.5
        self.v_proj, self.l_proj = nn.Linear(v_dim, embed_dim), nn.Linear(l_dim, embed_dim)
        self.values_v_proj, self.values_l_proj = nn.Linear(v_dim, embed_dim), nn.Linear(l_dim, embed_dim)
        self.out_v_proj, self.out_l_proj = nn.Linear(embed_dim, v_dim), nn.Linear(embed_dim, l_dim)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """From shape (B, L, E) to (B * heads, L, head_dim)."""
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def _joined(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2)

    def forward(self, v, l, attention_mask_l=None):
        queries, keys = self._heads(self.v_proj(v) * self.scale), self._heads(self.l_proj(l))
        values_v, values_l = self._heads(self.values_v_proj(v)), self._heads(self.values_l_proj(l))
        logits = torch.bmm(queries, keys.transpose(1, 2))
        logits = (logits - logits.max()).clamp(min=-50000, max=50000)
        transposed = logits.transpose(1, 2)
        transposed = (transposed - transposed.amax(-1, keepdim=True)).clamp(min=-50000, max=50000)
        weights_l = transposed.softmax(dim=-1)
        if attention_mask_l is not None:
            added = attention_mask_l.masked_fill(attention_mask_l == 0, -9e15)[:, None, None, :]
            logits = (logits.unflatten(0, (-1, self.num_heads)) + added).flatten(0, 1)
        weights_v = logits.softmax(dim=-1)
        read_v = torch.bmm(F.dropout(weights_v, self.dropout, self.training), values_l)
        read_l = torch.bmm(F.dropout(weights_l, self.dropout, self.training), values_v)
        return self.out_v_proj(self._joined(read_v)), self.out_l_proj(self._joined(read_l))


class GlipFusionLayer(nn.Module):
    """Norms, attention and layer scale. The defaults are those of GLIP-L."""

    def __init__(
        self, v_dim: int = 256, l_dim: int = 768, embed_dim: int = 2048, num_heads: int = 8, dropout: float = 0.1
    ):
        super().__init__()
        self.layer_norm_v, self.layer_norm_l = nn.LayerNorm(v_dim), nn.LayerNorm(l_dim)
        self.attn = BiMultiHeadAttention(v_dim, l_dim, embed_dim, num_heads, dropout)
        self.gamma_v, self.gamma_l = nn.Parameter(torch.ones(v_dim)), nn.Parameter(torch.ones(l_dim))

    def forward(self, v, l, attention_mask_l=None):
        v, l = self.layer_norm_v(v), self.layer_norm_l(l)
        delta_v, delta_l = self.attn(v, l, attention_mask_l=attention_mask_l)
        return v + self.gamma_v * delta_v, l + self.gamma_l * delta_l
