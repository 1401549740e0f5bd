# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""OmDet-Turbo of transformers: object queries and task tokens in one self-attention of each decoder layer.

Written for transformers 5.24. Queries, keys and values are three arguments, so prompts can be keys and values only.
There is one sequence, so there is one set of tokens, and SDPT inverts the projection `key`. As in the paper, tokens are
trained in the space of keys.
"""

from .cross_attention import Context, CrossAttentionHost
from .heads import Heads

OMDET_TURBO = CrossAttentionHost(
    name="OmDet-Turbo",
    class_names=("OmDetTurboMultiheadAttention",),
    arguments=("queries", "keys", "values", "attention_mask"),
    within=("OmDetTurboDeformableTransformerDecoderLayer",),  # the encoder uses the same class for the image alone
    contexts=(
        Context(
            key="key",
            tokens=("keys", "values"),
            mask="attention_mask",
            heads=Heads(query="query", value="value", out="out_proj", number="num_attention_heads", dropout="dropout"),
        ),
    ),
)
