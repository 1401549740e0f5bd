# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""`BiMultiHeadAttention` of GLIP, of the original Grounding DINO and of mmdetection, written from what they do.

They do not install here (but for the original Grounding DINO, see `tests/test_bi_multi_head.py`); `tests/parity.py`
compares with the real files where they are.
"""
# ruff: noqa: E741 - `l` is what the hosts call their text tokens, and callers pass it by that name.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DV, DL, WIDTH, HEADS = 16, 24, 96, 4


class Projections(nn.Module):
    """The six projections, and attention in both directions given what each mask adds to the logits."""

    def __init__(self, v_dim: int = DV, l_dim: int = DL, embed_dim: int = WIDTH, num_heads: int = HEADS, dropout=0.0):
        super().__init__()
        self.num_heads, self.scale, self.dropout = num_heads, (embed_dim // num_heads) ** -0.5, dropout
        self.v_proj, self.l_proj = nn.Linear(v_dim, embed_dim), nn.Linear(l_dim, embed_dim)
        self.values_v_proj, self.values_l_proj = nn.Linear(v_dim, embed_dim), nn.Linear(l_dim, embed_dim)
        self.out_v_proj, self.out_l_proj = nn.Linear(embed_dim, v_dim), nn.Linear(embed_dim, l_dim)

    def heads(self, states):
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, v, l, added_to_image=0.0, added_to_text=0.0):
        logits = self.heads(self.v_proj(v) * self.scale) @ self.heads(self.l_proj(l)).mT
        logits = (logits - logits.max()).clamp(min=-50000)
        of_text = logits.mT - logits.mT.amax(-1, keepdim=True)
        image_weights = F.dropout((logits + added_to_text).softmax(-1), self.dropout, self.training)
        text_weights = F.dropout((of_text + added_to_image).softmax(-1), self.dropout, self.training)
        image = (image_weights @ self.heads(self.values_l_proj(l))).transpose(1, 2).flatten(2)
        text = (text_weights @ self.heads(self.values_v_proj(v))).transpose(1, 2).flatten(2)
        return self.out_v_proj(image), self.out_l_proj(text)


def infinite(padding):
    """True = padding, as what it adds."""
    if padding is None:
        return 0.0
    return torch.zeros(padding.shape).masked_fill(padding, float("-inf"))[:, None, None]


def validity(mask):
    """1 = valid, as what it adds in GLIP: itself, and -9e15 for 0."""
    return 0.0 if mask is None else mask.masked_fill(mask == 0, -9e15)[:, None, None]


class Glip:
    class BiMultiHeadAttention(Projections):
        def forward(self, v, l, attention_mask_l=None):
            return self.attend(v, l, added_to_text=validity(attention_mask_l))


class GroundingDino:
    class BiMultiHeadAttention(Projections):
        def forward(self, v, l, attention_mask_v=None, attention_mask_l=None):
            return self.attend(v, l, infinite(attention_mask_v), infinite(attention_mask_l))


class Mmdetection:
    class BiMultiHeadAttention(Projections):
        def forward(self, vision, lang, attention_mask_v=None, attention_mask_l=None):
            return self.attend(vision, lang, infinite(attention_mask_v), validity(attention_mask_l))


class MmdetectionGlip:
    class BiMultiHeadAttention(Projections):
        def forward(self, vision, lang, attention_mask_l=None):
            return self.attend(vision, lang, added_to_text=validity(attention_mask_l))


# Of each the attention, and whether it takes an image mask; whether 1 in a text mask is a token.
FLAVOURS = {
    "glip": (Glip.BiMultiHeadAttention, False, True),
    "original_grounding_dino": (GroundingDino.BiMultiHeadAttention, True, False),
    "mmdetection": (Mmdetection.BiMultiHeadAttention, True, True),
    "mmdetection_3.0": (MmdetectionGlip.BiMultiHeadAttention, False, True),
}


class BiAttentionBlock(nn.Module):
    """A fusion layer around one attention: norms, layer scale, and masks handed on by keyword."""

    def __init__(self, flavour: str):
        super().__init__()
        attention, self.takes_image_mask, self.ones_are_tokens = FLAVOURS[flavour]
        self.attn = attention()
        self.layer_norm_v, self.layer_norm_l = nn.LayerNorm(DV), nn.LayerNorm(DL)

    def forward(self, v, l, image_padding=None, text_padding=None):
        masks = {}
        if self.takes_image_mask:
            masks["attention_mask_v"] = image_padding
        if text_padding is not None:
            masks["attention_mask_l"] = (~text_padding).long() if self.ones_are_tokens else text_padding
        v, l = self.layer_norm_v(v), self.layer_norm_l(l)
        delta_v, delta_l = self.attn(v, l, **masks)
        return v + 0.7 * delta_v, l + 0.7 * delta_l


class FusionTower(nn.Module):
    """Fusion layers one after the other, each calling its one attention once a pyramid level or once for all.

    Args:
        flavour: of `FLAVOURS`.
        levels: pyramid levels fused one after the other, as GLIP can; the text takes the mean of all.
        checkpointed: blocks run under activation checkpointing, their arguments positional.
    """

    def __init__(self, flavour: str, levels: int = 1, checkpointed: bool = False):
        super().__init__()
        self.levels, self.checkpointed = levels, checkpointed
        self.blocks = nn.ModuleList(BiAttentionBlock(flavour) for _ in range(2))

    def forward(self, image, text, image_padding=None, text_padding=None):
        for block in self.blocks:
            masks = [None] * self.levels if image_padding is None else image_padding.chunk(self.levels, dim=1)
            images, texts = [], []
            for level, mask in zip(image.chunk(self.levels, dim=1), masks, strict=True):
                inputs = (level, text, mask, text_padding)
                fused = checkpoint(block, *inputs, use_reentrant=False) if self.checkpointed else block(*inputs)
                images.append(fused[0])
                texts.append(fused[1])
            image, text = torch.cat(images, dim=1), torch.stack(texts).mean(0)
        return image, text
