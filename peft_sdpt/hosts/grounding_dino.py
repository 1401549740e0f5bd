# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO and MM Grounding DINO (also LLMDet checkpoints) of transformers.

Read in transformers 5.24; the two attention classes are the same but for their names.
"""

from .declaration import FusionHost

GROUNDING_DINO = FusionHost(
    name="Grounding DINO, MM Grounding DINO and LLMDet of transformers",
    class_names=("GroundingDinoBiMultiHeadAttention", "MMGroundingDinoBiMultiHeadAttention"),
    image_projections=("vision_proj", "values_vision_proj", "out_vision_proj"),
    text_projections=("text_proj", "values_text_proj", "out_text_proj"),
    arguments=(
        "vision_features",
        "text_features",
        "vision_attention_mask",
        "text_attention_mask",
    ),
)
