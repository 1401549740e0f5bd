# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Inverses that SDPT could have and has not: what they give is for the suite to tell."""

from __future__ import annotations

import torch
from torch import nn

from peft_sdpt import SDPTLayer
from peft_sdpt.projection import inverse_projection

RULES = ("ridge 0.1", "scaled")


@torch.no_grad()
def replace_inverses(model: nn.Module, rule: str) -> nn.Module:
    """Put other inverses into the SDPT layers of a model, which keep them while no weight changes.

    Args:
        rule: "ridge R" for `W^T (W W^T + r^2 I)^-1` with r the share R of the largest singular value; "scaled" for the
            full inverse times what makes U(-1, 1) prompts as long as the layer-normed tokens of the host, `sqrt(d)`.
    """
    for layer in [module for module in model.modules() if isinstance(module, SDPTLayer)]:
        for inverses, projection in zip(layer.sdpt_inverses, layer._projections(), strict=True):
            for name in list(inverses):
                inverses[name] = _inverse(projection, rule).to(inverses[name])
    return model


def _inverse(projection: nn.Module, rule: str) -> torch.Tensor:
    weight = projection.weight.double()
    kind, _, share = rule.partition(" ")
    if kind == "ridge":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        damped = values / (values**2 + (float(share) * values[0]) ** 2)
        return right.mT @ (damped[:, None] * left.mT)
    if kind == "scaled":
        inverse = inverse_projection(weight)
        prompts = (
            2 * torch.rand(256, weight.shape[0], generator=torch.Generator().manual_seed(0), dtype=weight.dtype) - 1
        )
        lengths = ((prompts.to(weight.device) - projection.bias) @ inverse.mT).norm(dim=-1)
        return inverse * weight.shape[1] ** 0.5 / lengths.mean()
    raise ValueError(f"there is no inverse {rule!r}; there are {RULES}")
