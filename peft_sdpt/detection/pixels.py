# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Makes pixels for a detector from images: resizes the images, and pads those with too few positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import InputError

# The mean and the standard deviation of ImageNet, which the image processors of all published detectors here have.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Strides of the stages of a ResNet that Grounding DINO uses. The configs of Swin and similar backbones give theirs.
STRIDES = [8, 16, 32]


def process_images(image_processor: Any, images: Sequence[Image.Image]) -> Any:
    """Resize images and make a batch of them.

    Args:
        image_processor: The image processor of a detector.
        images: The images, RGB.

    Returns:
        What the processor returns: `pixel_values` (B, 3, H, W) and `pixel_mask` (B, H, W).

    Raises:
        InputError: An image is so oblong that its shorter side has no pixels left.
    """
    try:
        return image_processor(images, return_tensors="pt")
    except ValueError as error:
        width, height = max((image.size for image in images), key=lambda size: max(size) / min(size))
        raise InputError(
            f"an image of {width} x {height} pixels cannot be resized by this processor ({error}); if the image is "
            "very oblong, cut it into parts, or use a larger image size."
        ) from None


class PixelRange(NamedTuple):
    """How the values of an image in [0, 1] become pixel values of a detector: `(image - mean) / std`.

    Attributes:
        mean, std: Shape (3, 1, 1).
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, image_processor: Any = None) -> PixelRange:
        """Read the range from an image processor. None for the mean and standard deviation of ImageNet."""
        mean, std = torch.zeros(3), torch.ones(3)
        # A processor of images and text has one of images.
        image_processor = getattr(image_processor, "image_processor", image_processor)
        if image_processor is None:
            mean, std = torch.tensor(MEAN), torch.tensor(STD)
        elif image_processor.do_normalize:
            mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
        # An image of integers up to 255 is multiplied by this factor first.
        factor = 1.0
        if image_processor is not None:
            factor = 255 * (image_processor.rescale_factor if image_processor.do_rescale else 1.0)
        return cls(*((part.float() / factor)[:, None, None] for part in (mean, std)))

    def to(self, device: torch.device) -> PixelRange:
        """Return the same range on a device."""
        return PixelRange(self.mean.to(device), self.std.to(device))

    def to_images(self, pixel_values: Tensor) -> Tensor:
        """Convert pixel values (..., 3, H, W) to images in [0, 1]."""
        return pixel_values * self.std + self.mean

    def to_pixel_values(self, images: Tensor) -> Tensor:
        """Convert images in [0, 1], shape (..., 3, H, W), to pixel values."""
        return (images - self.mean) / self.std


def num_positions(height: int, width: int, config: Any) -> int:
    """Count the positions of an image in all feature maps of a detector.

    Args:
        height, width: Size of the resized image in pixels.
        config: Config of a Grounding DINO or MM Grounding DINO.

    Returns:
        The number of positions. It is the length of the sequence that the encoder sees.
    """
    # Each feature map has half the size of the one before, rounded up.
    return sum(-(-height // stride) * -(-width // stride) for stride in strides_of(config))


def pad_small_images(inputs: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Pad images that have fewer positions than the detector has queries.

    The first stage of Grounding DINO selects as many positions as it has queries. If an image has fewer positions,
    transformers 5.24 raises "selected index k out of range". This happens for small and for very oblong images, whose
    shorter side has only a few pixels after resizing. Such images are padded on the right and at the bottom, as in a
    batch with a larger image, until there are enough positions. The mask hides the padding, and boxes stay relative to
    the image.

    Args:
        inputs: Inputs of the detector, with `pixel_values` (B, 3, H, W) and optionally `pixel_mask` (B, H, W), which is
            0 on padding.
        config: Config of the detector.

    Returns:
        A new dict with the inputs. The tensors are unchanged if there are enough positions.
    """
    inputs = dict(inputs)
    # A detector of one stage has learned queries, which work with any number of positions.
    if not getattr(config, "two_stage", False):
        return inputs
    batch, _, old_height, old_width = inputs["pixel_values"].shape
    height, width, step = old_height, old_width, strides_of(config)[0]
    while num_positions(height, width, config) < config.num_queries:
        # One more row or column of the finest feature map, on the shorter side.
        if height <= width:
            height = (height // step + 1) * step
        else:
            width = (width // step + 1) * step
    if (height, width) != (old_height, old_width):
        margin = (0, width - old_width, 0, height - old_height)
        mask = inputs.get("pixel_mask")
        if mask is None:
            shape = (batch, old_height, old_width)
            mask = torch.ones(shape, dtype=torch.long, device=inputs["pixel_values"].device)
        inputs |= {"pixel_values": nn.functional.pad(inputs["pixel_values"], margin)}
        inputs |= {"pixel_mask": nn.functional.pad(mask, margin)}
    return inputs


def strides_of(config: Any) -> list[int]:
    """Return the stride of each feature map in pixels, the finest first."""
    backbone = config.backbone_config
    strides = list(STRIDES)
    # In a hierarchical transformer, the first stage has the stride of a patch. Each further stage doubles it.
    if isinstance(patch_size := getattr(backbone, "patch_size", None), int):
        strides = [patch_size * 2 ** (index - 1) for index in backbone.out_indices]
    while len(strides) < config.num_feature_levels:
        strides.append(2 * strides[-1])
    return strides
