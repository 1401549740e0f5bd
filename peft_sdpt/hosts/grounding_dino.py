# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO and MM Grounding DINO (also LLMDet checkpoints) of transformers.

Written for transformers 5.24. The two attention classes differ only in their names.
"""

from .bi_attention import BiAttentionHost

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
