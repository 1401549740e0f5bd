# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The methods to compare: how to attach each to a frozen base model, and its size on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peft_sdpt import SDPTConfig
from peft_sdpt.training import trained_parameters

from ..peers import (
    ATTENTION,
    IA3_FEEDFORWARD,
    IA3_TARGETS,
    LORA_TARGETS,
    PUBLISHED,
    is_bitfit,
    train,
    with_peft,
)
from ..window_prompts import attach_window_prompts
from .released import attach_released


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        label: Name for tables.
        trains: What the method trains, in words.
        attach: Makes the model from a frozen base model, which it may change.
        infers: Whether to time inference. A method that only changes weights is as fast as the base model.
        trained: Whether the method trains anything.
        fuses: Whether the method changes fusion layers.
    """

    label: str
    trains: str
    attach: Callable[[nn.Module], nn.Module]
    infers: bool = True
    trained: bool = True
    fuses: bool = True


METHODS = {
    "host": Method("base model", "nothing", lambda host: host, trained=False),
    "sdpt": Method("SDPT", "10 tokens per fusion layer", lambda host: get_peft_model(host, SDPTConfig(**PUBLISHED))),
    "sdpt-eager": Method(
        "SDPT eager",
        '10 tokens per fusion layer, `attn_implementation="eager"`',
        lambda host: get_peft_model(host, SDPTConfig(**PUBLISHED, attn_implementation="eager")),
    ),
    "sdpt-gated": Method(
        "SDPT with gates",
        "10 tokens and 8 or 16 gates per fusion layer",
        # Random gates, because a layer whose gates are zero runs as the base model in evaluation.
        lambda host: get_peft_model(host, SDPTConfig(**{**PUBLISHED, "prompt_gate": "zero", "init_weights": False})),
    ),
    "cached": Method("SDPT, cached features", "", lambda host: host, infers=False, trained=False, fuses=False),
    "released": Method("released algorithm", "10 tokens per fusion layer", attach_released),
    "lora": Method(
        "LoRA",
        "r = 8 on the six projections of a fusion layer and the attention projections "
        f"({', '.join(ATTENTION)}) of the encoder and the decoder",
        lambda host: with_peft(host, LoraConfig(r=8, target_modules=LORA_TARGETS)),
    ),
    "ia3": Method(
        "IA3",
        "scales of keys and values in the fusion layers and in the attentions of encoder and decoder, and of the "
        "inputs of fc2",
        lambda host: with_peft(host, IA3Config(target_modules=IA3_TARGETS, feedforward_modules=IA3_FEEDFORWARD)),
    ),
    "bitfit": Method("BitFit", "all biases except those of the two backbones", lambda h: train(h, is_bitfit), False),
    "vpt": Method(
        "visual prompts", "VPT-deep: 10 tokens in each window of each block of the Swin backbone",
        attach_window_prompts, fuses=False,
    ),
    "full": Method("full fine-tuning", "everything", lambda host: train(host, lambda _: True), False),
}  # fmt: skip


def suitable(task: str, is_fusion: bool) -> tuple[str, ...]:
    """Return the methods that suit a task, in the order of the tables."""
    if task == "attach":
        return ("sdpt", "lora", "ia3")
    if task == "epoch":
        return ("sdpt", "cached")
    return tuple(
        name
        for name, method in METHODS.items()
        # A fusion layer without a method still takes part in a training step. A model without a method has no step.
        if (method.infers if task == "inference" else method.trained or is_fusion) and (method.fuses or not is_fusion)
    )


def saved_bytes(model: nn.Module) -> int:
    """Return the size of the saved weights in bytes: PEFT's file, or a safetensors file of what is trained."""
    trained = trained_parameters(model)
    if not trained:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(folder)
        else:
            save_file(
                {name: parameter.data.contiguous() for name, parameter in trained.items()}, f"{folder}/it.safetensors"
            )
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
