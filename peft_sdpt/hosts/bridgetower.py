# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""BridgeTower of transformers: a cross-modal layer of text tokens and one of image tokens, side by side.

Written for transformers 5.24. Layer `i` of `cross_modal_text_layers` lets text tokens attend to the image, and layer
`i` of `cross_modal_image_layers` lets image tokens attend to the text. Both read the states of both modalities before
either has run, so the two are one fusion layer in two directions. They share no weights.

Prompts are keys of what each layer attends to, through the inverse of its own key projection. The tokens belong to
the module of the text layer, and the module of the image layer uses the same tokens. This is a choice, not a
derivation. In GLIP, one logit matrix serves both directions and puts both modalities into one space. Here the two key
spaces were trained apart, and a number in one says nothing about the same number in the other. One set of tokens
couples the training: a gradient from one direction also moves the prompts of the other direction.
`prompt_mode="independent"` gives each direction its own tokens. It needs no such assumption and doubles the parameters.

Keys are as wide as the tokens they are made of. So each inverse is exact if its weight has full rank, and the whole
token has an effect in both directions.

`image_attends_prompts=False` keeps the prompts out of the image layers. The self-attention within both layers sees no
prompts, because it fuses a modality with itself only.
"""

from .cross_attention import Context, CrossAttentionHost
from .heads import bert_heads

BRIDGETOWER = CrossAttentionHost(
    name="BridgeTower of transformers",
    class_names=("BridgeTowerBertCrossLayer",),
    # The next argument is `cache`, or `past_key_values` before transformers 5.24, and it is None.
    arguments=("hidden_states", "encoder_hidden_states", "attention_mask", "encoder_attention_mask"),
    within=("BridgeTowerModel",),
    contexts=(
        Context(
            key="crossattention.self.key",
            tokens=("encoder_hidden_states",),
            mask="encoder_attention_mask",
            heads=bert_heads("crossattention.self", "crossattention.output.dense"),
        ),
    ),
    split=("cross_modal_text_layers", "cross_modal_image_layers"),
    image_reads=1,
)
