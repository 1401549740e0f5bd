# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Inverses that SDPT could have and has not: what they give is for the suite to tell."""

from __future__ import annotations

import torch
from torch import nn

from peft_sdpt import SDPTLayer
from peft_sdpt.inverse import inverse_projection

RULES = ("0.1 of images alone", "0.1 of text alone", "ridge 0.1", "scaled", "quiet start")


@torch.no_grad()
def replace_inverses(model: nn.Module, rule: str) -> nn.Module:
    """Put other inverses into the SDPT layers of a model, which keep them while no weight changes.

    Args:
        rule: "R of images alone" and "R of text alone" for the inverse of one modality that drops singular values below
            the share R of the largest; "ridge R" for `W^T (W W^T + r^2 I)^-1` with r that share of the largest;
            "scaled" for the full inverse times what makes U(-1, 1) prompts as long as the layer-normed tokens of the
            host, `sqrt(d)`; "quiet start" for the full inverse, and tokens that start as what becomes N(0, 1) prompts.
    """
    for layer in [module for module in model.modules() if isinstance(module, SDPTLayer)]:
        if rule == "quiet start":
            _start_quietly(layer)
            continue
        for side, (modality, projection) in enumerate(zip(("images", "text"), layer.projections, strict=True)):
            for config in layer.sdpt_config.values():
                layer.sdpt_inverses.replace_inverse(side, config.pinv_rtol, _inverse(projection, rule, modality))
    return model


def _start_quietly(layer: SDPTLayer) -> None:
    """Where the columns of both projections are independent, one token stands for any pair of prompts."""
    weights = [projection.weight.double() for projection in layer.projections]
    for name, config in layer.sdpt_config.items():
        wanted = []
        for weight, projection in zip(weights, layer.projections, strict=True):
            prompts = torch.randn(config.num_virtual_tokens, weight.shape[1]).to(weight)
            wanted.append((prompts @ weight.T + projection.bias) @ weight)
        layer.set_tokens(name, torch.cat(wanted, dim=1) @ torch.linalg.pinv(torch.cat(weights, dim=1)))


def _inverse(projection: nn.Module, rule: str, modality: str) -> torch.Tensor:
    weight = projection.weight.double()
    kind, _, share = rule.partition(" ")
    if share.endswith("alone"):
        return inverse_projection(weight, rtol=float(kind) if modality in share else None)
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
