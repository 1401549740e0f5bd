# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the supported hosts, a file for each host, all of one form: `tests/test_hosts.py` runs them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """A host to be tested.

    Attributes:
        name: of the test.
        make: a tiny random model in evaluation mode, the same at each call, in which nothing is dropped and no weight
            is so small that prompts would go unseen.
        inputs: a call's arguments for two samples, the second with a shorter text; as many padded text positions are
            added as it is asked for. The same at each call.
        outputs: what the model gives for these, `(2, F)`, a row a sample, with nothing of padded positions in it.
        layers: full names of the modules that hold prompts, in order, each with the width of its prompts.
        shared: full names of the modules that see prompts of others, each with the name of that other.
        full_size: the host as published, made on the meta device; None where it does not build.
        full_size_layers: how many fusion layers that has.
        sides: how many sides each fusion layer has, where it is not one.
        image_reads: whether prompts can be hidden from the image.
        mixed_batches: whether samples of one batch can see different adapters.
        tolerance: how much padding, or the other sample of a batch, may change outputs.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    outputs: Callable[[nn.Module, dict[str, Any]], torch.Tensor]
    layers: Mapping[str, int]
    full_size: Callable[[], nn.Module] | None
    full_size_layers: int
    shared: Mapping[str, str] = field(default_factory=dict)
    sides: Mapping[str, int] = field(default_factory=dict)
    image_reads: bool = False
    mixed_batches: bool = True
    tolerance: float = 1e-5


def cases() -> list[Case]:
    """All cases: `CASE` or `CASES` of each module beside this file."""
    found: list[Case] = []
    for module in pkgutil.iter_modules(__path__):
        contents = vars(importlib.import_module(f"{__name__}.{module.name}"))
        found += contents.get("CASES") or [contents["CASE"]]
    return found


def on_meta(model_class: type[nn.Module], config: Any) -> nn.Module:
    """A model without weights, to be counted."""
    with torch.device("meta"):
        return model_class(config)


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Give every parameter of less than two dimensions some size, and the others a spread that tells tokens apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.dim() < 2:
                parameter.add_(scale * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()
