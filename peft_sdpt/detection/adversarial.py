# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Adversarial training: a detector learns from images that are attacked while it trains.

The objective is a weighted sum of the loss of clean images and the loss of adversarial images. There are four ways to
make the adversarial images:

* "bank", as AdvPT (arXiv 2311.11261): once for each image, before training, by an attack on the base model without the
  adapter. This attack does not know the prompts.
* "fast" (arXiv 2001.03994): in each step, by one gradient step from a random point.
* "pgd" (arXiv 1706.06083): in each step, by several gradient steps.
* "free" (arXiv 1904.12843): each batch is trained on several times. The gradient with respect to the pixels, which
  costs little more than that of the weights, moves the images before the next time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import remove_leftovers
from .attacks import Attack, Ball, perturb
from .devices import to_device
from .loss import GroundedDetectionLoss
from .pixels import PixelRange, pad_small_images
from .prediction import batches_of_one_size, without_adapter
from .samples import Purpose, TrainingSamples, generator_of
from .stored_tensors import digest, read_tensors, write_tensors

# The number of gradient steps of each method, unless the user chooses. "free" trains on each batch that many times.
STEPS = {"bank": 10, "free": 4, "fast": 1, "pgd": 3}


class View(NamedTuple):
    """One of the inputs that a step trains on.

    Attributes:
        inputs: Inputs of the detector, on its device.
        weight: Weight in the loss.
        is_last: Whether this is the last view of its batch.
    """

    inputs: dict[str, Tensor]
    weight: float
    is_last: bool = True


class Views:
    """Makes the inputs that a training step trains on. This class trains on clean images only.

    Args:
        detector: The detector with its adapter, without the wrappers of Accelerate.
        device: Device for the inputs. None for that of the detector.

    Attributes:
        replays: How many steps train on each batch.
    """

    replays = 1

    def __init__(self, detector: nn.Module, device: torch.device | None = None):
        self.detector: Any = detector
        self.device = next(detector.parameters()).device if device is None else device

    def prepare(self, samples: TrainingSamples, batch_size: int, accelerator: Accelerator) -> None:
        """Do what has to be done before training. All processes of a launch call this together.

        Args:
            samples: The training samples.
            batch_size: Batch size per device.
            accelerator: The accelerator of the launch.
        """

    def begin(self) -> None:
        """Forget the batches of earlier steps. Call this before the first of the `replays` steps on some batches."""

    def of_batch(self, index: int, inputs: dict[str, Tensor], labels: list[dict[str, Tensor]]) -> Iterator[View]:
        """Yield the views of a batch. Compute the gradients of the loss of a view before you ask for the next one.

        Args:
            index: Number of the batch in its step, from 0. It is above 0 only with gradient accumulation.
            inputs: Inputs of the detector, on the CPU, as `TrainingSamples.collate` makes them.
            labels: The labels, on the CPU, with the `number` of each sample.

        Raises:
            InputError: An image cannot be attacked; see `perturb`.
        """
        yield View(self._clean(inputs), 1.0)

    def _clean(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return to_device(pad_small_images(inputs, self.detector.config), self.device)


class AdversarialViews(Views):
    """Makes adversarial inputs for a training step by attacking the current detector, as "fast" and "pgd" do.

    Args:
        detector: The detector with its adapter, without the wrappers of Accelerate.
        loss_function: Its loss.
        image_processor: Its image processor.
        attack: The attack.
        weight: Weight of the adversarial images in the loss, 0 < weight <= 1. That of the clean images is 1 - weight.
        seed: Seed of the run. The random numbers of an attack depend only on it and the number of the sample.
        device: As in `Views`.
    """

    def __init__(
        self,
        detector: nn.Module,
        loss_function: GroundedDetectionLoss,
        image_processor: Any,
        attack: Attack,
        weight: float,
        seed: int,
        device: torch.device | None = None,
    ):
        super().__init__(detector, device)
        self.loss_function, self.image_processor = loss_function, image_processor
        self.pixel_range = PixelRange.of(image_processor)
        self.attack, self.weight, self.seed = attack, weight, seed

    def of_batch(self, index: int, inputs: dict[str, Tensor], labels: list[dict[str, Tensor]]) -> Iterator[View]:
        clean = self._clean(inputs)
        if self.weight < 1:
            yield View(clean, 1 - self.weight, is_last=False)
        yield View({**clean, "pixel_values": self._perturbed(clean, labels)}, self.weight)

    def _perturbed(self, clean: dict[str, Tensor], labels: list[dict[str, Tensor]]) -> Tensor:
        """Attack the current detector. Returns pixel values."""
        return perturb(
            self.detector,
            self.loss_function,
            clean,
            to_device(labels, self.device),
            self.attack,
            self._generators(labels),
            image_processor=self.image_processor,
        )

    def prepare(self, samples: TrainingSamples, batch_size: int, accelerator: Accelerator) -> None:
        if self.attack.loss == "mislabel" and len(samples.data.class_names) < 2:
            raise InputError(f"loss={self.attack.loss!r}: needs at least two classes, because it swaps them.")

    def _generators(self, labels: list[dict[str, Tensor]]) -> list[torch.Generator]:
        return [generator_of(self.seed, number, Purpose.ATTACK) for number in numbers_of(labels)]

    def _ball(self, inputs: dict[str, Tensor]) -> Ball:
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_mask")
        return Ball(pixels, mask, self.attack.eps, self.attack.norm, self.pixel_range)


class FreeViews(AdversarialViews):
    """Trains on each batch several times, and moves its images by the gradients of training itself.

    The arguments are those of `AdversarialViews`. The number of steps of the attack is the number of replays. As in the
    paper, each step has the length eps. Other than in the paper, each batch starts at a random point, so that a run can
    resume between batches. The loss of the attack is that of training, in training mode, with its dropout and autocast.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.replays = self.attack.steps
        # For each batch of a step, the numbers of its samples, its ball and the current pixel values.
        self.moving: list[tuple[list[int], Ball, Tensor]] = []

    def begin(self) -> None:
        self.moving.clear()

    def of_batch(self, index: int, inputs: dict[str, Tensor], labels: list[dict[str, Tensor]]) -> Iterator[View]:
        clean, numbers = self._clean(inputs), numbers_of(labels)
        if index == len(self.moving):
            ball = self._ball(clean)
            self.moving.append((numbers, ball, ball.random_point(self._generators(labels))))
        before, ball, current = self.moving[index]
        if before != numbers:
            raise InputError("adversarial training: `begin` must be called before the first step on other batches.")
        if self.weight < 1:
            yield View(clean, 1 - self.weight, is_last=False)
        # The gradient of the loss ends here, as at a parameter.
        pixel_values = current.detach().to(clean["pixel_values"].dtype).requires_grad_()
        yield View({**clean, "pixel_values": pixel_values}, self.weight)
        if pixel_values.grad is None:
            raise InputError("adversarial training: the gradient of a view must be computed before the next view.")
        # With fp16, a gradient can overflow. The optimizer skips that step too.
        gradient = pixel_values.grad.nan_to_num(0.0, posinf=0.0, neginf=0.0)
        self.moving[index] = (numbers, ball, ball.move(current, gradient, self.attack.eps))


class BankViews(AdversarialViews):
    """Trains on adversarial images that are made once, before training, by an attack on the base model.

    Args:
        arguments: The arguments of `AdversarialViews`.
        folder: Folder for the changes of the images, as float16. They are found by the image and its place in the
            split, by the boxes and classes of the split, the base model, the attack and the seed.
    """

    def __init__(self, *arguments: Any, folder: str | os.PathLike):
        super().__init__(*arguments)
        self.folder = Path(folder)
        self.samples: TrainingSamples | None = None
        self.key = ""

    def prepare(self, samples: TrainingSamples, batch_size: int, accelerator: Accelerator) -> None:
        """Attack the images whose changes are not in the folder yet. All processes of a launch call this together.

        Args:
            samples, batch_size, accelerator: As in `Views.prepare`.

        Raises:
            InputError: The folder cannot be written.
        """
        super().prepare(samples, batch_size, accelerator)
        self.samples = samples
        parts: list[str | Tensor] = [str(self.attack), str(self.seed), samples.data.fingerprint()]
        parts += self.pixel_range
        for name, tensor in self._weights():
            parts += [name, tensor.cpu()]
        self.key = digest(parts)
        if accelerator.is_main_process and self.folder.is_dir():
            remove_leftovers(self.folder)
        accelerator.wait_for_everyone()
        # None of the images of a batch is padded, because they have the same size.
        batches = batches_of_one_size(samples.data, range(len(samples.data)), batch_size)
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        for batch in tqdm(mine, desc="attacking", leave=False, disable=not accelerator.is_local_main_process):
            inputs, labels = samples.collate([samples.without_augmentation(index) for index in batch])
            keys = [self._key(index, pixels) for index, pixels in zip(batch, inputs["pixel_values"], strict=True)]
            if all(read_tensors(self._file(key), key) for key in keys):
                continue
            height, width = inputs["pixel_values"].shape[-2:]
            with without_adapter(self.detector):
                pixel_values = self._perturbed(self._clean(inputs), labels).cpu()
            changes = (pixel_values[..., :height, :width] - inputs["pixel_values"]) * self.pixel_range.std
            for key, change in zip(keys, changes, strict=True):
                write_tensors(self._file(key), key, [change.half().contiguous()])
        accelerator.wait_for_everyone()

    def of_batch(self, index: int, inputs: dict[str, Tensor], labels: list[dict[str, Tensor]]) -> Iterator[View]:
        if self.weight < 1:
            yield View(self._clean(inputs), 1 - self.weight, is_last=False)
        # Made on the CPU, where stored features are looked up by the pixels.
        pixel_values = self._changed(inputs, numbers_of(labels))
        yield View(self._clean({**inputs, "pixel_values": pixel_values}), self.weight)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the base model, which are all weights but those of an adapter that trains."""
        has_adapter = hasattr(self.detector, "disable_adapter")
        for name, tensor in (*self.detector.named_parameters(), *self.detector.named_buffers()):
            if not (has_adapter and tensor.requires_grad):
                yield name, tensor.detach()

    def _changed(self, inputs: dict[str, Tensor], numbers: list[int]) -> Tensor:
        """Add the stored changes to images on the CPU. Returns pixel values."""
        if self.samples is None:
            raise InputError("adversarial training: `prepare` must be called before training.")
        ball = self._ball(inputs)
        moved = inputs["pixel_values"].clone()
        for number, pixels, is_image in zip(numbers, moved, ball.is_image[:, 0], strict=True):
            # The rows and columns that are not padding.
            own = pixels[:, : int(is_image.any(1).sum()), : int(is_image.any(0).sum())]
            key = self._key(self.samples.index_of(number), own)
            stored = read_tensors(self._file(key), key)
            if stored is None:
                raise InputError(
                    f"folder={str(self.folder)!r}: has no adversarial image {key[:16]}; files of it may be missing or "
                    "damaged. Resume the run, which makes them again."
                )
            own += stored[0].float() / self.pixel_range.std
        return ball.clamp(moved)

    def _key(self, index: int, pixels: Tensor) -> str:
        return digest([self.key, str(index), pixels.contiguous()])

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def numbers_of(labels: list[dict[str, Tensor]]) -> list[int]:
    """Return the number of the sample of each image.

    Raises:
        InputError: A label has no number.
    """
    if not all("number" in label for label in labels):
        raise InputError("labels: must have a `number` for each image, as those of TrainingSamples.collate.")
    return [int(label["number"]) for label in labels]


def make_views(
    method: str,
    detector: nn.Module,
    loss_function: GroundedDetectionLoss,
    image_processor: Any,
    *,
    eps: float = 2 / 255,
    steps: int | None = None,
    loss: str | None = None,
    weight: float = 1.0,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    device: torch.device | None = None,
) -> Views:
    """Make what chooses the inputs of each training step, for one of the methods of adversarial training.

    Args:
        method: "none", "bank", "free", "fast" or "pgd".
        detector: The detector with its adapter, without the wrappers of Accelerate.
        loss_function: Its loss.
        image_processor: Its image processor.
        eps: As in `Attack`.
        steps: Number of gradient steps of the attack. For "free", the number of replays. None for that of `STEPS`.
        loss: As in `Attack`. None for "features" with "bank", else "all".
        weight: Weight of the adversarial images in the loss, 0 < weight <= 1.
        seed: Seed of the random starts.
        folder: Folder for the changes of images of "bank".
        device: Device for the inputs. None for that of the detector.

    Returns:
        The views. Call `prepare` before training.

    Raises:
        InputError: The value of an argument is not allowed.
    """
    if method == "none":
        return Views(detector, device)
    if method not in STEPS:
        raise InputError(f"method={method!r}: must be one of none, {', '.join(STEPS)}.")
    if not 0 < weight <= 1:
        raise InputError(f"weight={weight}: must be above 0 and at most 1.")
    if method == "fast" and steps not in (None, 1):
        raise InputError(f'steps={steps}: must be 1 if method="fast"; use "pgd" for more.')
    if method == "free" and loss not in (None, "all"):
        raise InputError(f'loss={loss!r}: must be "all" if method="free", which attacks by the gradients of training.')
    is_bank = method == "bank"
    attack = Attack(eps, STEPS[method] if steps is None else steps, loss=loss or ("features" if is_bank else "all"))
    if is_bank and eps:
        # The length of a step in AdvPT.
        attack = replace(attack, step=1.25 * eps / attack.steps)
    common = (detector, loss_function, image_processor, attack, weight, seed, device)
    if is_bank:
        if folder is None:
            raise InputError('folder=None: must be a folder if method="bank".')
        return BankViews(*common, folder=folder)
    return FreeViews(*common) if method == "free" else AdversarialViews(*common)
