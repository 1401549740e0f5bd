# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The methods that SDPT is compared with, and how to attach them to a Grounding DINO or MM Grounding DINO."""

from __future__ import annotations

import re
from collections.abc import Callable

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

# The settings of the paper that differ from the defaults of `SDPTConfig`.
PUBLISHED = {
    "num_virtual_tokens": 10,
    "init_weights": "uniform",
    "pinv_rtol": None,
    "prompt_space": "aligned",
    "prompt_gate": None,
}
# Names of the six projections of a fusion layer, in transformers and in GLIP.
FUSION_QUERIES = ("vision_proj", "text_proj", "v_proj", "l_proj")
FUSION_VALUES = ("values_vision_proj", "values_text_proj", "values_v_proj", "values_l_proj")
FUSION_OUTS = ("out_vision_proj", "out_text_proj", "out_v_proj", "out_l_proj")
# Names of the projections of attention in the encoder and the decoder. value_proj and output_proj belong to
# deformable attention.
ATTENTION = ("query", "key", "value", "out_proj", "value_proj", "output_proj")


def in_layers(*names: str) -> str:
    """Return a regular expression for modules with these names in the encoder or decoder, or in a layer."""
    return rf"(model\.(encoder|decoder)\.)?layers\.\d+\.(.*\.)?({'|'.join(names)})"


LORA_TARGETS = in_layers(*FUSION_QUERIES, *FUSION_VALUES, *FUSION_OUTS, *ATTENTION)
IA3_FEEDFORWARD = in_layers("fc2")
IA3_TARGETS = in_layers(*FUSION_QUERIES, *FUSION_VALUES, "key", "value", "value_proj", "fc2")


def with_peft(host: nn.Module, config: PeftConfig) -> PeftModel:
    """Attach an adapter of PEFT to a base model."""
    if getattr(host, "config", None) is not None:
        # With tied embeddings, PEFT calls a method that Grounding DINO does not have.
        host.config.tie_word_embeddings = False
    return get_peft_model(host, config)


def train(host: nn.Module, chosen: Callable[[str], bool]) -> nn.Module:
    """Make parameters of the base model trainable. They are copied first, because models share the frozen weights."""
    for name, parameter in host.named_parameters():
        if chosen(name):
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
    return host


def is_bitfit(name: str) -> bool:
    """Return whether BitFit trains a parameter: whether it is a bias outside the backbones."""
    return name.endswith(".bias") and not re.match(r"model\.(backbone|text_backbone)\.", name)
