# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The same host with query projections of images that are harder to invert.

Logits of a fusion layer are products of image and text queries, head by head. They do not change when one is multiplied
by an invertible matrix and the other by its transposed inverse. So there are hosts of one function whose projections
have any condition number, which trained hosts differ in, and what an inverse does to prompts can be told from all else.

Matrices that have nothing to do with one another would not do: over all heads together their effects even out.
"""

from __future__ import annotations

import torch
from torch import nn

from peft_sdpt.hosts import find_hosts


@torch.no_grad()
def make_ill_conditioned(host: nn.Module, condition: float, seed: int = 0) -> nn.Module:
    """Change the query projections of all fusion layers, and nothing that the host computes.

    That of images, `W`, becomes `W D`, in all heads, with singular values of `D` that are spread evenly in logarithms.

    Args:
        host: of the Grounding DINO kind, with heads as wide as its image tokens.
        condition: that of `D`.
        seed: of its directions.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, declaration in find_hosts(host).items():
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
