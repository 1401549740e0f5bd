# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of a fusion layer, with prompts as extra keys and values.

`bi_attention` is the method's own (arXiv 2407.11414, section 3): same result as appending the prompts to both inputs
and dropping their rows from both outputs, because a softmax is taken per row; prompt rows are never computed.
`fused_bi_attention` is the same again, without the projections of image tokens. Hosts with other attentions run as they
are, on a longer context: `append_prompts`, `append_zeros` and `extend_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# The bound of the hosts' own clamps: half precision ends at 65504.
_LOGIT_BOUND = 50000.0


class Side(NamedTuple):
    """The three projections of one modality: `query` is also what the other modality attends to."""

    query: nn.Module
    value: nn.Module
    out: nn.Module


class Prompts(NamedTuple):
    """Prompts of one side of a fusion layer.

    Attributes:
        tokens: `(N, d)`, in the side's input space; None where the side has none.
        hidden: `(B, N)`, bool, True where a sample does not see a prompt; None where all see all.
    """

    tokens: torch.Tensor | None
    hidden: torch.Tensor | None = None


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
        # Nothing is added to the logits of prompts; they are seen.
        return None if mask is None else F.pad(mask, (0, len(prompts.tokens)), value=not mask.is_floating_point())
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


def _split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`(B, L, E)` to `(B, heads, L, head_dim)`."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _mask(logits: torch.Tensor, keys: SideInput, mask_function: MaskFunction) -> torch.Tensor:
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
    weights = _mask(logits, keys, mask_function).softmax(dim=-1)
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
    image_states = _split_heads(image_side.query(image.tokens) * scale, num_heads)
    text_states = _split_heads(text_side.query(text.tokens), num_heads)
    image_values = _split_heads(image_side.value(image.tokens), num_heads)
    text_values = _split_heads(text_side.value(text.tokens), num_heads)

    image_logits = image_states @ text_states.transpose(-1, -2)
    text_logits = image_logits.transpose(-1, -2)
    batch = image.tokens.shape[0]
    if text.prompts is not None:
        prompts = text.prompts.to(text.tokens.dtype)[None]
        keys = _split_heads(text_side.query(prompts), num_heads)
        values = _split_heads(text_side.value(prompts), num_heads)
        image_logits = torch.cat([image_logits, image_states @ keys.transpose(-1, -2)], dim=-1)
        text_values = torch.cat([text_values, values.expand(batch, -1, -1, -1)], dim=-2)
    if image.prompts is not None:
        prompts = image.prompts.to(image.tokens.dtype)[None]
        keys = _split_heads(image_side.query(prompts) * scale, num_heads)
        values = _split_heads(image_side.value(prompts), num_heads)
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


def absorbing_pays(image_length: int, text_length: int, weight: torch.Tensor, num_heads: int) -> bool:
    """Whether `fused_bi_attention` multiplies less than `bi_attention`; not so with a long text and a small image.

    Args:
        image_length, text_length: tokens and prompts of each modality.
        weight: `(E, dv)` of a projection of image tokens.
        num_heads: heads of the attention.
    """
    width, dim = weight.shape
    absorbed = 3 * image_length * text_length * dim * num_heads + 5 * text_length * width * dim
    projected = 3 * image_length * text_length * width + 3 * (image_length + text_length) * width * dim
    return absorbed < projected


def fused_bi_attention(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of `bi_attention`, without its weights and without ever projecting an image token.

    Attention is linear in what it projects, so the projections of the many image tokens are absorbed by the few text
    tokens, head by head: `(v W_q^T) k^T = v (k W_q)^T` for the logits, `P (t W_o^T)` for what image tokens read and
    `(P v) W_v^T` for what text tokens read. The products that are left are those of the attention itself, with image
    tokens as queries, keys and values of all heads. A bias of the image's queries shifts all logits of a key, and those
    of a text token by the same number, which a softmax does not see. Prompts are appended; the rows that image prompts
    have in the logits are read by the text alone.

    Args:
        image, text, num_heads, scale, dropout, image_mask_function, text_mask_function: as of `bi_attention`. A mask
            function may only add to the logits.
        image_side: its projections are plain linear layers, whose weights are taken without calling them.
        text_side: as of `bi_attention`.

    Returns:
        `(image_out, text_out)`, each `(B, L, d)`.
    """
    image_tokens = image.tokens if image.prompts is None else append_prompts(image.tokens, image.prompts)
    text_tokens = text.tokens if text.prompts is None else append_prompts(text.tokens, text.prompts)
    image_length, text_length = image.tokens.shape[1], text.tokens.shape[1]

    keys = _split_heads(text_side.query(text_tokens) * scale, num_heads)
    values = _split_heads(text_side.value(text_tokens), num_heads)
    query_weight = image_side.query.weight.unflatten(0, (num_heads, -1))  # (heads, head_dim, dv)
    out_weight = image_side.out.weight.unflatten(1, (num_heads, -1)).permute(1, 2, 0)  # (heads, head_dim, dv)
    keys_of_image = keys @ query_weight  # (B, heads, K, dv)
    values_of_image = values @ out_weight  # (B, heads, K, dv)
    text_bias = _added(text, text_mask_function)  # of each key of the image: (B, heads or 1, 1, K)
    if image_side.query.bias is not None:
        shift = keys @ image_side.query.bias.view(num_heads, -1, 1)
        text_bias = shift.mT if text_bias is None else shift.mT + text_bias
    image_bias = _added(image, image_mask_function)  # of each key of the text: (B, 1, 1, M)

    if dropout == 0.0 and _kernels_pay(image_tokens, keys):
        image_out = F.scaled_dot_product_attention(
            image.tokens[:, None].expand(-1, num_heads, -1, -1),
            keys_of_image,
            values_of_image,
            attn_mask=text_bias,
            scale=1.0,
        ).sum(1)
        read = F.scaled_dot_product_attention(
            keys_of_image[:, :, :text_length].flatten(1, 2)[:, None],
            image_tokens[:, None],
            image_tokens[:, None],
            attn_mask=image_bias,
            scale=1.0,
        )[:, 0]
        total = None
    else:
        # One product for both directions: (B, M, heads * K), then (B, M, heads, K).
        logits = (image_tokens @ keys_of_image.flatten(1, 2).mT).unflatten(-1, (num_heads, -1))
        image_logits, text_logits = logits[:, :image_length], logits[..., :text_length].permute(0, 2, 3, 1)
        if text_bias is not None:
            image_logits = image_logits + text_bias.transpose(1, 2)
        if image_bias is not None:
            text_logits = text_logits + image_bias
        image_weights = F.dropout(image_logits.softmax(-1), p=dropout)
        text_weights = F.dropout(text_logits.softmax(-1), p=dropout)
        image_out = image_weights.flatten(2) @ values_of_image.flatten(1, 2)
        read = text_weights.flatten(1, 2) @ image_tokens
        # Of weights that were dropped the rest does not add up to 1, which the bias of values has to be told.
        total = text_weights.sum(-1, keepdim=True) if dropout else None
    if image_side.out.bias is not None:
        image_out = image_out + image_side.out.bias

    value_weight = image_side.value.weight.unflatten(0, (num_heads, -1))
    text_out = read.unflatten(1, (num_heads, text_length)) @ value_weight.mT  # (B, heads, Nl, head_dim)
    if image_side.value.bias is not None:
        bias = image_side.value.bias.view(num_heads, 1, -1)
        text_out = text_out + (bias if total is None else total * bias)
    return image_out, text_side.out(text_out.transpose(1, 2).flatten(2))


def _added(side: SideInput, mask_function: MaskFunction) -> torch.Tensor | None:
    """What the mask of a side and its hidden prompts add to the logits, `(B, 1, 1, L + N)`; None where nothing."""
    if side.mask is None and side.hidden_prompts is None:
        return None
    nothing = side.tokens.new_zeros(len(side.tokens), 1, 1, side.length)
    return _mask(nothing, side, mask_function).to(side.tokens.dtype)


# Measured on CPUs (docs/performance.md): without gradients, kernels that never hold all weights pay from these lengths.
_LONG_TEXT, _LARGE_IMAGE = 128, 2048


def _kernels_pay(image_tokens: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether `scaled_dot_product_attention` is to be called: it takes four products of the size of the logits where
    three do, and holds none of them in memory. In half precision it also sums in single precision."""
    if image_tokens.device.type != "cpu" or image_tokens.dtype in (torch.float16, torch.bfloat16):
        return True
    long = keys.shape[-2] >= _LONG_TEXT and image_tokens.shape[1] >= _LARGE_IMAGE
    return long and not torch.is_grad_enabled()
