# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""LXMERT of transformers, its encoder and its pooler."""

import torch
import torch.nn.functional as F
from transformers import LxmertConfig, LxmertForPreTraining, LxmertModel

from . import Case, on_meta, randomise

WIDTH = 32
LAYERS = [f"encoder.x_layers.{index}.visual_attention" for index in range(2)]


def make():
    config = LxmertConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        l_layers=1,
        x_layers=2,
        r_layers=1,
        visual_feat_dim=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return randomise(LxmertModel(config))


def inputs(padding):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (2, 5), generator=generator)
    ids[1, 3:] = 0
    return {
        "input_ids": F.pad(ids, (0, padding)),
        "attention_mask": F.pad(torch.tensor([[1] * 5, [1] * 3 + [0] * 2]), (0, padding)),
        "visual_feats": torch.randn(2, 6, 24, generator=generator),
        "visual_pos": torch.rand(2, 6, 4, generator=generator),
        # The second picture has fewer objects.
        "visual_attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
    }


def outputs(model, inputs):
    result = model(**inputs)
    parts = (result.language_output[:, :3], result.vision_output[:, :4], result.pooled_output)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def full_size():
    """`unc-nlp/lxmert-base-uncased`, whose numbers are the defaults."""
    return on_meta(LxmertForPreTraining, LxmertConfig())


CASE = Case(
    name="lxmert",
    make=make,
    inputs=inputs,
    outputs=outputs,
    layers=dict.fromkeys(LAYERS, WIDTH),
    full_size=full_size,
    full_size_layers=5,
)
