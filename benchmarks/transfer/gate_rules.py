# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Other gates and other standard deviations of initial tokens, which the suite compares with the defaults of SDPT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from peft_sdpt import SDPTLayer

# For each rule, the factors of what heads read from prompts, given the gates `(sides, groups, heads)`. The default is
# `tanh`.
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "bounded by 2": lambda gates: 2 * (gates / 2).tanh(),
    "bounded by 3": lambda gates: 3 * (gates / 3).tanh(),
    "unbounded": lambda gates: gates,
    "as a square root": lambda gates: gates / (1 + gates.abs()).sqrt(),
    "as a logarithm": torch.asinh,
    # One gate for all heads: their sum, so that it moves as fast as a gate of its own.
    "one per layer": lambda gates: gates.sum(-1, keepdim=True).tanh().expand_as(gates),
}


def change_gates(model: nn.Module, rule: str) -> nn.Module:
    """Let the gates of an SDPT adapter stand for other factors.

    Args:
        model: A model with an SDPT adapter that has gates.
        rule: A key of `RULES`.
    """
    for layer in [module for module in model.modules() if isinstance(module, SDPTLayer)]:
        layer.gate_factors = partial(_factors, layer, rule)  # type: ignore[method-assign]
    return model


def _factors(layer: SDPTLayer, rule: str, adapter_name: str, scale: float | None = None) -> Tensor:
    scale = layer.sdpt_scale[adapter_name] if scale is None else scale
    return RULES[rule](layer.sdpt_gates[adapter_name]) * scale


@torch.no_grad()
def start_with_std(model: nn.Module, std: float) -> nn.Module:
    """Give the initial tokens of an SDPT adapter, which are random, another standard deviation."""
    for layer in [module for module in model.modules() if isinstance(module, SDPTLayer)]:
        for prompts in layer.sdpt_prompts.values():
            prompts.mul_(std / prompts.std())
    return model
