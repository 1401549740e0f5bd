# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""BridgeTower of transformers: a cross-modal layer of text tokens and one of image tokens, side by side.

Read in transformers 5.24. Layer `i` of `cross_modal_text_layers` lets text tokens attend to the image, layer `i` of
`cross_modal_image_layers` lets image tokens attend to the text; both read the states of both modalities before either
has run, so the two are one fusion layer in two directions. They have no weight in common.

Prompts are appended to what each attends to, through the inverse of its own key projection. The tokens live in the
text layer's module and the image layer's sees the same ones. That they are the same is a choice, not a derivation:
in GLIP one logit matrix serves both directions and puts both modalities into one space, while here the two key spaces
were trained apart, and a number in one says nothing about the same number in the other. What one set gives is the
training: a step that one direction asks for moves what the other direction sees. `prompt_mode="independent"` gives
each direction tokens of its own, which assumes nothing and doubles the parameters.

Keys are as wide as the tokens they are made of, so each inverse is a true one (as far as its weight has full rank) and
the whole of a token acts in both directions.

`image_attends_prompts=False` keeps the prompts out of the image layers. The self-attention within both layers sees no
prompts: each is fusion of one modality with itself.
"""

from .cross_attention import Context, CrossAttentionHost

BRIDGETOWER = CrossAttentionHost(
    name="BridgeTower of transformers",
    class_names=("BridgeTowerBertCrossLayer",),
    # What follows is `cache`, `past_key_values` before transformers 5.24, and None.
    arguments=("hidden_states", "encoder_hidden_states", "attention_mask", "encoder_attention_mask"),
    within=("BridgeTowerModel",),
    contexts=(
        Context(key="crossattention.self.key", tokens=("encoder_hidden_states",), mask="encoder_attention_mask"),
    ),
    split=("cross_modal_text_layers", "cross_modal_image_layers"),
    image_reads=1,
)
