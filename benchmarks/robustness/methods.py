# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The methods to compare: some of `benchmarks.transfer`, and SDPT with prompts in the backbone too."""

from __future__ import annotations

from typing import Any

from peft import get_peft_model
from torch import nn

from peft_sdpt import SDPTConfig

from ..transfer.methods import METHODS as OF_TRANSFER
from ..transfer.methods import PROMPT_RATES, Method
from ..window_prompts import PromptedWindows, attach_window_prompts


def _with_windows(host: nn.Module, _processor: Any, _names: list[str], fields: dict[str, Any]) -> nn.Module:
    """SDPT, and prompts in each window of the backbone, which attacks change first."""
    model: nn.Module = get_peft_model(attach_window_prompts(host), SDPTConfig(**fields))
    for module in model.modules():
        if isinstance(module, PromptedWindows):
            module.prompts.requires_grad_()
    return model


METHODS = {
    **{name: OF_TRANSFER[name] for name in ("gated", "gated-lora", "gated-more", "vpt", "lora", "full")},
    "gated-windows": Method("SDPT with prompts in the backbone", _with_windows, PROMPT_RATES),
}
