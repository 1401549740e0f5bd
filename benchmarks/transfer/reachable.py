# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Prototype tokens as coordinates in what the two projections can reach together; the rest of a token does nothing."""

from __future__ import annotations

import torch
from torch import nn

from peft_sdpt import SDPTLayer


class ReachablePrompts(nn.Module):
    """In the place of the tokens of a layer: `(N, E)` of `(N, r)` coordinates and an orthonormal basis `(E, r)`."""

    def __init__(self, tokens: torch.Tensor, basis: torch.Tensor, adapter_name: str) -> None:
        super().__init__()
        self.sdpt_prompts = nn.Parameter(tokens @ basis)
        self.register_buffer("basis", basis, persistent=False)
        self.adapter_name = adapter_name

    def __contains__(self, adapter_name: str) -> bool:
        return adapter_name == self.adapter_name

    def __getitem__(self, adapter_name: str) -> torch.Tensor:
        return self.sdpt_prompts @ self.basis.T


@torch.no_grad()
def train_coordinates(model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """Train coordinates instead of the tokens of an adapter; what the model computes stays as it is."""
    for layer in [module for module in model.modules() if isinstance(module, SDPTLayer)]:
        # The bias is taken off before the inverse, which therefore acts on what the columns span alone.
        columns = torch.cat([projection.weight for projection in layer._projections()], dim=1).double()
        left, values, _ = torch.linalg.svd(columns, full_matrices=False)
        basis = left[:, values > values[0] * 1e-9]
        tokens = layer.sdpt_prompts[adapter_name]
        layer.sdpt_prompts = ReachablePrompts(tokens.data, basis.to(tokens), adapter_name)
    return model
