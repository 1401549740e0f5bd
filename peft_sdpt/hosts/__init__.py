# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Specs of the fusion layers that SDPT can be attached to, one for each family."""

from __future__ import annotations

from torch import nn

from ..attention import add_validity, hide_invalid, hide_padding
from .bi_attention import BiAttentionHost
from .blip import BLIP, QFORMER
from .bridgetower import BRIDGETOWER
from .cross_attention import Context, CrossAttentionHost
from .declaration import FusionHost
from .glip import GLIP, MMDETECTION, MMDETECTION_3_0, ORIGINAL_GROUNDING_DINO
from .grounding_dino import GROUNDING_DINO, GROUNDING_DINO_DECODER
from .heads import Heads
from .joint_attention import JointAttentionHost
from .joint_encoders import FLAVA, VILT
from .lxmert import LXMERT
from .omdet_turbo import OMDET_TURBO
from .sam3 import SAM3_DECODER, SAM3_ENCODER, SAM3_MASK_DECODER

HOSTS: list[FusionHost] = [
    GROUNDING_DINO,
    GROUNDING_DINO_DECODER,
    ORIGINAL_GROUNDING_DINO,
    GLIP,
    MMDETECTION,
    MMDETECTION_3_0,
    LXMERT,
    BRIDGETOWER,
    SAM3_ENCODER,
    SAM3_DECODER,
    SAM3_MASK_DECODER,
    BLIP,
    QFORMER,
    OMDET_TURBO,
    FLAVA,
    VILT,
]

__all__ = [
    "BLIP",
    "BRIDGETOWER",
    "FLAVA",
    "GLIP",
    "GROUNDING_DINO",
    "GROUNDING_DINO_DECODER",
    "HOSTS",
    "LXMERT",
    "MMDETECTION",
    "MMDETECTION_3_0",
    "OMDET_TURBO",
    "ORIGINAL_GROUNDING_DINO",
    "QFORMER",
    "SAM3_DECODER",
    "SAM3_ENCODER",
    "SAM3_MASK_DECODER",
    "VILT",
    "BiAttentionHost",
    "Context",
    "CrossAttentionHost",
    "FusionHost",
    "Heads",
    "JointAttentionHost",
    "add_validity",
    "find_hosts",
    "hide_invalid",
    "hide_padding",
    "register_host",
    "supported_hosts",
]


def register_host(host: FusionHost) -> None:
    """Register the spec of a fusion layer of your own in this process, before an adapter is attached or loaded.

    It takes precedence over the built-in specs, and replaces a spec that was registered under the same name.

    Args:
        host: Spec of the fusion layer, for instance a `BiAttentionHost`.

    Raises:
        TypeError: `host` is not a spec.
    """
    if not isinstance(host, FusionHost):
        raise TypeError(f"host must be a FusionHost, for instance a BiAttentionHost; got {host!r}")
    HOSTS[:] = [host, *(known for known in HOSTS if known.name != host.name)]


def find_hosts(model: nn.Module) -> dict[str, FusionHost]:
    """Return the spec of each fusion layer in `model` by its full name, in the model's order."""
    modules = dict(model.named_modules())
    specs = {}
    for name, module in modules.items():
        parts = name.split(".")
        ancestors = [modules[".".join(parts[:depth])] for depth in range(len(parts))] if name else []
        host = next((host for host in HOSTS if host.matches(module, ancestors, name)), None)
        if host is not None:
            specs[name] = host
    return specs


def supported_hosts() -> str:
    """Return the names of all specs and their class names, for messages."""
    return "; ".join(f"{host.name} ({', '.join(host.class_names)})" for host in HOSTS)
