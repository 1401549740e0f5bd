# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""BLIP, BLIP-2, InstructBLIP and InstructBlipVideo of transformers: text, or queries, attend to the image.

Read in transformers 5.24. One direction: the image never attends to anything else, so prompts are keys and values that
stand beside the image's patches, reached through the inverse of a key projection, and nothing is synchronous. Where the
image encoder is wider than the text (1408 to 768 in BLIP-2) the projection reaches all of the key space, and the whole
of a token acts. A layer without cross-attention is none.
"""

from .cross_attention import Context, CrossAttentionHost

BLIP = CrossAttentionHost(
    name="BLIP",
    class_names=("BlipTextLayer",),
    arguments=("hidden_states", "encoder_hidden_states", "attention_mask", "encoder_attention_mask"),
    contexts=(
        Context(
            key="crossattention.self.key",
            tokens=("encoder_hidden_states",),
            mask="encoder_attention_mask",
            # Its cross-attention looks for the mask under another name than it is passed by, and finds none.
            mask_is_obeyed=False,
        ),
    ),
)

QFORMER = CrossAttentionHost(
    name="the Q-Former of BLIP-2, InstructBLIP and InstructBlipVideo",
    class_names=("Blip2QFormerLayer", "InstructBlipQFormerLayer", "InstructBlipVideoQFormerLayer"),
    arguments=("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
    contexts=(
        Context(
            key="crossattention.attention.key",
            tokens=("encoder_hidden_states",),
            mask="encoder_attention_mask",
        ),
    ),
)
