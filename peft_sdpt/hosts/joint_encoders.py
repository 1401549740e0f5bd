# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""FLAVA and ViLT of transformers: image and text tokens in one sequence.

Written for transformers 5.24. There is one set of tokens and one inverse, that of `key`. The attention does not know
two modalities, so nothing is synchronous: what remains of the method are tokens in the space of keys, reached through
an exact inverse.
"""

from dataclasses import replace

from .joint_attention import JointAttentionHost

VILT = JointAttentionHost(
    name="ViLT",
    class_names=("ViltSelfAttention",),
    arguments=("hidden_states", "attention_mask"),
    key="key",
    tokens="hidden_states",
    mask="attention_mask",
)

FLAVA = replace(
    VILT,
    name="FLAVA",
    class_names=("FlavaSelfAttention",),
    within=("FlavaMultimodalModel",),  # its image and text encoders use the same class
)
