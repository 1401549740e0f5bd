# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""SAM 3 and SAM 3 Lite Text of transformers: all that they predict, from a picture and a phrase."""

from functools import partial

import torch
import torch.nn.functional as F
from transformers import Sam3Config, Sam3LiteTextConfig, Sam3LiteTextModel, Sam3Model

from . import Case, on_meta, randomise

WIDTH = 32
ENCODER = [f"detr_encoder.layers.{index}" for index in range(2)]
DECODER = [f"detr_decoder.layers.{index}" for index in range(2)]
MASK_DECODER = "mask_decoder"
IMAGE = 16


CLASSES = {"sam3": (Sam3Config, Sam3Model), "sam3_lite_text": (Sam3LiteTextConfig, Sam3LiteTextModel)}


def config(name):
    attention = {"hidden_size": WIDTH, "num_attention_heads": 4}
    layers = {**attention, "num_layers": 2, "intermediate_size": 64, "dropout": 0.0}
    text = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "projection_dim": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    if name == "sam3":
        ids = {"bos_token_id": 47, "eos_token_id": 49, "pad_token_id": 0}
        text = {**text, **ids, "model_type": "clip_text_model", "num_hidden_layers": 1}
    else:
        # Its first and last layers are convolutions over positions, which see padding, and change with it.
        text = {**text, "num_hidden_layers": 2, "use_repmixer_blocks": False}
    return CLASSES[name][0](
        vision_config={
            "model_type": "sam3_vision_model",
            "backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": IMAGE,
                "patch_size": 4,
                "pretrain_image_size": 8,
                "window_size": 2,
                "global_attn_indexes": [1],
            },
            "fpn_hidden_size": WIDTH,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config=text,
        geometry_encoder_config={**layers, "num_layers": 1, "roi_size": 2},
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": 6},
        mask_decoder_config={**attention, "num_upsampling_stages": 2},
    )


def make(name="sam3", attention="sdpa"):
    torch.manual_seed(0)
    model = randomise(CLASSES[name][1]._from_config(config(name), attn_implementation=attention))
    if name == "sam3_lite_text":
        # It stretches its position embeddings to the length of the text, so that padding moves all positions; unless
        # they are the same everywhere.
        positions = model.text_encoder.embeddings.position_embedding.position_embedding
        with torch.no_grad():
            positions.copy_(positions[..., :1, :].expand_as(positions))
    return model


def inputs(padding):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 47, (2, 5), generator=generator)
    ids[0, 4] = ids[1, 2] = 49
    ids[1, 3:] = 0
    return {
        "input_ids": F.pad(ids, (0, padding)),
        "attention_mask": F.pad(torch.tensor([[1] * 5, [1] * 3 + [0] * 2]), (0, padding)),
        "pixel_values": torch.randn(2, 3, IMAGE, IMAGE, generator=generator),
    }


def outputs(model, inputs):
    result = model(**inputs)
    parts = (result.pred_logits, result.pred_boxes, result.presence_logits, result.pred_masks, result.semantic_seg)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def full_size(name):
    """The defaults: `facebook/sam3`, and what transformers ascribes to `yonigozlan/sam3-litetext-s0`."""
    config_class, model_class = CLASSES[name]
    return on_meta(model_class, config_class())


CASES = [
    Case(
        name=name,
        make=partial(make, name),
        inputs=inputs,
        outputs=outputs,
        layers=dict.fromkeys([*ENCODER, *DECODER, MASK_DECODER], WIDTH),
        sides=dict.fromkeys(DECODER, 2),
        full_size=partial(full_size, name),
        full_size_layers=13,
    )
    for name in CLASSES
]
