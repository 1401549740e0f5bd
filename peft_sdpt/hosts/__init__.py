# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The fusion layers SDPT can be attached to, one declaration a family."""

from __future__ import annotations

from torch import nn

from ..attention import add_validity, hide_invalid, hide_padding
from .bi_attention import BiAttentionHost
from .blip import BLIP, QFORMER
from .bridgetower import BRIDGETOWER
from .cross_attention import Context, CrossAttentionHost
from .declaration import FusionHost
from .glip import GLIP, MMDETECTION, MMDETECTION_3_0, ORIGINAL_GROUNDING_DINO
from .grounding_dino import GROUNDING_DINO
from .joint_attention import JointAttentionHost
from .joint_encoders import FLAVA, VILT
from .lxmert import LXMERT
from .omdet_turbo import OMDET_TURBO
from .sam3 import SAM3_DECODER, SAM3_ENCODER, SAM3_MASK_DECODER

HOSTS: list[FusionHost] = [
    GROUNDING_DINO,
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
    "JointAttentionHost",
    "add_validity",
    "find_hosts",
    "hide_invalid",
    "hide_padding",
    "register_host",
    "supported_hosts",
]


def register_host(host: FusionHost) -> None:
    """Make a fusion layer of your own known, in this process: before an adapter is attached or loaded.

    It comes before the built-in declarations, and replaces one that was registered under the same name.

    Raises:
        TypeError: `host` is no declaration.
    """
    if not isinstance(host, FusionHost):
        raise TypeError(f"host must be a FusionHost, a BiAttentionHost for instance; got {host!r}")
    HOSTS[:] = [host, *(known for known in HOSTS if known.name != host.name)]


def find_hosts(model: nn.Module) -> dict[str, FusionHost]:
    """Full name of each fusion layer in `model`, in the model's order, with the declaration that it fits."""
    modules = dict(model.named_modules())
    found = {}
    for name, module in modules.items():
        parts = name.split(".")
        ancestors = [modules[".".join(parts[:depth])] for depth in range(len(parts))] if name else []
        host = next((host for host in HOSTS if host.matches(module, ancestors)), None)
        if host is not None:
            found[name] = host
    return found


def supported_hosts() -> str:
    """The models that have a known fusion layer, and the class names of these, for messages."""
    return "; ".join(f"{host.name} ({', '.join(host.class_names)})" for host in HOSTS)
