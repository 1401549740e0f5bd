# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The trained parameters of a model, and their moving average in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def averaged(model: torch.nn.Module, average: torch.optim.swa_utils.AveragedModel | None) -> Iterator[None]:
    """A model whose trained parameters are those of their moving average, if there is one, for a while."""
    if average is None:
        yield
        return
    trained = trained_parameters(model)
    kept = [parameter.detach().clone() for parameter in trained]
    try:
        _copy(average.module, trained)
        yield
    finally:
        _copy(kept, trained)


@torch.no_grad()
def _copy(source: Any, target: list[torch.nn.Parameter]) -> None:
    for parameter, value in zip(target, source, strict=True):
        parameter.copy_(value)


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
