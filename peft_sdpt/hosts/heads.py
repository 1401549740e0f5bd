# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Gates in an attention that the base model computes: what its heads read from prompts is added before they are mixed.

The forward of the base model runs unchanged. For the time of a call, a hook sees the queries, and another one adds
what the heads read from prompts to the input of the output projection. So projections are called and never read, and
may be quantised or have LoRA.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..attention import GatedPrompts, read_gated, split_heads
from .declaration import attribute_of, is_a


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Where an attention that the base model computes has its heads. With this, its prompts have gates.

    The module must call the projections `query` and `out` as modules, with states `(B, L, E)`, and `query` before
    `out`.

    Attributes:
        query, value: Dotted attribute names of these projections.
        out: Dotted attribute name of the output projection. None if the adapted module has none and returns what its
            heads have read, as a tensor or first in a tuple.
        number: Dotted attribute name of the number of heads.
        scale: Dotted attribute name of the factor of the logits. None for `head_dim ** -0.5`.
        dropout: Dotted attribute name of what drops attention weights in training: a module or a probability. None if
            nothing does.
    """

    query: str
    value: str
    out: str | None = None
    number: str
    scale: str | None = None
    dropout: str | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """Dotted names of the attributes that the adapted module must have."""
        return tuple(
            name
            for name in (self.query, self.value, self.out, self.number, self.scale, self.dropout)
            if name is not None
        )

    def number_in(self, module: nn.Module) -> int:
        """Return the number of heads in a module."""
        return int(attribute_of(module, self.number))

    def read(self, module: nn.Module, key: nn.Linear, queries: torch.Tensor, gated: GatedPrompts) -> torch.Tensor:
        """Return what projected queries `(B, L, E)` read from gated prompts, `(B, L, E)`.

        Args:
            module: The adapted module.
            key: Its key projection.
            queries: Output of its query projection.
            gated: The prompts.
        """
        states = split_heads(queries, self.number_in(module))
        scale = states.shape[-1] ** -0.5 if self.scale is None else float(attribute_of(module, self.scale))
        dropout = 0.0
        if self.dropout is not None and module.training:
            drop = attribute_of(module, self.dropout)
            dropout = float(getattr(drop, "p", drop))
        read, _ = read_gated(states, gated, key, attribute_of(module, self.value), scale, dropout)
        return read.transpose(1, 2).flatten(2)


def bert_heads(attention: str, out: str, dropout: str = "dropout") -> Heads:
    """Return the heads of an attention with BERT's names.

    Args:
        attention: Dotted attribute name of the module with the projections of queries, keys and values.
        out: Dotted attribute name of the output projection.
        dropout: Name of the dropout in the attention.
    """
    return Heads(
        query=f"{attention}.query",
        value=f"{attention}.value",
        out=out,
        number=f"{attention}.num_attention_heads",
        dropout=f"{attention}.{dropout}",
    )


class Branch(NamedTuple):
    """Gated prompts of one attention of a module, its heads, and its key projection."""

    heads: Heads
    key: nn.Linear
    gated: GatedPrompts


def call_with_gated(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], branches: Sequence[Branch]
) -> Any:
    """Return what `module(*args, **kwargs)` returns if its heads also read gated prompts.

    Args:
        module: The adapted module.
        args, kwargs: Arguments of the call.
        branches: The attentions that read prompts. Without any, the module is called as it is.

    Raises:
        ValueError: An attention calls its output projection with arguments by name, or without having called its query
            projection.
    """
    return _call_with_hooks(module, args, kwargs, branches) if branches else module(*args, **kwargs)


# Compiled code does not look for hooks that were added later, so the module is not compiled.
@torch.compiler.disable
def _call_with_hooks(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], branches: Sequence[Branch]
) -> Any:
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as hooks:
            readings = [_Reading(module, branch, hooks) for branch in branches]
            outputs = function(*args, **kwargs)
            for reading in readings:
                outputs = reading.added_to_outputs(outputs)
            return outputs

    layer: Any = module  # `nn.Module` does not declare the attributes
    if not (
        is_a(module, ("GradientCheckpointingLayer",))
        and layer.gradient_checkpointing
        and module.training
        and torch.is_grad_enabled()
    ):
        return run(module, *args, **kwargs)
    # The layer checkpoints its own forward, which needs the hooks again when the backward pass repeats it.
    checkpoint = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda function, *args: checkpoint(partial(run, function), *args)
    try:
        return module(*args, **kwargs)
    finally:
        layer._gradient_checkpointing_func = checkpoint


class _Reading:
    """The hooks of one branch in one call of a module, which are removed when `hooks` is closed."""

    def __init__(self, module: nn.Module, branch: Branch, hooks: ExitStack) -> None:
        self.module = module
        self.branch = branch
        self.queries: torch.Tensor | None = None
        # Other threads may call the module at the same time, and hooks belong to the module.
        self.thread = threading.get_ident()
        query = attribute_of(module, branch.heads.query)
        hooks.callback(query.register_forward_hook(self.see_queries).remove)
        if branch.heads.out is not None:
            out = attribute_of(module, branch.heads.out)
            hooks.callback(out.register_forward_pre_hook(self.added_to_input).remove)

    def see_queries(self, query: nn.Module, args: Any, output: torch.Tensor) -> None:
        if threading.get_ident() == self.thread:
            self.queries = output

    def added_to_input(self, out: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if threading.get_ident() != self.thread:
            return None
        if not args:
            raise ValueError(
                f"{type(self.module).__name__} calls '{self.branch.heads.out}' with arguments by name, so its prompts "
                "cannot have gates. Remove `heads` from the spec of this fusion layer."
            )
        return (self.added(args[0]), *args[1:])

    def added_to_outputs(self, outputs: Any) -> Any:
        if self.branch.heads.out is not None:
            return outputs
        return (self.added(outputs[0]), *outputs[1:]) if isinstance(outputs, tuple) else self.added(outputs)

    def added(self, states: torch.Tensor) -> torch.Tensor:
        """Add what the queries read from prompts to what they have read from the base model's tokens."""
        heads, key, gated = self.branch
        if self.queries is None:
            raise ValueError(
                f"{type(self.module).__name__} has not called '{heads.query}' before its output projection, so its "
                "prompts cannot have gates. Remove `heads` from the spec of this fusion layer."
            )
        queries, self.queries = self.queries, None
        return states + heads.read(self.module, key, queries, gated).to(states.dtype)
