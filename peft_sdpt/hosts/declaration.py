# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What SDPT has to know of a fusion attention: names and conventions, no code of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..attention import MaskFunction, Side, hide_padding


@dataclass(frozen=True)
class FusionHost:
    """Declaration of a family of bi-directional fusion attentions.

    A module belongs to the family when its class, or one it derives from, has one of `class_names`
    and all projections are there. Nothing is imported for that, so a host needs no dependency. The
    module also carries `num_heads`, `scale` and `dropout`, and returns
    `((image, weights), (text, weights))`.

    Attributes:
        name: what a user calls the host.
        class_names: class names of the fusion attention.
        image_projections, text_projections: attribute names of the query, value and output
            projections of a modality. The query projection is the one whose inverse SDPT takes.
        arguments: names of the forward's arguments for image tokens, text tokens, image mask and
            text mask, in the order in which they are declared.
        image_mask, text_mask: how a mask acts on the logits.
    """

    name: str
    class_names: tuple[str, ...]
    image_projections: tuple[str, str, str]
    text_projections: tuple[str, str, str]
    arguments: tuple[str, str, str, str]
    image_mask: MaskFunction = hide_padding
    text_mask: MaskFunction = hide_padding

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a fusion attention of this family."""
        class_names = {cls.__name__ for cls in type(module).__mro__}
        projections = self.image_projections + self.text_projections
        return not class_names.isdisjoint(self.class_names) and all(
            isinstance(getattr(module, name, None), nn.Module) for name in projections
        )

    def image_side(self, module: nn.Module) -> Side:
        """The image projections of a fusion attention."""
        return Side(*(getattr(module, name) for name in self.image_projections))

    def text_side(self, module: nn.Module) -> Side:
        """The text projections of a fusion attention."""
        return Side(*(getattr(module, name) for name in self.text_projections))

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
        """Image tokens, text tokens, image mask and text mask from the arguments of a call.

        Raises:
            TypeError: an argument is unknown, missing or given twice, as the host itself raises it.
        """
        names = self.arguments
        if len(args) > len(names):
            raise TypeError(f"{self.class_names[0]} takes {names}, got {len(args)} arguments")
        bound = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name not in names or name in bound:
                raise TypeError(
                    f"{self.class_names[0]} takes {names}, got {name!r} " + ("twice" if name in bound else "as well")
                )
            bound[name] = value
        missing = [name for name in names[:2] if name not in bound]
        if missing:
            raise TypeError(f"{self.class_names[0]} needs {missing}")
        return tuple(bound.get(name) for name in names)
