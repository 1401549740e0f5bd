# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""SAM 3 of transformers (also SAM 3 Lite Text, and the detector within SAM 3 Video): fusion in one direction at a time.

Written for transformers 5.24. The concept prompt is a phrase, followed by example boxes if there are any. It meets the
image at three places. All of them are attentions with query, key and value projections of one dimension:

* in each layer of the DETR encoder, image tokens attend to the concept prompt;
* in each layer of the DETR decoder, object queries attend to the concept prompt, and then to the image;
* in the mask decoder, the encoder's image tokens attend to the concept prompt once more.

As in the method, prompts are keys and values of frozen attentions, and come from the inverse of the frozen key
projection. Keys are as wide as the tokens, so the inverse is exact if the weight has full rank, and the whole prototype
token has an effect.

Unlike in the method, nothing is dual. Concept tokens attend to no image token in these layers, so no layer has two
modalities in one aligned space, and nothing is synchronous. In the encoder and the mask decoder, a prompt is one more
concept token, at that layer only. In the decoder, one set of tokens is a key of the concept prompt and a key of the
image, for the same object queries and through two unrelated key projections. Sharing them is a choice, and
`prompt_mode="independent"` gives each its own, for an adapter of decoder layers only. In each module, only one kind of
tokens attends, so `image_attends_prompts=False` raises an error.

The image's keys get a position encoding and, depending on their position relative to a query's box, a bias on the
logits. A prompt has no position and gets neither, just as the presence token sees all image tokens. Scores compare
queries with the mean of the concept tokens, which does not include prompts.

The layers that encode example boxes attend to the image too. They run only with boxes and are not adapted. The
trackers of SAM 3 use none of these classes.
"""

from .cross_attention import Context, CrossAttentionHost
from .heads import Heads


def _heads(attention: str) -> Heads:
    names = {"query": "q_proj", "value": "v_proj", "out": "o_proj", "number": "num_attention_heads"}
    return Heads(**{part: f"{attention}.{name}" for part, name in names.items()})


SAM3_ENCODER = CrossAttentionHost(
    name="SAM 3 of transformers, DETR encoder",
    class_names=("Sam3DetrEncoderLayer", "Sam3LiteTextDetrEncoderLayer"),
    arguments=("vision_feats", "prompt_feats", "vision_pos_encoding", "prompt_cross_attn_mask"),
    contexts=(
        Context(
            key="cross_attn.k_proj",
            tokens=("prompt_feats",),
            mask="prompt_cross_attn_mask",
            heads=_heads("cross_attn"),
        ),
    ),
)

SAM3_DECODER = CrossAttentionHost(
    name="SAM 3 of transformers, DETR decoder",
    class_names=("Sam3DetrDecoderLayer", "Sam3LiteTextDetrDecoderLayer"),
    arguments=(
        "hidden_states",
        "query_pos",
        "text_features",
        "vision_features",
        "vision_pos_encoding",
        "text_cross_attn_mask",
        "vision_cross_attn_mask",
    ),
    contexts=(
        Context(
            key="text_cross_attn.k_proj",
            tokens=("text_features",),
            mask="text_cross_attn_mask",
            heads=_heads("text_cross_attn"),
        ),
        Context(
            key="vision_cross_attn.k_proj",
            tokens=("vision_features",),
            zeros=("vision_pos_encoding",),
            mask="vision_cross_attn_mask",
            heads=_heads("vision_cross_attn"),
        ),
    ),
)

SAM3_MASK_DECODER = CrossAttentionHost(
    name="SAM 3 of transformers, mask decoder",
    class_names=("Sam3MaskDecoder", "Sam3LiteTextMaskDecoder"),
    arguments=("decoder_queries", "backbone_features", "encoder_hidden_states", "prompt_features", "prompt_mask"),
    contexts=(
        Context(
            key="prompt_cross_attn.k_proj",
            tokens=("prompt_features",),
            mask="prompt_mask",
            heads=_heads("prompt_cross_attn"),
        ),
    ),
)
