# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detecting classes in pictures with a grounded detector."""

from __future__ import annotations

import functools
import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..errors import InputError
from ..training.interruption import leave_signals_to_the_main_process
from .data import DetectionSplit
from .grounding import class_prompt, class_scores, class_token_maps, split_classes

# COCO counts the 100 best detections of an image.
MAX_DETECTIONS = 100


def detect(model, processor, pictures: list, class_names: list[str], chunks: list[list[int]]) -> list[dict]:
    """Detect all classes in some pictures.

    Args:
        model: the detector, in eval mode.
        processor: its processor.
        pictures: B PIL images.
        class_names: names of the C classes.
        chunks: from `split_classes`; a forward pass each, so the vocabulary may be longer than one prompt.

    Returns:
        B dicts of the `MAX_DETECTIONS` best of all pairs of query and class: `boxes` (n, 4) as x, y, width, height in
        pixels of the picture, `scores` (n,), `labels` (n,) indices into `class_names`.
    """
    pixels = processor.image_processor(pictures, return_tensors="pt")
    return _detect(model, processor.tokenizer, pixels, [p.size for p in pictures], class_names, chunks)


@torch.no_grad()
def _detect(model, tokenizer, pixels, sizes: list[tuple[int, int]], class_names: list[str], chunks) -> list[dict]:
    """`detect` in B pictures of these sizes that an image processor has been through."""
    best = [{"scores": torch.empty(0), "labels": torch.empty(0, dtype=torch.long), "boxes": torch.empty(0, 4)}] * len(
        sizes
    )
    device = next(model.parameters()).device
    pixels = pixels.to(device)
    for chunk in chunks:
        prompt = class_prompt([class_names[i] for i in chunk])
        text = tokenizer([prompt] * len(sizes), padding=True, return_tensors="pt").to(device)
        outputs = model(**pixels, **text)
        scores = class_scores(outputs.logits.float(), class_token_maps(text["input_ids"], outputs.logits.shape[-1]))
        for image, score in enumerate(scores):
            width, height = sizes[image]
            top = score.flatten().topk(min(MAX_DETECTIONS, score.numel()))
            query, label = top.indices // len(chunk), top.indices % len(chunk)
            centre_x, centre_y, w, h = outputs.pred_boxes[image, query].float().unbind(-1)
            x0, x1 = (((centre_x + side * w / 2) * width).clamp(0, width) for side in (-1, 1))
            y0, y1 = (((centre_y + side * h / 2) * height).clamp(0, height) for side in (-1, 1))
            found = {
                "scores": top.values,
                "labels": torch.tensor(chunk, device=device)[label],
                "boxes": torch.stack([x0, y0, x1 - x0, y1 - y0], dim=-1),
            }
            merged = {key: torch.cat([best[image][key], found[key].cpu()]) for key in found}
            order = merged["scores"].argsort(descending=True)[:MAX_DETECTIONS]
            best[image] = {key: value[order] for key, value in merged.items()}
    return best


def detect_split(
    model,
    processor,
    data: DetectionSplit,
    batch_size: int,
    accelerator: Accelerator,
    label: str = "evaluating",
    num_workers: int = 0,
) -> list[tuple]:
    """Detect all classes in all pictures of a split, each picture once, in one of the processes of a launch.

    A batch has pictures of one size: padding changes scores, and what is found in a picture must not depend on its
    neighbours, which other batch sizes and numbers of processes would change.

    Returns:
        In every process the rows of all pictures, as `rows_of` makes them.

    Raises:
        InputError: if scores are not finite.
    """
    was_training = model.training
    model.eval()
    detector = accelerator.unwrap_model(model)
    chunks = split_classes(data.class_names, processor.tokenizer, detector.config.max_text_len)
    mine = sorted(range(len(data)), key=data.sizes.__getitem__)[accelerator.process_index :: accelerator.num_processes]
    batches = []
    for _, images in itertools.groupby(mine, key=data.sizes.__getitem__):
        images = list(images)
        batches += [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    loader = DataLoader(
        range(len(data)),
        batch_sampler=batches,
        collate_fn=functools.partial(_process, data, processor.image_processor),
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_main_process,
        # Its own: starting a loader draws from its generator.
        generator=torch.Generator(),
    )
    rows: list[tuple] = []
    for images, pixels in tqdm(loader, desc=label, leave=False, disable=not accelerator.is_local_main_process):
        sizes = [data.sizes[image] for image in images]
        with accelerator.autocast():
            found = _detect(detector, processor.tokenizer, pixels, sizes, data.class_names, chunks)
        for image, result in zip(images, found, strict=True):
            if not result["scores"].isfinite().all():
                raise InputError(f"{label}: scores are not finite; of a trained adapter, lower --learning_rate.")
            rows += rows_of(image, result)
    model.train(was_training)
    return gather_object(rows)


def _process(data: DetectionSplit, image_processor, images: list[int]) -> tuple:
    return images, image_processor([data.open_image(image) for image in images], return_tensors="pt")


def rows_of(image: int, result: dict) -> list[tuple]:
    """What `detect` found in one picture, as rows of image index, x, y, width, height, score, class index."""
    columns = (result["boxes"].tolist(), result["scores"].tolist(), result["labels"].tolist())
    return [(image, *box, score, label) for box, score, label in zip(*columns, strict=True)]


def result_of(image: int, rows: list[tuple]) -> dict:
    """The detections of one picture back from rows, as `detect` gave them."""
    mine = [row for row in rows if row[0] == image]
    return {
        "boxes": torch.tensor([row[1:5] for row in mine], dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor([row[5] for row in mine], dtype=torch.float32),
        "labels": torch.tensor([row[6] for row in mine], dtype=torch.long),
    }
