# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Fusion by self-attention over image and text tokens in one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from ..attention import Prompts, append_prompts, extend_mask
from .declaration import FusionHost
from .heads import Branch, Heads, call_with_gated


@dataclass(frozen=True, kw_only=True)
class JointAttentionHost(FusionHost):
    """Spec of a joint self-attention, which runs unchanged. What its heads read from prompts is added.

    If the prompts have no gates, they are appended to the sequence instead, and their rows are dropped afterwards.

    The module returns a tensor, or a tuple of a tensor and attention weights `(B, heads, L, L)`.

    Attributes:
        key: Dotted attribute name of the key projection, which is inverted.
        tokens: Name of the argument with the sequence.
        mask: Name of the argument with its mask, in transformers' conventions (see `peft_sdpt.attention.extend_mask`).
        heads: The heads, which get gates. None if they get no gates.
    """

    keeps_base_forward: ClassVar[bool] = True
    key: str
    tokens: str
    mask: str
    heads: Heads | None = None

    @property
    def inverted(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.key, *(() if self.heads is None else self.heads.needed))

    def num_heads(self, module: nn.Module) -> int | None:
        return None if self.heads is None else self.heads.number_in(module)

    def attend(
        self,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        prompts: Sequence[Prompts],
        eager: bool = False,
    ) -> Any:
        bound = self.bind(args, kwargs)
        (added,) = prompts
        branches = []
        if added.gated is not None:
            assert self.heads is not None
            branches.append(Branch(self.heads, self.projections(module)[0], added.gated))
        if added.tokens is None:
            return call_with_gated(module, args, kwargs, branches)
        tokens = bound[self.tokens]
        length = tokens.shape[1]
        mask = extend_mask(bound.get(self.mask), tokens, added)
        if mask is not None and mask.dim() > 2 and mask.shape[-2] == length > 1:
            # The rows of prompts are dropped, so it does not matter what they see.
            mask = F.pad(mask, (0, 0, 0, added.num_prompts))
        changes = {self.tokens: append_prompts(tokens, added.tokens)}
        if mask is not None:
            changes[self.mask] = mask
        args, kwargs = self.replace(args, kwargs, changes)
        outputs = call_with_gated(module, args, kwargs, branches)
        if not isinstance(outputs, tuple):
            return outputs[:, :length]
        return (outputs[0][:, :length], *(weights[..., :length, :] for weights in outputs[1:]))
