# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of a fusion layer, with prompts as extra keys and values.

`bi_attention` is the method's own (arXiv 2407.11414, section 3): same result as appending the prompts to both inputs
and dropping their rows from both outputs, because a softmax is taken per row; prompt rows are never computed.
`fused_attention` has the same again, without the projections of image tokens. Hosts with other attentions run as they
are, on a longer context: `append_prompts`, `append_zeros` and `extend_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import nn

# The bound of the hosts' own clamps: half precision ends at 65504.
_LOGIT_BOUND = 50000.0


class Side(NamedTuple):
    """The three projections of one modality. The other modality attends to `query`.

    They are `nn.Linear` or act like it: another tuner's layer, a quantised one.
    """

    query: nn.Linear
    value: nn.Linear
    out: nn.Linear


class Prompts(NamedTuple):
    """Prompts of one side of a fusion layer.

    Attributes:
        tokens: `(N, d)`, in the side's input space; None where the side has none.
        hidden: `(B, N)`, bool, True where a sample does not see a prompt; None where all see all.
    """

    tokens: torch.Tensor | None
    hidden: torch.Tensor | None = None

    @property
    def num_prompts(self) -> int:
        """Number N of prompts."""
        return 0 if self.tokens is None else len(self.tokens)


class SideInput(NamedTuple):
    """What one modality brings to the attention.

    Attributes:
        tokens: `(B, L, d)`.
        mask: `(B, L)` in the host's convention, or None.
        prompts: `(N, d)`, extra tokens that the *other* modality attends to, or None. In any floating point dtype:
            projections take them in that of `tokens`.
        hidden_prompts: `(B, N)`, bool, True where a sample does not see a prompt; None where all see all.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None
    prompts: torch.Tensor | None
    hidden_prompts: torch.Tensor | None = None

    @property
    def num_prompts(self) -> int:
        """N, 0 where there are none."""
        return 0 if self.prompts is None else len(self.prompts)

    @property
    def length(self) -> int:
        """Tokens and prompts, L + N."""
        return self.tokens.shape[1] + self.num_prompts


# (logits (B, heads, queries, L + N), mask (B, L), N) -> masked logits. Prompts are the last columns.
MaskFunction = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


class AttentionOptions(TypedDict):
    """Keyword arguments of `bi_attention` and `fused_bi_attention`."""

    num_heads: int
    scale: float
    dropout: float
    image_mask_function: MaskFunction
    text_mask_function: MaskFunction


def hide_padding(logits: torch.Tensor, mask: torch.Tensor, num_prompts: int) -> torch.Tensor:
    """Mask convention of (MM) Grounding DINO: True marks padding. Prompts are always visible.

    Args:
        logits: `(B, heads, queries, L + num_prompts)`.
        mask: `(B, L)`, bool.
        num_prompts: how many of the last columns are prompts.
    """
    padding = F.pad(mask, (0, num_prompts), value=False)
    return logits.masked_fill(padding[:, None, None, :], float("-inf"))


def hide_invalid(logits: torch.Tensor, mask: torch.Tensor, num_prompts: int) -> torch.Tensor:
    """Mask convention of transformers' processors: 1 or True marks a token, 0 or False padding; see `hide_padding`."""
    return hide_padding(logits, mask == 0, num_prompts)


def add_validity(logits: torch.Tensor, mask: torch.Tensor, num_prompts: int) -> torch.Tensor:
    """Mask convention of GLIP: it is added to the logits, 0 after becoming -9e15. Prompts get what a valid token gets.

    A boolean mask hides nothing, as in the host: -9e15 becomes True in it. So it is with mmdetection's Grounding DINO.

    Args:
        logits: `(B, heads, queries, L + num_prompts)`.
        mask: `(B, L)`, 1 marks a token, 0 padding; any dtype.
        num_prompts: how many of the last columns are prompts.
    """
    mask = F.pad(mask, (0, num_prompts), value=1)
    return logits + mask.masked_fill(mask == 0, -9e15)[:, None, None, :]


def append_prompts(tokens: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """`(B, L, d)` and `(N, d)` to `(B, L + N, d)`, in the dtype of `tokens`."""
    return torch.cat([tokens, prompts.to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1)


def append_zeros(positions: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """`(B, L, d)` to `(B, L + N, d)`, for what is added to a sequence that prompts `(N, d)` were appended to."""
    return F.pad(positions, (0, 0, 0, len(prompts)))


def extend_mask(mask: torch.Tensor | None, tokens: torch.Tensor, prompts: Prompts) -> torch.Tensor | None:
    """A mask with a column more for each prompt, in the conventions of transformers.

    Args:
        mask: `(..., L)`. Floating point is added to the logits; of other dtypes True or 1 marks what is seen. None
            where all tokens are seen.
        tokens: `(B, L, d)`, what it is the mask of.
        prompts: what is appended to them.

    Returns:
        `(..., L + N)`; None where all tokens and all prompts are seen.
    """
    if prompts.hidden is None:
        # Zero is added to the logits of prompts, or True marks them as visible.
        return None if mask is None else F.pad(mask, (0, prompts.num_prompts), value=not mask.is_floating_point())
    if mask is None:
        mask = tokens.new_zeros(1, 1, 1, tokens.shape[1])
    columns = prompts.hidden
    if mask.is_floating_point():
        columns = mask.new_zeros(columns.shape).masked_fill(columns, torch.finfo(mask.dtype).min)
    else:
        columns = (~columns).to(mask.dtype)
    columns = columns.view(len(columns), *[1] * (mask.dim() - 2), -1)
    mask = mask.expand(len(tokens), *mask.shape[1:])
    return torch.cat([mask, columns.expand(*mask.shape[:-1], -1)], dim=-1)


def split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`(B, L, E)` to `(B, heads, L, head_dim)`."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def mask_logits(logits: torch.Tensor, keys: SideInput, mask_function: MaskFunction) -> torch.Tensor:
    """Logits `(B, heads, queries, L + N)` without what the mask of a side hides, and its hidden prompts."""
    if keys.mask is not None:
        logits = mask_function(logits, keys.mask, keys.num_prompts)
    if keys.hidden_prompts is not None:
        hidden = F.pad(keys.hidden_prompts, (keys.tokens.shape[1], 0), value=False)
        logits = logits.masked_fill(hidden[:, None, None, :], float("-inf"))
    return logits


def _attend(
    logits: torch.Tensor,
    values: torch.Tensor,
    keys: SideInput,
    mask_function: MaskFunction,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `(B, heads, queries, keys)` and attended values `(B, queries, E)`."""
    weights = mask_logits(logits, keys, mask_function).softmax(dim=-1)
    attended = F.dropout(weights, p=dropout) @ values
    return weights, attended.transpose(1, 2).flatten(2)


def bi_attention(
    image: SideInput,
    text: SideInput,
    image_side: Side,
    text_side: Side,
    *,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
    image_mask_function: MaskFunction = hide_padding,
    text_mask_function: MaskFunction = hide_padding,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Image tokens attend to text tokens and text prompts; text tokens to image tokens and prompts.

    Follows `GroundingDinoBiMultiHeadAttention.forward` (transformers 5.24) in everything that shows
    in its results: one logit matrix for both directions, the scale on the image projection after its
    bias, the maximum of the whole batch taken off, the clamp before the masks, the order of the two
    dropouts.

    Args:
        image, text: tokens, mask and prompts of the two modalities.
        image_side, text_side: their projections.
        num_heads: heads of the attention; divides the width E of the aligned space.
        scale: factor of the logits, applied to the image projection.
        dropout: probability of dropping an attention weight; 0 outside training.
        image_mask_function, text_mask_function: the host's mask conventions.

    Returns:
        `((image_out, image_weights), (text_out, text_weights))` with outputs `(B, L, d)` and weights
        `(B * heads, Nv, Nl + N)` and `(B * heads, Nl, Nv + N)`: the host's shape plus one last column
        for each prompt that the direction sees.
    """
    image_states = split_heads(image_side.query(image.tokens) * scale, num_heads)
    text_states = split_heads(text_side.query(text.tokens), num_heads)
    image_values = split_heads(image_side.value(image.tokens), num_heads)
    text_values = split_heads(text_side.value(text.tokens), num_heads)

    image_logits = image_states @ text_states.transpose(-1, -2)
    text_logits = image_logits.transpose(-1, -2)
    batch = image.tokens.shape[0]
    if text.prompts is not None:
        prompts = text.prompts.to(text.tokens.dtype)[None]
        keys = split_heads(text_side.query(prompts), num_heads)
        values = split_heads(text_side.value(prompts), num_heads)
        image_logits = torch.cat([image_logits, image_states @ keys.transpose(-1, -2)], dim=-1)
        text_values = torch.cat([text_values, values.expand(batch, -1, -1, -1)], dim=-2)
    if image.prompts is not None:
        prompts = image.prompts.to(image.tokens.dtype)[None]
        keys = split_heads(image_side.query(prompts) * scale, num_heads)
        values = split_heads(image_side.value(prompts), num_heads)
        text_logits = torch.cat([text_logits, text_states @ keys.transpose(-1, -2)], dim=-1)
        image_values = torch.cat([image_values, values.expand(batch, -1, -1, -1)], dim=-2)

    # A softmax does not see this shift, but the clamp does: it keeps half precision finite. The host
    # also takes off each text row's maximum and clamps again, which after this changes nothing.
    peak = torch.maximum(image_logits.detach().max(), text_logits.detach().max())
    image_logits = (image_logits - peak).clamp(min=-_LOGIT_BOUND)
    text_logits = (text_logits - peak).clamp(min=-_LOGIT_BOUND)

    image_weights, image_out = _attend(image_logits, text_values, text, text_mask_function, dropout)
    text_weights, text_out = _attend(text_logits, image_values, image, image_mask_function, dropout)
    return (
        (image_side.out(image_out), image_weights.flatten(0, 1)),
        (text_side.out(text_out), text_weights.flatten(0, 1)),
    )
