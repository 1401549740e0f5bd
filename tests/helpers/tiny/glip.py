# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""GLIP, the original Grounding DINO, mmdetection: towers of fusion layers with a module of our own."""

from functools import partial

import torch
import torch.nn.functional as F

from tests.helpers.bi_multi_head import DL, DV, FLAVOURS, WIDTH, FusionTower

from . import Case, randomise

NV, NL = 10, 5


def make(flavour, **changes):
    torch.manual_seed(0)
    return randomise(FusionTower(flavour, **changes))


def inputs(padding):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, NV, DV, generator=generator), torch.randn(2, NL, DL, generator=generator)
    return {
        "image": image,
        "text": F.pad(text, (0, 0, 0, padding), value=5.0),
        "text_padding": F.pad(torch.tensor([[False] * NL, [False] * 3 + [True] * 2]), (0, padding), value=True),
    }


def outputs(model, inputs):
    image, text = model(**inputs)
    return torch.cat([image.flatten(1), text[:, :3].flatten(1)], dim=1)


CASES = [
    Case(
        name=f"{flavour}, {levels} levels" if levels > 1 else flavour,
        make=partial(make, flavour, levels=levels, checkpointed=levels > 1),
        inputs=inputs,
        outputs=outputs,
        layers={f"blocks.{index}.attn": WIDTH for index in range(2)},
        # Their models do not build with today's libraries; the README has the counts of the paper.
        full_size=None,
        full_size_layers=0,
        sides={f"blocks.{index}.attn": 2 for index in range(2)},
        image_reads=True,
    )
    for flavour, levels in [*((flavour, 1) for flavour in FLAVOURS), ("glip", 5)]
]
