# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""FLAVA and ViLT: image and text in one sequence."""

import torch
from transformers import (
    FlavaConfig,
    FlavaImageConfig,
    FlavaModel,
    FlavaMultimodalConfig,
    FlavaTextConfig,
    ViltConfig,
    ViltModel,
)

from . import Case, on_meta, randomise
from .blip import with_pixels

WIDTH = 32
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 60, "max_position_embeddings": 16}


def make_vilt():
    torch.manual_seed(0)
    return randomise(ViltModel(ViltConfig(**SIZES, **IMAGE, **TEXT)))


def vilt_outputs(model, inputs):
    # Patches are put into a random order, which is that of their numbers as well.
    torch.manual_seed(0)
    states = model(**inputs).last_hidden_state
    # The text's tokens come first; a token and four patches of the image end the sequence.
    return torch.cat([states[:, :3].flatten(1), states[:, -5:].flatten(1)], dim=1)


def make_flava():
    torch.manual_seed(0)
    config = FlavaConfig(
        image_config=FlavaImageConfig(**SIZES, **IMAGE).to_dict(),
        text_config=FlavaTextConfig(**SIZES, **TEXT).to_dict(),
        multimodal_config=FlavaMultimodalConfig(**SIZES).to_dict(),
        hidden_size=WIDTH,
        projection_dim=16,
    )
    return randomise(FlavaModel(config))


def flava_outputs(model, inputs):
    # A token of the sequence, one of the image and four patches come before the text.
    return model(**inputs).multimodal_embeddings[:, : 6 + 3].flatten(1)


CASES = [
    Case(
        name="vilt",
        make=make_vilt,
        inputs=with_pixels,
        outputs=vilt_outputs,
        layers={f"encoder.layer.{index}.attention.attention": WIDTH for index in range(2)},
        # dandelin/vilt-b32-mlm; the numbers are the defaults.
        full_size=lambda: on_meta(ViltModel, ViltConfig()),
        full_size_layers=12,
    ),
    Case(
        name="flava",
        make=make_flava,
        inputs=with_pixels,
        outputs=flava_outputs,
        layers={f"multimodal_model.encoder.layer.{index}.attention.attention": WIDTH for index in range(2)},
        # facebook/flava-full; the numbers are the defaults.
        full_size=lambda: on_meta(FlavaModel, FlavaConfig()),
        full_size_layers=6,
    ),
]
