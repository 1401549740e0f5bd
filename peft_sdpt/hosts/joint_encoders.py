# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""FLAVA and ViLT of transformers: image and text tokens in one sequence.

Written for transformers 5.24. There is one set of tokens, and SDPT inverts the projection `key`. The attention does not
distinguish two modalities, so nothing is synchronous. As in the paper, tokens are trained in the space of keys and
mapped by an inverse.
"""

from dataclasses import replace

from .heads import Heads
from .joint_attention import JointAttentionHost

VILT = JointAttentionHost(
    name="ViLT",
    class_names=("ViltSelfAttention",),
    arguments=("hidden_states", "attention_mask"),
    key="key",
    tokens="hidden_states",
    mask="attention_mask",
    # The output projection belongs to the module around it.
    heads=Heads(query="query", value="value", number="num_attention_heads", dropout="dropout"),
)

FLAVA = replace(
    VILT,
    name="FLAVA",
    class_names=("FlavaSelfAttention",),
    within=("FlavaMultimodalModel",),  # its image and text encoders use the same class
)
