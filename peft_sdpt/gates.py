# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Gates of prompts: how many a fusion layer has, their initial values, and the factors that they stand for."""

from __future__ import annotations

import torch
from torch import nn

from .config import SDPTConfig
from .hosts import FusionHost


def gate_sides_and_heads(config: SDPTConfig, spec: FusionHost, heads: int | None) -> list[int] | None:
    """Return the numbers of sides and of heads of a fusion layer that have gates; None if it has no gates.

    A side whose prompts are hidden has no gates, because parameters without gradients stop distributed training.
    """
    if config.prompt_gate is None or heads is None:
        return None
    return [spec.num_sides if config.image_attends_prompts or spec.image_reads is None else spec.num_sides - 1, heads]


def init_gates(config: SDPTConfig, shape: tuple[int, ...]) -> torch.Tensor:
    """Create gates of this shape: zeros, or random numbers with `init_weights=False`; float32."""
    gates = torch.zeros(shape, device="cpu", dtype=torch.float32)
    return nn.init.normal_(gates) if config.init_weights is False else gates


def factors_of(gates: torch.Tensor) -> torch.Tensor:
    """Return the factors of what heads read from prompts, between -1 and 1, in the shape of the gates."""
    return gates.tanh()


def gates_of(factors: torch.Tensor) -> torch.Tensor:
    """Return the gates that stand for these factors, in float64 precision; the inverse of `factors_of`.

    Raises:
        ValueError: A factor is not between -1 and 1.
    """
    if (largest := factors.abs().max().item()) >= 1:
        raise ValueError(f"a gate stands for a factor between -1 and 1, got {largest:.3g}")
    return factors.cpu().double().atanh()  # not every device has double precision
