# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Fusion in both directions by one module, in which image and text tokens attend to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..attention import AttentionOptions, MaskFunction, Prompts, Side, SideInput, bi_attention, hide_padding
from ..fused_attention import absorbing_pays, fused_bi_attention
from ..weights import is_plain_linear
from .declaration import FusionHost


@dataclass(frozen=True, kw_only=True)
class BiAttentionHost(FusionHost):
    """Spec of a bi-directional attention, which the method was made for.

    The query projection of one modality also computes the keys that the other attends to, so SDPT inverts it. The
    module also has `num_heads`, `scale` (a factor of the image's queries) and `dropout` (a probability).

    Attributes:
        image_projections, text_projections: Attribute names of the query, value and output projections of a modality.
        image_tokens, text_tokens, image_mask, text_mask: Names of these arguments. None if there is no such mask.
        image_mask_function, text_mask_function: How a mask acts on the logits.
        returns_weights: Whether the module returns `((image, weights), (text, weights))`, or `(image, text)`.
    """

    image_projections: tuple[str, str, str]
    text_projections: tuple[str, str, str]
    image_tokens: str
    text_tokens: str
    image_mask: str | None
    text_mask: str | None
    image_mask_function: MaskFunction = hide_padding
    text_mask_function: MaskFunction = hide_padding
    returns_weights: bool = True
    image_reads: int | None = 1

    @property
    def inverted(self) -> tuple[str, ...]:
        return (self.image_projections[0], self.text_projections[0])

    def num_heads(self, module: nn.Module) -> int:
        return int(module.num_heads)  # type: ignore[arg-type] # `nn.Module` does not declare it

    @property
    def needed(self) -> tuple[str, ...]:
        return (*self.image_projections, *self.text_projections, "num_heads", "scale", "dropout")

    def attend(
        self,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        prompts: Sequence[Prompts],
        eager: bool = False,
    ) -> Any:
        if len(args) > len(self.arguments):
            raise TypeError(f"{self.class_names[0]} takes {self.arguments}, got {len(args)} arguments")
        bound = self.bind(args, kwargs)
        unknown = [name for name in bound if name not in self.arguments]
        if unknown:
            raise TypeError(f"{self.class_names[0]} takes {self.arguments}, got {unknown[0]!r} as well")
        if self.text_tokens not in bound:
            raise TypeError(f"{self.class_names[0]} needs {self.text_tokens!r}")
        image_prompts, text_prompts = prompts
        image_mask = None if self.image_mask is None else bound.get(self.image_mask)
        text_mask = None if self.text_mask is None else bound.get(self.text_mask)
        image = SideInput(bound[self.image_tokens], image_mask, *image_prompts)
        text = SideInput(bound[self.text_tokens], text_mask, *text_prompts)
        image_side = Side(*(getattr(module, name) for name in self.image_projections))
        text_side = Side(*(getattr(module, name) for name in self.text_projections))
        attributes: Any = module  # `nn.Module` does not declare them
        options: AttentionOptions = {
            "num_heads": attributes.num_heads,
            "scale": attributes.scale,
            "dropout": attributes.dropout if module.training else 0.0,
            "image_mask_function": self.image_mask_function,
            "text_mask_function": self.text_mask_function,
        }
        if (
            not eager
            and all(map(is_plain_linear, image_side))
            and absorbing_pays(
                image.length,
                text.length + (0 if text.gated is None else text.gated.num_prompts),
                image_side.query.weight,
                options["num_heads"],
            )
        ):
            image_out, text_out = fused_bi_attention(image, text, image_side, text_side, **options)
            image_weights = text_weights = None
        else:
            (image_out, image_weights), (text_out, text_weights) = bi_attention(
                image, text, image_side, text_side, **options
            )
        return ((image_out, image_weights), (text_out, text_weights)) if self.returns_weights else (image_out, text_out)
