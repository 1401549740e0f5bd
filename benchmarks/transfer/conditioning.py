# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The same base model with image projections that are harder to invert.

The logits of a fusion layer are products of projected image and text tokens, for each head. They do not change if one
projection is multiplied by an invertible matrix and the other by its transposed inverse. So base models that compute
the same function can have projections with any condition number. This separates the effect of the inverse on prompts
from all other differences between base models.

The matrices of all heads are related, because the effects of independent matrices would even out over the heads.
"""

from __future__ import annotations

import torch
from torch import nn

from peft_sdpt.hosts import find_hosts


@torch.no_grad()
def make_ill_conditioned(host: nn.Module, condition: float, seed: int = 0) -> nn.Module:
    """Change the projections of all fusion layers, without changing what the base model computes.

    In all heads, the image projection `W` becomes `W D`. The singular values of `D` are spaced evenly on a logarithmic
    scale.

    Args:
        host: A Grounding DINO or MM Grounding DINO whose heads are as wide as its image tokens.
        condition: Condition number of `D`.
        seed: Seed of the singular vectors of `D`.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, declaration in find_hosts(host).items():
        if not declaration.adapted_by_default:
            continue
        layer = host.get_submodule(name)
        image, text = declaration.projections(layer)
        width = image.in_features
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        spread = torch.diag(condition ** torch.linspace(-0.5, 0.5, width, dtype=torch.float64))
        change = basis @ spread @ basis.T
        for head in range(layer.num_heads):
            rows = slice(head * width, (head + 1) * width)
            weight = image.weight[rows].double().cpu()
            matrix = weight @ change @ torch.linalg.inv(weight)
            for projection, factor in ((image, matrix), (text, torch.linalg.inv(matrix).T)):
                for parameter in (projection.weight, projection.bias):
                    parameter[rows] = (factor @ parameter[rows].double().cpu()).to(parameter)
    return host
