# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""How the methods that SDPT is compared with are put onto a detector of the Grounding DINO kind."""

from __future__ import annotations

import re
from collections.abc import Callable

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

# SDPT with the settings of the paper, where the defaults of `SDPTConfig` are others.
PUBLISHED = {"num_virtual_tokens": 10, "init_weights": "uniform", "pinv_rtol": None, "prompt_space": "aligned"}
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


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
