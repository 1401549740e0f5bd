# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The trained parameters of a model, and their moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters of a model that require gradients.

    Args:
        model: The model.

    Returns:
        The parameters by name.
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def averaged(model: nn.Module, average: AveragedModel | None) -> Iterator[None]:
    """Give the trained parameters of a model the values of their moving average in this context.

    Args:
        model: The model.
        average: The average of an `nn.ParameterList` of the model's trained parameters. With None, nothing happens.
    """
    if average is None:
        yield
        return
    trained = list(trained_parameters(model).values())
    before = [parameter.detach().clone() for parameter in trained]
    try:
        _copy(average.module.parameters(), trained)
        yield
    finally:
        _copy(before, trained)


@torch.no_grad()
def _copy(source: Iterable[torch.Tensor], target: list[nn.Parameter]) -> None:
    for parameter, value in zip(target, source, strict=True):
        parameter.copy_(value)
