# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The trained parameters of a model, their learning rates, and their moving average."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..saving import LORA_KEYS

# The best rate of LoRA beside tokens on the small base model.
LORA_LEARNING_RATE = 0.003


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the parameters of a model that require gradients.

    Args:
        model: The model.

    Returns:
        The parameters by name.
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(
    model: nn.Module, learning_rate: float, lora_learning_rate: float = LORA_LEARNING_RATE
) -> list[dict[str, Any]]:
    """Divide the trained parameters of a model into groups for an optimizer.

    Tokens need rates about a hundred times higher than weights, so adapters with `lora_rank` need two rates.

    Args:
        model: The model.
        learning_rate: Learning rate of tokens, and of everything else that is not LoRA.
        lora_learning_rate: Learning rate of the LoRA part of SDPT adapters.

    Returns:
        One group for `torch.optim`, or two if the model trains LoRA; the second is that of LoRA.

    Raises:
        ValueError: A learning rate is not a positive and finite number, or the model has nothing to train.
    """
    for name, rate in (("learning_rate", learning_rate), ("lora_learning_rate", lora_learning_rate)):
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 < rate < math.inf:
            raise ValueError(f"{name} must be a positive and finite number, got {rate!r}")
    parameters: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    named = trained_parameters(model)
    if not named:
        raise ValueError(
            "The model has no parameter to train. PeftModel.from_pretrained trains an adapter only with "
            "is_trainable=True."
        )
    for name, parameter in named.items():
        parameters[any(f"{key}." in name for key in LORA_KEYS)].append(parameter)
    groups = [{"params": parameters[0], "lr": learning_rate}, {"params": parameters[1], "lr": lora_learning_rate}]
    return groups if parameters[1] else groups[:1]


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
