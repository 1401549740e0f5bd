# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measuring the prompts of SDPT in each fusion layer: their norms, and how much attention they get."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_sdpt import SDPTLayer

ADAPTER = "default"


def diagnose(
    model: nn.Module,
    batches: Iterable[tuple[Mapping[str, Tensor], list[dict[str, Tensor]]]],
    loss_function: Callable[[Any, list[dict[str, Tensor]]], Tensor],
) -> list[dict[str, float]]:
    """Measure the prompts of a model, without changing it.

    Args:
        model: A model with one SDPT adapter.
        batches: Inputs of the model, and labels.
        loss_function: Maps outputs and labels to the loss.

    Returns:
        For each fusion layer, means over batches and tokens: `image_prompts` and `text_prompts`, norms of the prompts
        in the space of the inputs; `image_tokens` and `text_tokens`, norms of the inputs; `image_attention` and
        `text_attention`, the fraction of their attention that image and text tokens give to prompts; `gradient`, the
        norm of the gradient of the loss with respect to the prototype tokens, for all batches together; `unreached`,
        the fraction of the squared norm of the tokens that neither projection reaches.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SDPTLayer)}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in layers}
    hooks = [layer.register_forward_hook(partial(_see, seen[name]), with_kwargs=True) for name, layer in layers.items()]
    was_training = model.training
    model.eval()
    configs = [layer.sdpt_config[ADAPTER] for layer in layers.values()]
    implementations = [config.attn_implementation for config in configs]
    for config in configs:
        config.attn_implementation = "eager"  # returns attention weights
    total: Tensor | float = 0.0
    try:
        for inputs, labels in batches:
            total = total + loss_function(model(**inputs, output_attentions=True), labels)
    finally:
        model.train(was_training)
        for config, implementation in zip(configs, implementations, strict=True):
            config.attn_implementation = implementation
        for hook in hooks:
            hook.remove()
    tokens = [layer.sdpt_prompts[ADAPTER] for layer in layers.values()]
    gradients = torch.autograd.grad(total / len(next(iter(seen.values()))), tokens)
    measured = []
    for name, layer, gradient in zip(layers, layers.values(), gradients, strict=True):
        means = {key: sum(each[key] for each in seen[name]) / len(seen[name]) for key in seen[name][0]}
        measured.append({**means, "gradient": gradient.norm().item(), "unreached": _unreached(layer)})
    return measured


@torch.no_grad()
def _see(rows: list[dict[str, float]], layer: SDPTLayer, args: tuple, kwargs: dict, outputs: Any) -> None:
    host = layer.fusion_host
    bound = host.bind(args, kwargs)
    prompts = [side.tokens for side in layer.input_prompts([ADAPTER])]
    row: dict[str, float] = {}
    given = bound[host.image_tokens], bound[host.text_tokens]
    sides = zip(("image", "text"), given, prompts, reversed(prompts), outputs, strict=True)
    for side, tokens, own, seen, (_, weights) in sides:
        row[f"{side}_tokens"] = tokens.norm(dim=-1).mean().item()
        row[f"{side}_prompts"] = 0.0 if own is None else own.norm(dim=-1).mean().item()
        # Prompts are the last keys. Image tokens attend to the text prompts, and text tokens to the image prompts.
        number = 0 if seen is None else len(seen)
        row[f"{side}_attention"] = weights[..., weights.shape[-1] - number :].sum(-1).mean().item()
    rows.append(row)


@torch.no_grad()
def _unreached(layer: SDPTLayer) -> float:
    tokens = layer.tokens(ADAPTER).double()
    columns = torch.cat([projection.weight for projection in layer.projections], dim=1).double()
    reached = columns @ torch.linalg.lstsq(columns, tokens.T).solution
    return round((1 - reached.square().sum() / tokens.square().sum()).item(), 6)
