# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Adversarial images: small changes of the pixels that make a detector fail.

The attack is projected gradient descent (PGD, arXiv 1706.06083). With one step from the image itself, it is FGSM (arXiv
1412.6572). The losses are those of TOG (arXiv 2004.04320) and AdvPT (arXiv 2311.11261, Adversarial Prompt Tuning). The
gradient goes through everything that the detector has, also through its prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from .grounding import phrase_numbers
from .loss import GroundedDetectionLoss
from .pixels import PixelRange, pad_small_images
from .prediction import evaluation_mode, without_autocast

# What each loss of `Attack` makes the detector do.
LOSSES = {
    "all": "raises the loss of training: the scores of tokens and the boxes, in the decoder and the proposals",
    "class": "raises the loss of the scores alone",
    "box": "raises the loss of the boxes alone",
    "vanish": "lowers all scores, so that no object is found (TOG)",
    "mislabel": "raises the scores of the next class of the prompt for each object (TOG)",
    "features": "changes the features of the backbone, without labels (AdvPT)",
}
NORMS = ("inf", "2")
# How far images may be outside of [0, 1] by rounding in single precision.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Attack:
    """How images are attacked. Distances are those of images with values in [0, 1].

    Attributes:
        eps: Largest distance from the image. With the norm "inf", no pixel value changes by more, and eps is at most 1.
        steps: Number of gradient steps.
        step: Length of a step. None for 2.5 * eps / steps, which reaches any point in the ball, or for 1.25 * eps if
            there is only one step (arXiv 2001.03994).
        restarts: Number of attacks from different random points. For each image, the one with the highest loss counts.
        loss: A key of `LOSSES`.
        norm: "inf" for the largest change of a pixel value, "2" for the square root of the sum of squared changes.
        random_start: Whether to start at a random point of the ball instead of the image.

    Raises:
        InputError: A value is not allowed.
    """

    eps: float = 2 / 255
    steps: int = 20
    step: float | None = None
    restarts: int = 1
    loss: str = "all"
    norm: str = "inf"
    random_start: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("loss", LOSSES), ("norm", NORMS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}.")
        if not isinstance(self.eps, int | float) or not 0 <= self.eps < math.inf:
            raise InputError(f"eps={self.eps!r}: must be a number of at least 0.")
        if self.norm == "inf" and self.eps > 1:
            raise InputError(f"eps={self.eps}: must be at most 1, the range of a pixel; for example 2 / 255.")
        for name in ("steps", "restarts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}={value}: must be an integer of at least 1.")
        if self.step is not None and not 0 < self.step < math.inf:
            raise InputError(f"step={self.step}: must be positive and finite.")

    @property
    def step_length(self) -> float:
        """Length of a step, also if `step` is None."""
        if self.step is not None:
            return self.step
        return 1.25 * self.eps if self.steps == 1 else 2.5 * self.eps / self.steps


class Ball:
    """The images that are allowed around some images: at most `eps` away, with values in [0, 1], and equal on padding.

    Args:
        pixel_values: Pixel values of the images, shape (B, 3, H, W).
        pixel_mask: Shape (B, H, W), 0 on padding. None if there is no padding.
        eps: As in `Attack`.
        norm: As in `Attack`.
        pixel_range: The range of the pixel values.

    Raises:
        InputError: The pixel values are not in the range.
    """

    def __init__(self, pixel_values: Tensor, pixel_mask: Tensor | None, eps: float, norm: str, pixel_range: PixelRange):
        self.center, self.eps, self.norm = pixel_values.detach().float(), eps, norm
        pixel_range = pixel_range.to(pixel_values.device)
        # What a change of an image by 1 is in pixel values.
        self.unit = 1 / pixel_range.std
        batch, _, height, width = pixel_values.shape
        if pixel_mask is None:
            pixel_mask = torch.ones(batch, height, width, device=pixel_values.device)
        self.is_image = pixel_mask[:, None].bool()
        images = pixel_range.to_images(self.center)
        # In half precision, values are rounded more.
        tolerance = max(TOLERANCE, torch.finfo(pixel_values.dtype).eps)
        outside = ((images < -tolerance) | (images > 1 + tolerance)) & self.is_image
        if outside.any():
            raise InputError(
                f"pixel_values: are from {images.min():.3g} to {images.max():.3g} as images, not from 0 to 1; pass the "
                "image_processor that made them."
            )
        radius = eps * self.unit if norm == "inf" else math.inf
        black, white = (pixel_range.to_pixel_values(torch.full_like(pixel_range.mean, value)) for value in (0.0, 1.0))
        # By rounding, pixel values can be a little outside the range. They may stay where they are.
        low = torch.maximum(self.center - radius, black).minimum(self.center)
        high = torch.minimum(self.center + radius, white).maximum(self.center)
        self.low, self.high = (torch.where(self.is_image, edge, self.center) for edge in (low, high))

    def random_point(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw pixel values in the ball, shape (B, 3, H, W).

        Args:
            generators: One generator on the CPU per image. An image draws the same with any padding.
        """
        noise = torch.zeros(self.center.shape)
        rows, columns = self.is_image[:, 0].any(2).sum(1).tolist(), self.is_image[:, 0].any(1).sum(1).tolist()
        for image, (height, width, generator) in enumerate(zip(rows, columns, generators, strict=True)):
            shape = (3, height, width)
            if self.norm == "inf":
                drawn = torch.rand(shape, generator=generator) * 2 - 1
            else:
                drawn = torch.randn(shape, generator=generator)
                radius = torch.rand((), generator=generator) ** (1 / drawn.numel())
                drawn *= radius / drawn.norm().clamp_min(1e-12)
            noise[image, :, :height, :width] = drawn
        return self.clamp(self.center + self.eps * noise.to(self.center.device) * self.unit)

    def move(self, pixel_values: Tensor, gradient: Tensor, length: float) -> Tensor:
        """Go a step along the gradient of a loss, and back into the ball.

        Args:
            pixel_values: Where to start, shape (B, 3, H, W).
            gradient: Gradient of the loss with respect to the pixel values.
            length: Length of the step.

        Returns:
            The new pixel values.
        """
        if self.norm == "inf":
            return self.clamp(pixel_values + length * self.unit * gradient.sign())
        # As in an image with values in [0, 1].
        slope = gradient.float() * self.unit * self.is_image
        change = (pixel_values - self.center) / self.unit + length * slope / _norms(slope).clamp_min(1e-12)
        change = change * (self.eps / _norms(change).clamp_min(1e-12)).clamp(max=1)
        return self.clamp(self.center + change * self.unit)

    def clamp(self, pixel_values: Tensor) -> Tensor:
        """Move pixel values to the nearest allowed ones. With the norm "2", only to the range of images."""
        return torch.minimum(torch.maximum(pixel_values, self.low), self.high)


def _norms(images: Tensor) -> Tensor:
    """Return the norm of each image, shape (B, 1, 1, 1)."""
    return images.flatten(1).norm(dim=1)[:, None, None, None]


def perturb(
    detector: nn.Module,
    loss_function: GroundedDetectionLoss,
    inputs: Mapping[str, Tensor],
    labels: Sequence[Mapping[str, Tensor]],
    attack: Attack,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    *,
    image_processor: Any = None,
    purify: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attack the images of a batch.

    The detector is in evaluation mode meanwhile, and computes without autocast. No gradient of a parameter is changed.
    An image is changed in the same way alone and in a batch, up to rounding, because the loss of an image does not
    depend on other images.

    Args:
        detector: The detector, with or without an adapter. With several processes, it is the detector inside of
            DistributedDataParallel.
        loss_function: The loss of the detector.
        inputs: Inputs of the detector.
        labels: The objects of each image, as in `GroundedDetectionLoss`. The loss "features" does not use them.
        attack: The attack.
        generator: Random generator on the CPU, or one per image. It draws the random starts. None for the default
            generator.
        image_processor: The image processor that made the pixel values. None if it has the mean and the standard
            deviation of ImageNet.
        purify: A defence that the attack knows. It maps images (B, 3, H, W) in [0, 1] to images that the detector gets.

    Returns:
        The adversarial pixel values, with the shape and the dtype of `inputs["pixel_values"]`. In half precision, they
        are rounded at the end, which changes the distance a little.

    Raises:
        InputError: The pixel values are not in the range of images, there are not as many generators as images, the
            labels cannot be used, the loss "mislabel" is used with prompts of one class, the gradient of the loss is
            not finite, or this is called in `torch.inference_mode`.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("perturb: needs gradients, which torch.inference_mode does not allow; use torch.no_grad.")
    detector = without_autocast(detector)
    pixel_values = inputs["pixel_values"]
    generators = _one_per_image(generator, len(pixel_values))
    pixel_range = PixelRange.of(image_processor).to(pixel_values.device)
    ball = Ball(pixel_values, inputs.get("pixel_mask"), attack.eps, attack.norm, pixel_range)
    objective = _Objective(detector, loss_function, inputs, labels, attack.loss, pixel_range, purify)
    best: Tensor | None = None
    highest: Tensor | None = None
    device_type = pixel_values.device.type
    with torch.enable_grad(), torch.autocast(device_type, enabled=False), evaluation_mode(detector):
        objective.begin(ball.center)
        for _ in range(attack.restarts):
            current = ball.random_point(generators) if attack.random_start else ball.center
            for _ in range(attack.steps):
                current = ball.move(current, objective.gradient(current), attack.step_length)
            if attack.restarts == 1:
                best = current
                break
            with torch.no_grad():
                losses = objective(current)
            if best is None or highest is None:
                best, highest = current, losses
            else:
                better = losses > highest
                best = torch.where(better[:, None, None, None], current, best)
                highest = torch.where(better, losses, highest)
    assert best is not None
    # Read once, because reading waits for the GPU.
    is_finite = objective.is_finite.tolist()
    if not all(is_finite):
        raise InputError(
            f"perturb: the gradient of the loss is not finite for image {is_finite.index(False)} of the batch. The "
            "weights may be damaged, or too large for their dtype. If training caused this, lower the learning rate."
        )
    return best.to(pixel_values.dtype)


def _one_per_image(
    generator: torch.Generator | Sequence[torch.Generator] | None, num_images: int
) -> list[torch.Generator]:
    if generator is None or isinstance(generator, torch.Generator):
        return [generator or torch.default_generator] * num_images
    if len(generator) != num_images:
        raise InputError(f"generator: must be one, or one per image, got {len(generator)} for {num_images} images.")
    return list(generator)


class _Features(NamedTuple):
    """Log-probabilities (B, C, P) of a feature map over its channels, and the mask (B, P) of positions in the image."""

    logits: Tensor
    is_image: Tensor


class _Objective:
    """What an attack raises, as a function of the pixel values. The arguments are those of `perturb`."""

    def __init__(
        self,
        detector: nn.Module,
        loss_function: GroundedDetectionLoss,
        inputs: Mapping[str, Tensor],
        labels: Sequence[Mapping[str, Tensor]],
        loss: str,
        pixel_range: PixelRange,
        purify: Callable[[Tensor], Tensor] | None,
    ):
        self.detector, self.loss_function, self.inputs = detector, loss_function, inputs
        self.labels, self.loss = [dict(label) for label in labels], loss
        self.pixel_range, self.purify = pixel_range, purify
        self.dtype = inputs["pixel_values"].dtype
        self.clean: list[_Features] = []
        pixels = inputs["pixel_values"]
        self.is_finite = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)

    def begin(self, pixel_values: Tensor) -> None:
        """Compute what the loss needs of the clean images."""
        if self.loss == "features":
            with torch.no_grad():
                self.clean = self._features(pixel_values)

    def gradient(self, pixel_values: Tensor) -> Tensor:
        """Compute the gradient of the sum over all images."""
        pixel_values = pixel_values.detach().requires_grad_()
        losses = self(pixel_values)
        (gradient,) = torch.autograd.grad(losses.sum(), pixel_values)
        self.is_finite &= losses.detach().isfinite() & gradient.isfinite().flatten(1).all(1)
        return gradient

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Compute the loss of each image, shape (B,)."""
        if self.loss == "features":
            divergence = torch.zeros(len(pixel_values), device=pixel_values.device)
            for clean, changed in zip(self.clean, self._features(pixel_values), strict=True):
                of_positions = (clean.logits.exp() * (clean.logits - changed.logits)).sum(1)
                divergence = divergence + (of_positions * clean.is_image).sum(1) / clean.is_image.sum(1)
            return divergence
        outputs = self.detector(**self._inputs(pixel_values))
        if self.loss == "vanish":
            nothing = [
                {"class_labels": label["class_labels"][:0], "boxes": label["boxes"][:0]} for label in self.labels
            ]
            return -self.loss_function.of_images(outputs, nothing, ("class",))
        if self.loss == "mislabel":
            return -self.loss_function.of_images(outputs, self._shifted(outputs))
        terms = ("class", "box") if self.loss == "all" else (self.loss,)
        return self.loss_function.of_images(outputs, self.labels, terms)

    def _inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        if self.purify is not None:
            purified = self.pixel_range.to_pixel_values(self.purify(self.pixel_range.to_images(pixel_values)))
            mask = self.inputs.get("pixel_mask")
            pixel_values = purified if mask is None else torch.where(mask[:, None].bool(), purified, pixel_values)
        return pad_small_images({**self.inputs, "pixel_values": pixel_values.to(self.dtype)}, self.detector.config)

    def _shifted(self, outputs: Any) -> list[dict[str, Tensor]]:
        """Return the labels with the next class of the prompt for each object."""
        num_phrases = phrase_numbers(outputs.input_ids, outputs.logits.shape[-1]).amax(1)
        if (num_phrases < 2).any():
            raise InputError('loss="mislabel": needs prompts with at least two classes, because it swaps them.')
        return [
            {**label, "class_labels": (label["class_labels"] + 1) % number}
            for label, number in zip(self.labels, num_phrases, strict=True)
        ]

    def _features(self, pixel_values: Tensor) -> list[_Features]:
        """Compute the feature maps of the backbone."""
        base_model: Any = self.detector
        base_model = base_model.get_base_model() if hasattr(base_model, "get_base_model") else base_model
        inputs = self._inputs(pixel_values)
        pixels = inputs["pixel_values"]
        mask = inputs.get("pixel_mask")
        if mask is None:
            mask = torch.ones(len(pixels), *pixels.shape[-2:], dtype=torch.long, device=pixels.device)
        maps = base_model.model.backbone.conv_encoder(pixels, mask)
        return [
            _Features(features.float().flatten(2).log_softmax(1), is_image.flatten(1).bool())
            for features, is_image in maps
        ]
