# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""LXMERT of transformers: one cross-attention for both directions.

Read in transformers 5.24. `LxmertXLayer` calls its one `LxmertCrossAttentionLayer` twice, text tokens attending to
image tokens and image tokens to text tokens, with the same query, key and value projections. Both calls see the same
prompts.

What the unified token means here. In GLIP the query projection of a modality makes what the other modality attends to,
so a prototype token is a query state and a key at once. LXMERT has a key projection of its own, and that is the one
that is inverted: the space of a token `Z` is the space of keys. Queries of both modalities come from one `query`
projection and are compared with `Z` in the same heads, but `query` and `key` differ, so `Z` is no longer a query state
that either modality could have: it is a key that both look at. What the modalities share is more than in GLIP: there is
one inverse, so the prompt in the input space of one modality is that of the other, exactly, and so are the values read
from it.

Keys are as wide as the tokens they are made of, so the inverse is a true one (as far as the weight has full rank) and
the whole of `Z` acts; in GLIP and Grounding DINO the part outside of the projection's column space does not.

There is one side, with nothing in it that tells who attends: `prompt_mode="independent"` and
`image_attends_prompts=False` are refused. The layer returns attention weights `(B, heads, L, L' + N)` in the direction
for which LXMERT asks for them, from text to image.
"""

from .cross_attention import Context, CrossAttentionHost

LXMERT = CrossAttentionHost(
    name="LXMERT of transformers",
    class_names=("LxmertCrossAttentionLayer",),
    arguments=("input_tensor", "ctx_tensor", "ctx_att_mask", "output_attentions"),
    contexts=(Context(key="att.key", tokens=("ctx_tensor",), mask="ctx_att_mask"),),
)
