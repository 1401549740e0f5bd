# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What a training run sees: which picture when, how it is augmented, what it is asked for.

All of it follows from the seed and the number of the sample alone. So a run sees the same on any number of processes
and DataLoader workers, and one that was killed goes on with what it would have seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from .data import DetectionSplit, centre_boxes
from .grounding import class_prompt, phrase_lengths

# "Standard" scale jitter of arXiv 2012.07177: stronger jitter is for training from scratch.
SCALES = (0.8, 1.25)
# Of a box that is cut at least this share of its area must remain, or it is no object any more.
MIN_VISIBLE = 0.25
# What stands around a picture that was made smaller, RGB: the mean of ImageNet, which is zero to a detector.
GREY = (124, 116, 104)


def augment(picture: Image.Image, boxes: Tensor, generator: torch.Generator) -> tuple[Image.Image, Tensor, Tensor]:
    """Flip a picture left to right, every other time, and look at it through a window of random size and place.

    A window smaller than the picture is a crop, in which objects look larger; a larger one has a grey border. What is
    seen has the size of the picture: a batch would be padded to its largest, and padding is seen by the detector.

    Args:
        picture: RGB.
        boxes: (n, 4) as x, y, width, height in pixels.
        generator: on the CPU.

    Returns:
        The new picture, the boxes in it, cut at its edges, and which boxes remain, (n,) boolean: those with
        `MIN_VISIBLE` of their area in the picture.
    """
    width, height = picture.size
    flip, scale, left, top = torch.rand(4, generator=generator).tolist()
    if flip < 0.5:
        picture = ImageOps.mirror(picture)
        boxes = torch.cat([width - boxes[:, :1] - boxes[:, 2:3], boxes[:, 1:]], dim=1)
    scale = SCALES[0] + scale * (SCALES[1] - SCALES[0])
    size = (max(1, round(width / scale)), max(1, round(height / scale)))
    corner = (round(left * (width - size[0])), round(top * (height - size[1])))
    window = Image.new("RGB", size, GREY)
    window.paste(picture, (-corner[0], -corner[1]))
    low = boxes[:, :2] - torch.tensor(corner)
    high = low + boxes[:, 2:]
    low, high = (torch.minimum(edge.clamp(min=0), torch.tensor(size)) for edge in (low, high))
    cut = torch.cat([low, high - low], dim=1)
    kept = cut[:, 2:].prod(1) >= MIN_VISIBLE * boxes[:, 2:].prod(1)
    zoom = torch.tensor([width / size[0], height / size[1]])
    return window.resize((width, height), Image.Resampling.BILINEAR), cut * zoom.repeat(2), kept


class TrainingSamples(Dataset):
    """All samples of a run in their order: the pictures of an epoch shuffled, then those of the next.

    Where the classes do not all fit one prompt, a sample is asked for the classes in its picture and as many random
    others as fit, so a vocabulary of any size trains in the memory of one prompt.

    Args:
        data: the training split.
        num_samples: in the whole run.
        processor: the detector's.
        max_text_len: the detector's `config.max_text_len`.
        seed: 0 <= seed < 2**32.
        augmentation: whether to `augment` the pictures.

    Attributes:
        asks_all: whether all classes fit one prompt, so that each sample is asked for the same.
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
        # [CLS] and [SEP] have their place too.
        self.room = max_text_len - 2
        self.lengths = phrase_lengths(data.class_names, processor.tokenizer)
        self.asks_all = sum(self.lengths) <= self.room
        self.seed, self.augmentation = seed, augmentation
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> dict:
        epoch, place = divmod(number, len(self.data))
        image = self._order(epoch)[place]
        generator = _generator(self.seed, number)
        picture = self.data.open_image(image)
        boxes = torch.tensor(self.data.boxes[image], dtype=torch.float32).reshape(-1, 4)
        kept = torch.tensor([not crowd for crowd in self.data.crowds[image]], dtype=torch.bool)
        if self.augmentation:
            picture, boxes, visible = augment(picture, boxes, generator)
            kept &= visible
        present = [c for c, keep in zip(self.data.labels[image], kept.tolist(), strict=True) if keep]
        asked = self._ask(present, generator)
        position = {c: i for i, c in enumerate(asked)}
        objects = [(box, position[c]) for box, c in zip(boxes[kept].tolist(), present, strict=True) if c in position]
        return {
            "picture": picture,
            "prompt": class_prompt([self.data.class_names[c] for c in asked]),
            "labels": {
                "class_labels": torch.tensor([c for _, c in objects], dtype=torch.long),
                "boxes": centre_boxes([box for box, _ in objects], picture.size),
            },
        }

    def collate(self, samples: list[dict]) -> tuple[dict, list[dict]]:
        """Samples as a batch: what the detector takes, and its labels in the order of each prompt."""
        inputs = self.processor.image_processor([sample["picture"] for sample in samples], return_tensors="pt")
        prompts = [sample["prompt"] for sample in samples]
        inputs |= self.processor.tokenizer(prompts, padding=True, return_tensors="pt")
        return dict(inputs), [sample["labels"] for sample in samples]

    def _order(self, epoch: int) -> list[int]:
        if self._shuffled[0] != epoch:
            order = torch.randperm(len(self.data), generator=_generator(self.seed, epoch, of_epochs=True))
            self._shuffled = (epoch, order.tolist())
        return self._shuffled[1]

    def _ask(self, present: list[int], generator: torch.Generator) -> list[int]:
        if self.asks_all:
            return list(range(len(self.lengths)))
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        present = set(present)
        asked, room = [], self.room
        for c in sorted(shuffled, key=lambda c: c not in present):
            if self.lengths[c] > room:
                break
            asked.append(c)
            room -= self.lengths[c]
        # In the order of evaluation: its place in a prompt must not tell whether a class is in the picture.
        return sorted(asked)


def _generator(seed: int, number: int, of_epochs: bool = False) -> torch.Generator:
    """One for each sample of each seed, and others for the order of each epoch."""
    # torch reads no more than the lower 32 bits of a seed, so the three are hashed into them.
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, of_epochs, number)).generate_state(1)[0]))
