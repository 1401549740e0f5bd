# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Fusion in one direction: tokens attend to a context with separate query, key and value projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..attention import Prompts, append_prompts, append_zeros, extend_mask
from .declaration import FusionHost
from .heads import Branch, Heads, call_with_gated


@dataclass(frozen=True, kw_only=True)
class Context:
    """A sequence that queries attend to. Prompts without gates are appended to it, and act as keys and values.

    Attributes:
        key: Dotted attribute name of the key projection, which is inverted.
        tokens: Names of the arguments with the sequence: one, or one for the keys and one for the values. Prompts are
            appended to each.
        zeros: Arguments that are added to the sequence, for instance position encodings. Zeros are appended to them.
        mask: Name of the argument with its mask, in transformers' conventions (see `peft_sdpt.attention.extend_mask`).
            None if the module has no mask.
        mask_is_obeyed: Whether the module applies the mask. Only then can prompts be hidden from some samples. Prompts
            with gates need no mask for this.
        heads: The heads that read the sequence, which get gates. None if they get no gates.
    """

    key: str
    tokens: tuple[str, ...]
    zeros: tuple[str, ...] = ()
    mask: str | None = None
    mask_is_obeyed: bool = True
    heads: Heads | None = None


@dataclass(frozen=True, kw_only=True)
class CrossAttentionHost(FusionHost):
    """Spec of a module with cross-attention, which runs unchanged. What its heads read from prompts is added.

    If the prompts have no gates, it runs with a longer context instead.

    Attributes:
        contexts: The sequences that its queries attend to: one, or two of the same dimension. The prompts have gates
            if all contexts have `heads`, of equal number.
    """

    keeps_base_forward: ClassVar[bool] = True
    contexts: tuple[Context, ...]

    @property
    def inverted(self) -> tuple[str, ...]:
        return tuple(context.key for context in self.contexts)

    @property
    def needed(self) -> tuple[str, ...]:
        heads = [context.heads.needed for context in self.contexts if context.heads is not None]
        return (*self.inverted, *(name for names in heads for name in names))

    def num_heads(self, module: nn.Module) -> int | None:
        numbers = {None if context.heads is None else context.heads.number_in(module) for context in self.contexts}
        return numbers.pop() if len(numbers) == 1 else None

    def attend(
        self,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        prompts: Sequence[Prompts],
        eager: bool = False,
    ) -> Any:
        bound = self.bind(args, kwargs)
        changes = {}
        branches = []
        for context, key, added in zip(self.contexts, self.projections(module), prompts, strict=True):
            tokens = bound.get(context.tokens[0])
            if tokens is None:
                continue
            if added.gated is not None:
                assert context.heads is not None
                branches.append(Branch(context.heads, key, added.gated))
            if added.tokens is None:
                continue
            changes.update({name: append_prompts(bound[name], added.tokens) for name in context.tokens})
            changes.update(
                {name: append_zeros(bound[name], added.tokens) for name in context.zeros if bound.get(name) is not None}
            )
            if added.mask is not None and not (context.mask and context.mask_is_obeyed):
                raise ValueError(f"{self.class_names[0]} has no mask that could hide prompts from some samples")
            if context.mask is None:
                continue
            mask = extend_mask(bound.get(context.mask), tokens, added)
            if mask is not None:
                changes[context.mask] = mask
        args, kwargs = self.replace(args, kwargs, changes)
        return call_with_gated(module, args, kwargs, branches)
