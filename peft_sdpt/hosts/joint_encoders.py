# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""FLAVA and ViLT of transformers: image and text tokens in one sequence.

Read in transformers 5.24. One set and one inverse, of `key`. Nothing is synchronous, as there are no two modalities
to the attention: what is left of the method are tokens in the space of keys, reached through an exact inverse.
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
    within=("FlavaMultimodalModel",),  # its encoders of image and text are made of the same class
)
