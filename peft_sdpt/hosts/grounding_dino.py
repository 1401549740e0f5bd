# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO and MM Grounding DINO (also LLMDet checkpoints) of transformers.

Written for transformers 5.24. The attention classes of the two models differ only in their names.

The fusion layers of the encoder are the method of the paper. In the decoder, object queries attend to the text once
more in each layer. This place is adapted only if `target_modules` names it, because it is not part of the method: it
has one direction, and separate key projections, which SDPT inverts. Keys are as wide as the tokens, so the inverse is
exact if the weight has full rank.
"""

from .bi_attention import BiAttentionHost
from .cross_attention import Context, CrossAttentionHost
from .heads import Heads

GROUNDING_DINO = BiAttentionHost(
    name="Grounding DINO, MM Grounding DINO and LLMDet of transformers",
    class_names=("GroundingDinoBiMultiHeadAttention", "MMGroundingDinoBiMultiHeadAttention"),
    arguments=("vision_features", "text_features", "vision_attention_mask", "text_attention_mask"),
    image_projections=("vision_proj", "values_vision_proj", "out_vision_proj"),
    text_projections=("text_proj", "values_text_proj", "out_text_proj"),
    image_tokens="vision_features",
    text_tokens="text_features",
    image_mask="vision_attention_mask",
    text_mask="text_attention_mask",
)

GROUNDING_DINO_DECODER = CrossAttentionHost(
    name="the decoder of Grounding DINO, MM Grounding DINO and LLMDet of transformers",
    class_names=("GroundingDinoMultiheadAttention", "MMGroundingDinoMultiheadAttention"),
    arguments=("queries", "keys", "values", "attention_mask"),
    within=("GroundingDinoDecoderLayer", "MMGroundingDinoDecoderLayer"),
    named="encoder_attn_text",  # the self-attention of a decoder layer has the same class
    contexts=(
        Context(
            key="key",
            tokens=("keys", "values"),
            mask="attention_mask",
            heads=Heads(query="query", value="value", out="out_proj", number="num_attention_heads", dropout="dropout"),
        ),
    ),
    adapted_by_default=False,
)
