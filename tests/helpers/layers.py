# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""One SDPT layer on a tiny bi-directional attention, and inputs for it."""

import torch

from peft_sdpt import SDPTConfig, SDPTLayer
from peft_sdpt.hosts import GROUNDING_DINO
from tests.helpers.detectors import D_MODEL, make_attention

N, NV, NL = 4, 7, 5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
VARIANTS = {
    "default": {},
    "aligned": {"prompt_space": "aligned"},
    "full inverse": {"pinv_rtol": None},
    "image sees no prompts": {"image_attends_prompts": False},
    "independent": {"prompt_mode": "independent"},
    "independent, image sees none": {
        "prompt_mode": "independent",
        "image_attends_prompts": False,
    },
    "truncated inverse": {"pinv_rtol": 0.6},
}


def make_layer(
    name: str = "grounding_dino",
    dtype: torch.dtype = torch.float64,
    host: dict | None = None,
    device: torch.device | str = "cpu",
    **cfg,
) -> SDPTLayer:
    """A layer with one adapter without gates, and frozen projections as PEFT leaves them."""
    attention = make_attention(name, **(host or {})).to(dtype).requires_grad_(False)
    torch.manual_seed(1)
    # With attention weights, unless a test asks for none.
    config = SDPTConfig(**{"num_virtual_tokens": N, "prompt_gate": None, "attn_implementation": "eager", **cfg})
    layer = SDPTLayer(attention, GROUNDING_DINO, "default", config)
    assert layer.sdpt_prompts["default"].dtype == dtype
    return layer.to(device)


def make_inputs(
    dtype: torch.dtype = torch.float64, batch: int = 3, masks: str = "both", device: torch.device | str = "cpu"
):
    """Image tokens, text tokens and the two masks (True = padding), different for each sample."""
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(batch, NV, D_MODEL, generator=generator).to(dtype)
    text = torch.randn(batch, NL, D_MODEL, generator=generator).to(dtype)
    image_mask = torch.arange(NV)[None] >= torch.tensor([NV, NV - 2, NV - 1])[:batch, None]
    text_mask = torch.arange(NL)[None] >= torch.tensor([NL - 2, NL, NL - 3])[:batch, None]
    return (
        image.to(device),
        text.to(device),
        image_mask.to(device) if masks in ("both", "image") else None,
        text_mask.to(device) if masks in ("both", "text") else None,
    )
