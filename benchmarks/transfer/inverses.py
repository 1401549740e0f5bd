# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Other inverses for SDPT, which the suite compares with those that its config can select."""

from __future__ import annotations

import torch
from torch import nn

from peft_sdpt import SDPTLayer
from peft_sdpt.inverse import inverse_projection

RULES = ("0.1 of images alone", "0.1 of text alone", "ridge 0.1", "scaled", "quiet start")


@torch.no_grad()
def replace_inverses(model: nn.Module, rule: str) -> nn.Module:
    """Replace the inverses in the SDPT layers of a model. The layers keep them as long as no weight changes.

    Args:
        model: A model with an SDPT adapter.
        rule: "R of images alone" or "R of text alone": the inverse of one modality drops singular values below the
            fraction R of the largest. "ridge R": `W^T (W W^T + r^2 I)^-1`, where r is the fraction R of the largest
            singular value. "scaled": the full inverse, scaled so that prompts from U(-1, 1) tokens are as long as the
            layer-normed tokens of the base model, `sqrt(d)`. "quiet start": the full inverse, with initial tokens that
            become N(0, 1) prompts.
    """
    for layer in [module for module in model.modules() if isinstance(module, SDPTLayer)]:
        if rule == "quiet start":
            _start_quietly(layer)
            continue
        for side, (modality, projection) in enumerate(zip(("images", "text"), layer.projections, strict=True)):
            for name in layer.sdpt_config:
                layer.set_inverse(side, _inverse(projection, rule, modality), name)
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
    raise ValueError(f"rule={rule!r}: must be one of {RULES}")
