# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""LXMERT of transformers: one cross-attention for both directions.

Written for transformers 5.24. `LxmertXLayer` calls its one `LxmertCrossAttentionLayer` twice: text tokens attend to
image tokens, and image tokens to text tokens, with the same query, key and value projections. Both calls see the same
prompts.

The unified token has another meaning here. In GLIP, the query projection of a modality also computes the keys of the
other modality, so a prototype token is a query state and a key. LXMERT has a separate key projection. SDPT inverts it,
so a token `Z` is in the space of keys. Queries of both modalities come from one `query` projection and are compared
with `Z` in the same heads. But `query` and `key` differ, so `Z` is not a possible query state of a modality. It is a
key that both attend to. The modalities share more than in GLIP. There is one inverse, so the prompts in the input
spaces of both modalities are equal, and so are the values read from them.

Keys are as wide as the tokens they are made of. So the inverse is exact if the weight has full rank, and the whole of
`Z` has an effect. In GLIP and Grounding DINO, the part of `Z` outside the projection's column space has no effect.

There is one side, and it does not tell which tokens attend, so `prompt_mode="independent"` and
`image_attends_prompts=False` raise an error. Without gates, the layer returns attention weights `(B, heads, L, L' + N)`
in the direction for which LXMERT asks for them, from text to image.
"""

from .cross_attention import Context, CrossAttentionHost
from .heads import bert_heads

LXMERT = CrossAttentionHost(
    name="LXMERT of transformers",
    class_names=("LxmertCrossAttentionLayer",),
    arguments=("input_tensor", "ctx_tensor", "ctx_att_mask", "output_attentions"),
    contexts=(
        Context(
            key="att.key",
            tokens=("ctx_tensor",),
            mask="ctx_att_mask",
            heads=bert_heads("att", "output.dense"),
        ),
    ),
)
