# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""BLIP, BLIP-2, InstructBLIP and InstructBlipVideo of transformers: text, or queries, attend to the image.

Written for transformers 5.24. The fusion has one direction: the image never attends to anything else. Prompts are
therefore keys and values beside the image's patches. They come from the inverse of the key projection, and nothing is
synchronous. In BLIP-2 the image encoder is wider than the text (1408 and 768), so the projection reaches all of the key
space, and the whole token has an effect. Layers without cross-attention are not adapted.
"""

from .cross_attention import Context, CrossAttentionHost
from .heads import bert_heads

BLIP = CrossAttentionHost(
    name="BLIP",
    class_names=("BlipTextLayer",),
    arguments=("hidden_states", "encoder_hidden_states", "attention_mask", "encoder_attention_mask"),
    contexts=(
        Context(
            key="crossattention.self.key",
            tokens=("encoder_hidden_states",),
            mask="encoder_attention_mask",
            # The layer passes the mask by a name that its cross-attention does not know.
            mask_is_obeyed=False,
            heads=bert_heads("crossattention.self", "crossattention.output.dense"),
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
            heads=bert_heads("crossattention.attention", "crossattention.output.dense", "attention_dropout"),
        ),
    ),
)
