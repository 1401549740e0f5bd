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


# The attention and the feed-forward network of image tokens in the encoder.
ENCODER_IMAGE = r"model\.encoder\.layers\.\d+\.deformable_layer\.(.*\.)?(value_proj|output_proj|fc1|fc2)"

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


def is_released_head(name: str) -> bool:
    """Return whether the command of SDPT's released code trains a weight of the base model beside the prompts.

    With `froze_fuse 1 FROZEE_SWINT True FROZEE_BERT True`, it freezes the backbones of GLIP, its feature pyramid and
    the fusion layers (`maskrcnn_benchmark/modeling/rpn/vldyhead.py` and `.../detector/generalized_vl_rcnn.py` of
    github.com/wuyongjianCODE/SDPT). The rest of the head trains: in each layer the attention over text and the
    convolutions, and then what predicts classes and boxes. Here, the rest is the encoder without its fusion layers, the
    decoder, and what predicts classes and boxes. The projections after the backbones stand for the feature pyramid. As
    the fusion layers are frozen, so are the projections that SDPT inverts.

    Args:
        name: Name of a parameter, with or without the prefix of PEFT.
    """
    frozen = r"model\.(backbone|text_backbone|input_proj_vision|text_projection)\.|\.fusion_layer\.|sdpt_"
    return not re.search(frozen, name)


def is_bitfit(name: str) -> bool:
    """Return whether BitFit trains a parameter: whether it is a bias outside the backbones."""
    return name.endswith(".bias") and not re.match(r"model\.(backbone|text_backbone)\.", name)
