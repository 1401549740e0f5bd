# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of a fusion layer, with prompts as extra keys and values.

`bi_attention` is the attention of the method (arXiv 2407.11414, section 3). Without gates, it gives the same result as
appending the prompts to both inputs and dropping their rows from both outputs, because a softmax is taken per row, and
it never computes the rows of prompts. With gates, prompts have a softmax of their own, and a gate for each head scales
what is read from them: `W_out concat_h(host_h + gate_h softmax(q_h k_h) v_h)`. `fused_attention` computes
the same without projecting image tokens. Base models with other attentions run unchanged on a longer context, which
`append_prompts`, `append_zeros` and `extend_mask` make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import nn

# The bound of the base models' own clamps. The largest number in half precision is 65504.
_LOGIT_BOUND = 50000.0


class Side(NamedTuple):
    """The three projections of one modality. The other modality attends to `query`.

    They are `nn.Linear`, or act like it: another tuner's layer or a quantised layer.
    """

    query: nn.Linear
    value: nn.Linear
    out: nn.Linear


class GatedPrompts(NamedTuple):
    """Prompts with a softmax of their own. What heads read from them is added to what they read from tokens.

    Attributes:
        tokens: Prompts in the input space of a side, `(N, d)`, in groups that follow one another. `(B, N, d)` if each
            sample has its own.
        sizes: Number of prompts of each of the G groups. Each group has its own softmax.
        gates: `(B or 1, G, heads)`, the factor of what a head reads from a group. Zero adds nothing.
    """

    tokens: torch.Tensor
    sizes: tuple[int, ...]
    gates: torch.Tensor

    @property
    def num_prompts(self) -> int:
        """Number N of prompts."""
        return self.tokens.shape[-2]

    @property
    def gate_of_prompts(self) -> torch.Tensor:
        """The gate of each prompt, `(B or 1, heads, N, 1)`."""
        gates = [
            gate[..., None].expand(-1, -1, size) for gate, size in zip(self.gates.unbind(1), self.sizes, strict=True)
        ]
        return torch.cat(gates, dim=-1)[..., None]


class Prompts(NamedTuple):
    """Prompts of one side of a fusion layer.

    Attributes:
        tokens: Prompts in the input space of the side, `(N, d)`, or `(B, N, d)` if each sample has its own. None if the
            side has no prompts without gates.
        mask: `(B, N)`, bool, True if a sample does not see a prompt; None if all samples see all prompts.
        gated: Prompts with gates, or None.
    """

    tokens: torch.Tensor | None
    mask: torch.Tensor | None = None
    gated: GatedPrompts | None = None

    @property
    def num_prompts(self) -> int:
        """Number N of prompts."""
        return 0 if self.tokens is None else self.tokens.shape[-2]


class SideInput(NamedTuple):
    """The input of one modality to the attention.

    Attributes:
        tokens: `(B, L, d)`.
        mask: `(B, L)` in the convention of the base model, or None.
        prompts: Extra tokens that the *other* modality attends to, `(N, d)`, or `(B, N, d)` if each sample has its own,
            or None. They may have any floating point dtype, and are cast to that of `tokens`.
        prompt_mask: `(B, N)`, bool, True if a sample does not see a prompt; None if all samples see all prompts.
        gated: Prompts with gates that the other modality reads, or None.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None
    prompts: torch.Tensor | None
    prompt_mask: torch.Tensor | None = None
    gated: GatedPrompts | None = None

    @property
    def num_prompts(self) -> int:
        """Number N of prompts."""
        return 0 if self.prompts is None else self.prompts.shape[-2]

    @property
    def length(self) -> int:
        """Number of tokens and prompts, L + N."""
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
    """Apply a mask in the convention of (MM) Grounding DINO: True marks padding. Prompts are always visible.

    Args:
        logits: `(B, heads, queries, L + num_prompts)`.
        mask: `(B, L)`, bool.
        num_prompts: Number of prompts, which are the last columns.
    """
    padding = F.pad(mask, (0, num_prompts), value=False)
    return logits.masked_fill(padding[:, None, None, :], float("-inf"))


def hide_invalid(logits: torch.Tensor, mask: torch.Tensor, num_prompts: int) -> torch.Tensor:
    """Apply a mask in the convention of transformers' processors: 1 or True marks a token. See `hide_padding`."""
    return hide_padding(logits, mask == 0, num_prompts)


def add_validity(logits: torch.Tensor, mask: torch.Tensor, num_prompts: int) -> torch.Tensor:
    """Apply a mask in the convention of GLIP: it is added to the logits, with 0 replaced by -9e15.

    Prompts are treated like valid tokens. A boolean mask hides nothing, as in the base model, because -9e15 becomes
    True in it. mmdetection's Grounding DINO passes such a mask.

    Args:
        logits: `(B, heads, queries, L + num_prompts)`.
        mask: `(B, L)`, any dtype. 1 marks a token, 0 marks padding.
        num_prompts: Number of prompts, which are the last columns.
    """
    mask = F.pad(mask, (0, num_prompts), value=1)
    return logits + mask.masked_fill(mask == 0, -9e15)[:, None, None, :]


def append_prompts(tokens: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Append prompts to tokens `(B, L, d)`. Returns `(B, L + N, d)` in the dtype of `tokens`.

    Args:
        tokens: `(B, L, d)`.
        prompts: `(N, d)`, or `(B, N, d)` if each sample has its own.
    """
    # Not `len`, which would fix the batch size of a program that `torch.export` makes.
    return torch.cat([tokens, prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1)], dim=1)


def append_zeros(positions: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Append a zero vector per prompt `(..., N, d)` to position encodings `(B, L, d)`. Returns `(B, L + N, d)`."""
    return F.pad(positions, (0, 0, 0, prompts.shape[-2]))


def _with_batch(prompts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return prompts `(N, d)` or `(B, N, d)` as `(1 or B, N, d)` in this dtype."""
    return prompts.to(dtype) if prompts.dim() == 3 else prompts.to(dtype)[None]


def extend_mask(mask: torch.Tensor | None, tokens: torch.Tensor, prompts: Prompts) -> torch.Tensor | None:
    """Append a column for each prompt to a mask in the conventions of transformers.

    Args:
        mask: `(..., L)`. A floating point mask is added to the logits. In a mask of another dtype, True or 1 marks a
            visible token. None if all tokens are visible.
        tokens: Tokens that the mask belongs to, `(B, L, d)`.
        prompts: Prompts that are appended to them.

    Returns:
        `(..., L + N)`, or None if all tokens and all prompts are visible.
    """
    if prompts.mask is None:
        # Zero is added to the logits of prompts, or True marks them as visible.
        return None if mask is None else F.pad(mask, (0, prompts.num_prompts), value=not mask.is_floating_point())
    if mask is None:
        mask = tokens.new_zeros(1, 1, 1, tokens.shape[1])
    columns = prompts.mask
    if mask.is_floating_point():
        columns = mask.new_zeros(columns.shape).masked_fill(columns, torch.finfo(mask.dtype).min)
    else:
        columns = (~columns).to(mask.dtype)
    columns = columns.view(len(columns), *[1] * (mask.dim() - 2), -1)
    mask = mask.expand(tokens.shape[0], *mask.shape[1:])
    return torch.cat([mask, columns.expand(*mask.shape[:-1], -1)], dim=-1)


def split_heads(states: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Split `(B, L, E)` into heads: `(B, heads, L, head_dim)`."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def mask_logits(logits: torch.Tensor, keys: SideInput, mask_function: MaskFunction) -> torch.Tensor:
    """Apply the mask of a side and the mask of its prompts to logits `(B, heads, queries, L + N)`."""
    if keys.mask is not None:
        logits = mask_function(logits, keys.mask, keys.num_prompts)
    if keys.prompt_mask is not None:
        hidden = F.pad(keys.prompt_mask, (keys.tokens.shape[1], 0), value=False)
        logits = logits.masked_fill(hidden[:, None, None, :], float("-inf"))
    return logits


def softmax_by_group(logits: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Take a softmax over each group of the last dimension, whose sizes are given."""
    if len(sizes) == 1:
        return logits.softmax(dim=-1)
    return torch.cat([part.softmax(dim=-1) for part in logits.split(list(sizes), dim=-1)], dim=-1)


def read_gated(
    queries: torch.Tensor,
    gated: GatedPrompts,
    key: nn.Linear,
    value: nn.Linear,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what queries read from gated prompts, before the output projection.

    Args:
        queries: Projected queries of all heads, `(B, heads, L, head_dim)`.
        gated: The prompts.
        key, value: Projections of the prompts.
        scale: Factor of the keys.
        dropout: Probability of dropping an attention weight.

    Returns:
        What is added to the attended values, `(B, heads, L, head_dim)`, and the weights times the gates,
        `(B, heads, L, N)`.
    """
    num_heads = queries.shape[1]
    tokens = _with_batch(gated.tokens, queries.dtype)
    keys = split_heads(key(tokens) * scale, num_heads)
    values = split_heads(value(tokens), num_heads)
    gates = gated.gate_of_prompts.mT
    weights = softmax_by_group(queries @ keys.mT, gated.sizes) * gates.to(queries.dtype)
    return F.dropout(weights, p=dropout) @ values, weights


def _attend(
    logits: torch.Tensor,
    values: torch.Tensor,
    keys: SideInput,
    mask_function: MaskFunction,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention weights `(B, heads, queries, keys)` and attended values `(B, queries, E)`."""
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
    """Let image tokens attend to text tokens and text prompts, and text tokens to image tokens and image prompts.

    The function follows `GroundingDinoBiMultiHeadAttention.forward` (transformers 5.24) in everything that changes its
    results: one logit matrix for both directions, the scale on the image projection after its bias, the subtraction of
    the maximum of the whole batch, the clamp before the masks, and the order of the two dropouts.

    Args:
        image, text: Tokens, mask and prompts of the two modalities.
        image_side, text_side: Projections of the two modalities.
        num_heads: Number of heads of the attention. It divides the dimension E of the aligned space.
        scale: Factor of the logits, applied to the image projection.
        dropout: Probability of dropping an attention weight; 0 outside training.
        image_mask_function, text_mask_function: Mask conventions of the base model.

    Returns:
        `((image_out, image_weights), (text_out, text_weights))` with outputs `(B, L, d)` and weights
        `(B * heads, Nv, Nl + N)` and `(B * heads, Nl, Nv + N)`: the base model's shape with one more column at the end
        for each prompt that the direction sees. The columns of gated prompts come last, and have the weights of their
        own softmax times the gate.
    """
    image_states = split_heads(image_side.query(image.tokens) * scale, num_heads)
    text_states = split_heads(text_side.query(text.tokens), num_heads)
    image_values = split_heads(image_side.value(image.tokens), num_heads)
    text_values = split_heads(text_side.value(text.tokens), num_heads)

    image_logits = image_states @ text_states.transpose(-1, -2)
    text_logits = image_logits.transpose(-1, -2)
    batch = image.tokens.shape[0]
    if text.prompts is not None:
        prompts = _with_batch(text.prompts, text.tokens.dtype)
        keys = split_heads(text_side.query(prompts), num_heads)
        values = split_heads(text_side.value(prompts), num_heads)
        image_logits = torch.cat([image_logits, image_states @ keys.transpose(-1, -2)], dim=-1)
        text_values = torch.cat([text_values, values.expand(batch, -1, -1, -1)], dim=-2)
    if image.prompts is not None:
        prompts = _with_batch(image.prompts, image.tokens.dtype)
        keys = split_heads(image_side.query(prompts) * scale, num_heads)
        values = split_heads(image_side.value(prompts), num_heads)
        text_logits = torch.cat([text_logits, text_states @ keys.transpose(-1, -2)], dim=-1)
        image_values = torch.cat([image_values, values.expand(batch, -1, -1, -1)], dim=-2)

    # A softmax does not depend on this shift, but the clamp does: it keeps half precision finite. The base model also
    # subtracts the maximum of each text row and clamps again, which changes nothing after this.
    peak = torch.maximum(image_logits.detach().max(), text_logits.detach().max())
    image_logits = (image_logits - peak).clamp(min=-_LOGIT_BOUND)
    text_logits = (text_logits - peak).clamp(min=-_LOGIT_BOUND)

    image_weights, image_out = _attend(image_logits, text_values, text, text_mask_function, dropout)
    text_weights, text_out = _attend(text_logits, image_values, image, image_mask_function, dropout)
    if text.gated is not None:
        read, weights = read_gated(image_states, text.gated, text_side.query, text_side.value, dropout=dropout)
        image_out = image_out + read.transpose(1, 2).flatten(2)
        image_weights = torch.cat([image_weights, weights], dim=-1)
    if image.gated is not None:
        read, weights = read_gated(text_states, image.gated, image_side.query, image_side.value, scale, dropout)
        text_out = text_out + read.transpose(1, 2).flatten(2)
        text_weights = torch.cat([text_weights, weights], dim=-1)
    return (
        (image_side.out(image_out), image_weights.flatten(0, 1)),
        (text_side.out(text_out), text_weights.flatten(0, 1)),
    )
