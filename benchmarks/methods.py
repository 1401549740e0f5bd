# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: how each is attached to a frozen host, and what it puts on the disk."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peft_sdpt import SDPTConfig
from released import attach_released
from window_prompts import attach_window_prompts

# Of the six projections of a fusion layer, in transformers and in GLIP.
FUSION_QUERIES = ("vision_proj", "text_proj", "v_proj", "l_proj")
FUSION_VALUES = ("values_vision_proj", "values_text_proj", "values_v_proj", "values_l_proj")
FUSION_OUTS = ("out_vision_proj", "out_text_proj", "out_v_proj", "out_l_proj")
# Of the attentions in encoder and decoder; value_proj and output_proj are those of deformable attention.
ATTENTION = ("query", "key", "value", "out_proj", "value_proj", "output_proj")


def in_layers(*names: str) -> str:
    """Modules of these names in the encoder and the decoder of a detector, or in a fusion layer alone."""
    return rf"(model\.(encoder|decoder)\.)?layers\.\d+\.(.*\.)?({'|'.join(names)})"


LORA_TARGETS = in_layers(*FUSION_QUERIES, *FUSION_VALUES, *FUSION_OUTS, *ATTENTION)
IA3_FEEDFORWARD = in_layers("fc2")
IA3_TARGETS = in_layers(*FUSION_QUERIES, *FUSION_VALUES, "key", "value", "value_proj", "fc2")


def with_peft(host: nn.Module, config: PeftConfig) -> PeftModel:
    if getattr(host, "config", None) is not None:
        # PEFT asks for tied embeddings by a method that Grounding DINO does not have, and asks only then.
        host.config.tie_word_embeddings = False
    return get_peft_model(host, config)


def train(host: nn.Module, chosen: Callable[[str], bool]) -> nn.Module:
    """Train parameters of the host itself, in memory of their own: others use that of the frozen ones."""
    for name, parameter in host.named_parameters():
        if chosen(name):
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
    return host


def is_bitfit(name: str) -> bool:
    return name.endswith(".bias") and not re.match(r"model\.(backbone|text_backbone)\.", name)


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        label: for tables.
        trains: what, in words.
        attach: makes the model out of a frozen host, which it may change.
        infers: whether it is to be timed in inference; what only changes weights is the bare host there.
        trained: whether there is anything to train.
        fuses: whether it acts on fusion layers.
    """

    label: str
    trains: str
    attach: Callable[[nn.Module], nn.Module]
    infers: bool = True
    trained: bool = True
    fuses: bool = True


METHODS = {
    "host": Method("bare host", "nothing", lambda host: host, trained=False),
    "sdpt": Method("SDPT", "10 tokens a fusion layer", lambda host: get_peft_model(host, SDPTConfig())),
    "sdpt-eager": Method(
        "SDPT eager",
        '10 tokens a fusion layer, `attn_implementation="eager"`',
        lambda host: get_peft_model(host, SDPTConfig(attn_implementation="eager")),
    ),
    "cached": Method("SDPT, cached features", "", lambda host: host, infers=False, trained=False, fuses=False),
    "released": Method("released algorithm", "10 tokens a fusion layer", attach_released),
    "lora": Method(
        "LoRA",
        "r = 8 on the six projections of a fusion layer and the attention projections "
        f"({', '.join(ATTENTION)}) of encoder and decoder",
        lambda host: with_peft(host, LoraConfig(r=8, target_modules=LORA_TARGETS)),
    ),
    "ia3": Method(
        "IA3",
        "scales of keys and values in the fusion layers and the attentions of encoder and decoder, and of fc2's inputs",
        lambda host: with_peft(host, IA3Config(target_modules=IA3_TARGETS, feedforward_modules=IA3_FEEDFORWARD)),
    ),
    "bitfit": Method("BitFit", "all biases beside those of the two backbones", lambda h: train(h, is_bitfit), False),
    "vpt": Method(
        "visual prompts", "VPT-deep: 10 tokens in each window of a block of the Swin backbone",
        attach_window_prompts, fuses=False,
    ),
    "full": Method("full fine-tuning", "everything", lambda host: train(host, lambda _: True), False),
}  # fmt: skip


def suitable(task: str, is_fusion: bool) -> tuple[str, ...]:
    """Methods that say something there, in the order of the tables."""
    if task == "attach":
        return ("sdpt", "lora", "ia3")
    if task == "epoch":
        return ("sdpt", "cached")
    return tuple(
        name
        for name, method in METHODS.items()
        # Forward and backward of a bare fusion layer is a step's share of it; a bare model has no step.
        if (method.infers if task == "inference" else method.trained or is_fusion) and (method.fuses or not is_fusion)
    )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_bytes(model: nn.Module) -> int:
    """Size of the weights' file: that of PEFT, or the trained parameters as safetensors."""
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
