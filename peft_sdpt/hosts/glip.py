# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""GLIP, the original Grounding DINO, and mmdetection's ports of both: attentions with one class name and four
signatures.

Written for microsoft/GLIP (`maskrcnn_benchmark/utils/fuse_helper.py`), IDEA-Research/GroundingDINO
(`groundingdino/models/GroundingDINO/fuse_modules.py`) and mmdetection (`mmdet/models/utils/vlfuse_helper.py`).
"""

from dataclasses import replace

from ..attention import add_validity, hide_padding
from .bi_attention import BiAttentionHost

GLIP = BiAttentionHost(
    name="GLIP (microsoft/GLIP)",
    class_names=("BiMultiHeadAttention",),
    arguments=("v", "l", "attention_mask_l"),
    image_projections=("v_proj", "values_v_proj", "out_v_proj"),
    text_projections=("l_proj", "values_l_proj", "out_l_proj"),
    image_tokens="v",
    text_tokens="l",
    image_mask=None,
    text_mask="attention_mask_l",
    text_mask_function=add_validity,
    returns_weights=False,
)

ORIGINAL_GROUNDING_DINO = replace(
    GLIP,
    name="the original Grounding DINO (IDEA-Research/GroundingDINO)",
    arguments=("v", "l", "attention_mask_v", "attention_mask_l"),
    image_mask="attention_mask_v",
    text_mask_function=hide_padding,
)

MMDETECTION = replace(
    GLIP,
    name="GLIP and MM Grounding DINO of mmdetection 3.3",
    arguments=("vision", "lang", "attention_mask_v", "attention_mask_l"),
    image_tokens="vision",
    text_tokens="lang",
    image_mask="attention_mask_v",
)

MMDETECTION_3_0 = replace(
    MMDETECTION,
    name="GLIP of mmdetection 3.0",
    arguments=("vision", "lang", "attention_mask_l"),
    image_mask=None,
)
