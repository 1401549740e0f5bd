# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The fusion attentions SDPT can be attached to, one declaration a family."""

from __future__ import annotations

from torch import nn

from .declaration import FusionHost
from .grounding_dino import GROUNDING_DINO

HOSTS: tuple[FusionHost, ...] = (GROUNDING_DINO,)

__all__ = ["GROUNDING_DINO", "HOSTS", "FusionHost", "find_host", "supported_hosts"]


def find_host(module: nn.Module) -> FusionHost | None:
    """The declaration that `module` fits, or None if it is no known fusion attention."""
    return next((host for host in HOSTS if host.matches(module)), None)


def supported_hosts() -> str:
    """The models that have a known fusion attention, and the class names of these, for messages."""
    return "; ".join(f"{host.name} ({', '.join(host.class_names)})" for host in HOSTS)
