# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Purifiers: defences that change an image before the detector gets it, to remove an adversarial change.

A purifier that an attack does not know promises little. So attacks can also go through it: the forward pass is exact,
and the backward pass takes the purifier for the identity (BPDA, arXiv 1802.00420).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..wording import quoted
from .corruptions import compress


def _jpeg(images: Tensor, quality: int) -> Tensor:
    """Compress images of 8 bits on the CPU. Other libraries and qualities give other pixels."""
    pixels = (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)
    read = [
        torch.frombuffer(bytearray(compress(Image.fromarray(image.numpy()), quality).tobytes()), dtype=torch.uint8)
        for image in pixels.contiguous()
    ]
    return torch.stack(read).view(pixels.shape).permute(0, 3, 1, 2).to(images) / 255


def _bits(images: Tensor, bits: int) -> Tensor:
    """Round to 2**bits values per channel (feature squeezing, arXiv 1704.01155)."""
    largest = 2**bits - 1
    return (images.clamp(0, 1) * largest).round() / largest


# For each kind of purifier, its function, the largest number, and what the number is.
KINDS: dict[str, tuple[Callable[[Tensor, int], Tensor], int, str]] = {
    "jpeg": (_jpeg, 100, "quality"),
    "bits": (_bits, 8, "number of bits per channel"),
}


class _Straight(torch.autograd.Function):
    """A purifier in the forward pass, and the identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, purifier: Purifier) -> Tensor:
        return KINDS[purifier.kind][0](images, purifier.number)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@dataclass(frozen=True, order=True)
class Purifier:
    """A purifier of images. `parse_purifier` makes one from text. Purifiers are sorted by kind and number.

    Attributes:
        kind: "jpeg" compresses images, and "bits" rounds their pixels.
        number: The quality of JPEG, from 1 to 100, or the number of bits per channel, from 1 to 8.

    Raises:
        InputError: The kind is unknown, or the number is out of range.
    """

    kind: str
    number: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"purify={quoted(str(self))}: must be one of {', '.join(f'{kind}:N' for kind in KINDS)}.")
        _, largest, meaning = KINDS[self.kind]
        if not 1 <= self.number <= largest:
            raise InputError(f"purify={quoted(str(self))}: the {meaning} must be from 1 to {largest}.")

    def __call__(self, images: Tensor) -> Tensor:
        """Purify images.

        Args:
            images: Shape (B, 3, H, W), values in [0, 1].

        Returns:
            The purified images, on the same device. The gradient passes through as if they were the images.
        """
        return _Straight.apply(images, self)

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}"


def parse_purifier(text: str) -> Purifier:
    """Make a purifier from text.

    Args:
        text: "jpeg:75" for JPEG of quality 75, "bits:4" for 4 bits per channel.

    Returns:
        The purifier.

    Raises:
        InputError: The text is something else.
    """
    kind, _, number = text.partition(":")
    if not re.fullmatch("[0-9]{1,3}", number):
        raise InputError(f"purify={quoted(text)}: must be a kind and a number, such as jpeg:75 or bits:4.")
    return Purifier(kind, int(number))
