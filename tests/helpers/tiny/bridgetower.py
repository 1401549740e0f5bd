# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""BridgeTower of transformers, without a head: both directions of its last layer are in what it returns."""

import torch
import torch.nn.functional as F
from transformers import BridgeTowerConfig, BridgeTowerModel

from . import Case, on_meta, randomise

WIDTH = 32
# Held by the layers of text tokens, shared with those of image tokens.
SHARED = {f"cross_modal_image_layers.{index}": f"cross_modal_text_layers.{index}" for index in range(2)}


def make():
    config = BridgeTowerConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_hidden_layers=2,
        text_config={
            "vocab_size": 50,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 16,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        # The picture's encoder has a head for every 64 channels.
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 4, "image_size": 8},
    )
    # It draws its class embedding, which `randomise` adds to.
    torch.manual_seed(0)
    return randomise(BridgeTowerModel(config))


def inputs(padding):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 50, (2, 5), generator=generator)
    ids[1, 3:] = 1
    return {
        "input_ids": F.pad(ids, (0, padding), value=1),
        "attention_mask": F.pad(torch.tensor([[1] * 5, [1] * 3 + [0] * 2]), (0, padding)),
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
    }


def outputs(model, inputs):
    result = model(**inputs)
    parts = (result.text_features[:, :3], result.image_features, result.pooler_output)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def full_size():
    """`BridgeTower/bridgetower-base`, whose numbers are the defaults."""
    return on_meta(BridgeTowerModel, BridgeTowerConfig())


CASE = Case(
    name="bridgetower",
    make=make,
    inputs=inputs,
    outputs=outputs,
    layers=dict.fromkeys(SHARED.values(), WIDTH),
    shared=SHARED,
    sides=dict.fromkeys(SHARED.values(), 2),
    image_reads=True,
    full_size=full_size,
    full_size_layers=6,
)
