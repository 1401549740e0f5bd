# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The fusion attentions SDPT can be attached to, one declaration a family."""

from __future__ import annotations

from torch import nn

from .declaration import FusionHost
from .grounding_dino import GROUNDING_DINO

HOSTS: tuple[FusionHost, ...] = (GROUNDING_DINO,)

__all__ = ["GROUNDING_DINO", "HOSTS", "FusionHost", "find_host", "supported_classes"]


def find_host(module: nn.Module) -> FusionHost | None:
    """The declaration that `module` fits, or None if it is no known fusion attention."""
    return next((host for host in HOSTS if host.matches(module)), None)


def supported_classes() -> str:
    """The class names of all known fusion attentions, for messages."""
    return ", ".join(name for host in HOSTS for name in host.class_names)
