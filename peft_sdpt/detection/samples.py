# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The samples of a training run: the order of the images, their augmentation and their prompts.

Everything depends only on the seed and the number of the sample. So a run has the same samples with any number of
processes and DataLoader workers, and a run that was killed resumes with the samples that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..training.interruption import make_worker_init_fn
from .data import DetectionSplit, centre_boxes
from .grounding import class_prompt, phrase_lengths
from .pixels import process_images

# The "standard" scale jitter of arXiv 2012.07177. The stronger jitter there is for training from scratch.
SCALES = (0.8, 1.25)
# A box that a crop cuts remains if at least this fraction of its area is in the crop.
MIN_VISIBLE = 0.25
# RGB colour around an image that was made smaller: the mean of ImageNet, which processors map to zero.
GREY = (124, 116, 104)


class Sample(TypedDict):
    """One sample of `TrainingSamples`.

    Attributes:
        image: The image, RGB.
        prompt: The prompt with the classes of the sample.
        labels: `class_labels` (n,), indices of phrases in the prompt, and `boxes` (n, 4), as in
            `GroundedDetectionLoss`.
        number: Number of the sample in the run.
    """

    image: Image.Image
    prompt: str
    labels: dict[str, Tensor]
    number: int


def augment(image: Image.Image, boxes: Tensor, generator: torch.Generator) -> tuple[Image.Image, Tensor, Tensor]:
    """Apply a random flip, and resize a window of random size and place to the size of the image.

    The flip is horizontal with probability 0.5. A window smaller than the image is a crop and makes objects larger. A
    larger window has a grey border and makes objects smaller. The size of the image stays, because images of different
    sizes would be padded, and the detector sees padding.

    Args:
        image: The image, RGB.
        boxes: Tensor of shape (n, 4), x, y, width and height in pixels.
        generator: Random generator on the CPU.

    Returns:
        The new image, the boxes in it, shape (n, 4), cut at its edges, and a boolean mask of shape (n,) of the boxes
        that have at least `MIN_VISIBLE` of their area in the image.
    """
    width, height = image.size
    flip, scale, left, top = torch.rand(4, generator=generator).tolist()
    if flip < 0.5:
        image = ImageOps.mirror(image)
        boxes = torch.cat([width - boxes[:, :1] - boxes[:, 2:3], boxes[:, 1:]], dim=1)
    scale = SCALES[0] + scale * (SCALES[1] - SCALES[0])
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    corner = (round(left * (width - size[0])), round(top * (height - size[1])))
    window = Image.new("RGB", size, GREY)
    window.paste(image, (-corner[0], -corner[1]))
    low = boxes[:, :2] - torch.tensor(corner)
    high = low + boxes[:, 2:]
    low, high = (torch.minimum(edge.clamp(min=0), torch.tensor(size)) for edge in (low, high))
    cut = torch.cat([low, high - low], dim=1)
    is_visible = cut[:, 2:].prod(1) >= MIN_VISIBLE * boxes[:, 2:].prod(1)
    zoom = torch.tensor([width / size[0], height / size[1]])
    return window.resize((width, height), Image.Resampling.BILINEAR), cut * zoom.repeat(2), is_visible


class TrainingSamples(Dataset[Sample]):
    """All samples of a run in order: the shuffled images of the first epoch, then those of the next epoch, and so on.

    If the classes do not all fit into one prompt, a sample has the classes in its image and as many random others as
    fit. So a vocabulary of any size trains in the memory of one prompt.

    Args:
        data: The training split.
        num_samples: Number of samples in the whole run.
        processor: Processor of the detector.
        max_text_len: The detector's `config.max_text_len`.
        seed: Seed, 0 <= seed < 2**32.
        augmentation: Whether to `augment` the images.

    Attributes:
        has_one_prompt: Whether all classes fit into one prompt, so that all samples have the same prompt.
    """

    def __init__(
        self,
        data: DetectionSplit,
        num_samples: int,
        processor: Any,
        max_text_len: int,
        seed: int,
        augmentation: bool = True,
    ):
        self.data, self.processor, self.num_samples = data, processor, num_samples
        # [CLS] and [SEP] also take a token each.
        self.room = max_text_len - 2
        self.lengths = phrase_lengths(data.class_names, processor.tokenizer)
        self.has_one_prompt = sum(self.lengths) <= self.room
        self.seed, self.augmentation = seed, augmentation
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(f"number must be at least 0 and below {len(self)}, got {number}")
        return self._sample(
            self.index_of(number), number, generator_of(self.seed, number, Purpose.SAMPLE), self.augmentation
        )

    def index_of(self, number: int) -> int:
        """Return the index in the split of the image of a sample."""
        epoch, place = divmod(number, len(self.data))
        return self._order(epoch)[place]

    def without_augmentation(self, index: int) -> Sample:
        """Return the image with this index of the split as a sample, as it is. Its number is the index."""
        return self._sample(index, index, generator_of(self.seed, index, Purpose.SAMPLE), False)

    def _sample(self, index: int, number: int, generator: torch.Generator, augmentation: bool) -> Sample:
        image = self.data.open_image(index)
        boxes = torch.tensor(self.data.boxes[index], dtype=torch.float32).reshape(-1, 4)
        is_object = torch.tensor([not crowd for crowd in self.data.crowds[index]], dtype=torch.bool)
        if augmentation:
            image, boxes, is_visible = augment(image, boxes, generator)
            is_object &= is_visible
        present = [c for c, keep in zip(self.data.labels[index], is_object.tolist(), strict=True) if keep]
        prompted = self._choose_classes(present, generator)
        position = {c: i for i, c in enumerate(prompted)}
        objects = [
            (box, position[c]) for box, c in zip(boxes[is_object].tolist(), present, strict=True) if c in position
        ]
        return {
            "image": image,
            "prompt": class_prompt([self.data.class_names[c] for c in prompted]),
            "labels": {
                "class_labels": torch.tensor([c for _, c in objects], dtype=torch.long),
                "boxes": centre_boxes([box for box, _ in objects], image.size),
            },
            "number": number,
        }

    def collate(self, samples: list[Sample]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Make a batch of samples.

        Args:
            samples: Samples of this data set.

        Returns:
            The inputs of the detector, and the labels of each image. They also have the `number` of the sample.
        """
        inputs = process_images(self.processor.image_processor, [sample["image"] for sample in samples])
        prompts = [sample["prompt"] for sample in samples]
        inputs |= self.processor.tokenizer(prompts, padding=True, return_tensors="pt")
        return dict(inputs), [{**sample["labels"], "number": torch.tensor(sample["number"])} for sample in samples]

    def loader(self, batch_size: int, num_workers: int = 0) -> DataLoader:
        """Make a `DataLoader` of batches in order. Accelerate can prepare it.

        Args:
            batch_size: Batch size per device.
            num_workers: Number of processes that read images. They ignore Ctrl-C, which the main process handles.

        Returns:
            The loader. It yields what `collate` returns.
        """
        return DataLoader(
            self,
            batch_size=batch_size,
            collate_fn=self.collate,
            num_workers=num_workers,
            worker_init_fn=make_worker_init_fn(num_workers),
            # From pinned memory, batches can be copied to a GPU while it works.
            pin_memory=torch.cuda.is_available(),
            # Starting a loader draws from its generator. The default one also drives dropout, and a resumed run would
            # draw from it once more.
            generator=torch.Generator(),
        )

    def _order(self, epoch: int) -> list[int]:
        """Return the indices of the images in the order of an epoch."""
        if self._shuffled[0] != epoch:
            order = torch.randperm(len(self.data), generator=generator_of(self.seed, epoch, Purpose.EPOCH))
            self._shuffled = (epoch, order.tolist())
        return self._shuffled[1]

    def _choose_classes(self, present: list[int], generator: torch.Generator) -> list[int]:
        """Choose the classes of a prompt: the classes in the image and as many random others as fit."""
        if self.has_one_prompt:
            return list(range(len(self.lengths)))
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        return fitting_classes(present, shuffled, self.lengths, self.room)


def fitting_classes(present: Iterable[int], order: Sequence[int], lengths: Sequence[int], room: int) -> list[int]:
    """Choose the classes of a prompt: the classes in an image and as many others as fit.

    Args:
        present: Classes in the image.
        order: All classes, in the order in which they are taken.
        lengths: The result of `phrase_lengths`.
        room: Number of tokens of the prompt, without [CLS] and [SEP].

    Returns:
        The classes, sorted as in evaluation. The place of a class in the prompt must not tell whether it is in the
        image.
    """
    in_image = set(present)
    chosen = []
    for c in sorted(order, key=lambda c: c not in in_image):
        if lengths[c] > room:
            break
        chosen.append(c)
        room -= lengths[c]
    return sorted(chosen)


class Purpose(IntEnum):
    """What random numbers are for. Two purposes never share them."""

    SAMPLE = 0
    EPOCH = 1
    ATTACK = 2


def generator_of(seed: int, number: int, purpose: Purpose) -> torch.Generator:
    """Return a random generator on the CPU that depends on nothing else.

    Args:
        seed: Seed of the run, 0 <= seed < 2**32.
        number: Number of a sample, an epoch or an image.
        purpose: What the random numbers are for.
    """
    # torch uses only the lower 32 bits of a seed, so the three numbers are hashed into them.
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, purpose, number)).generate_state(1)[0]))
