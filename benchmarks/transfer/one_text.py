# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Computing the output of the text encoder once for a run with the same prompt for every image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from peft_sdpt.detection.prediction import evaluation_mode


@contextlib.contextmanager
def text_computed_once(detector: nn.Module) -> Iterator[None]:
    """Let a frozen text encoder compute each prompt only once in this context, without dropout.

    A text encoder that trains is not changed.

    Args:
        detector: A Grounding DINO or MM Grounding DINO with a method attached.
    """
    encoder = next((m for name, m in detector.named_modules() if name.endswith("model.text_backbone")), None)
    if encoder is None or any(parameter.requires_grad for parameter in encoder.parameters()):
        yield
        return
    known: dict[tuple[int, ...], torch.Tensor] = {}
    compute = encoder.forward

    def forward(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> BaseModelOutput:
        if not (input_ids == input_ids[:1]).all():
            return compute(input_ids, *args, **kwargs)
        key = tuple(input_ids[0].tolist())
        if key not in known:
            first = [value[:1] if torch.is_tensor(value) else value for value in args]
            named = {name: value[:1] if torch.is_tensor(value) else value for name, value in kwargs.items()}
            # In evaluation mode, because a single dropout mask must not hold for the whole run.
            with torch.no_grad(), evaluation_mode(encoder):
                known[key] = compute(input_ids[:1], *first, **named).last_hidden_state
        return BaseModelOutput(last_hidden_state=known[key].expand(len(input_ids), -1, -1))

    encoder.forward = forward
    try:
        yield
    finally:
        del encoder.forward
