# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detecting objects in images with a grounded detector."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..errors import InputError, hint
from ..training.interruption import make_worker_init_fn
from ..wording import quoted
from .data import DetectionSplit
from .devices import to_cpu, to_device
from .grounding import class_prompt, class_scores, class_token_maps, split_classes
from .pixels import num_positions, pad_small_images, process_images

# COCO counts the 100 best detections per image. This is the default of all functions here.
MAX_DETECTIONS = 100
# Lowest score of a detection to show, if no validation suggests one.
DEFAULT_THRESHOLD = 0.3
# Before a run, images are checked whose longer side is more than this many times the shorter one.
OBLONG = 3
# A detection: image index, x, y, width, height, score, class index.
Row = tuple[int, float, float, float, float, float, int]


class _BestScore(TypedDict, total=False):
    best_score: float


class Detections(_BestScore):
    """Detections in one image.

    Attributes:
        boxes: Shape (n, 4), x, y, width and height in pixels.
        scores: Shape (n,).
        labels: Shape (n,), class indices.
        best_score: The best score in the image, also if it is below the threshold of `detect`. Only `detect` sets it.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def detect(
    model: nn.Module,
    processor: Any,
    images: list[Image.Image],
    class_names: list[str],
    chunks: list[list[int]],
    threshold: float = 0.0,
    max_detections: int | None = MAX_DETECTIONS,
) -> list[Detections]:
    """Detect all classes in some images.

    Args:
        model: The detector, in evaluation mode.
        processor: Its processor.
        images: The images, RGB.
        class_names: Names of the classes.
        chunks: The result of `split_classes`. Each chunk takes one forward pass, so the classes need not fit into one
            prompt.
        threshold: Lowest score of a detection.
        max_detections: Maximum number of detections per image. None for no limit. If there is no limit, use a
            threshold, because otherwise each pair of query and class is a detection.

    Returns:
        For each image, the best of all pairs of query and class, sorted by score, and the best score.

    Raises:
        InputError: `max_detections` is below 1, an image is not RGB or cannot be resized, or the scores or boxes are
            not finite.
    """
    _check_limit(max_detections)
    for index, image in enumerate(images):
        if image.mode != "RGB":  # a conversion by Pillow would make an image of 16 bits white
            raise InputError(
                f"images[{index}]: must be RGB, got {image.mode}; peft_sdpt.detection.read_image reads any file as RGB."
            )
    pixels = process_images(processor.image_processor, images)
    sizes = [image.size for image in images]
    names = [f"images[{index}]" for index in range(len(images))]
    return detect_in_pixels(
        model, processor.tokenizer, pixels, sizes, names, class_names, chunks, threshold, max_detections
    )


def _check_limit(max_detections: int | None) -> None:
    if max_detections is not None and max_detections < 1:
        raise InputError(f"max_detections={max_detections}: must be at least 1, or None for no limit.")


@torch.no_grad()
def detect_in_pixels(
    model: nn.Module,
    tokenizer: Any,
    pixels: Any,
    sizes: list[tuple[int, int]],
    names: list[str],
    class_names: list[str],
    chunks: list[list[int]],
    threshold: float,
    max_detections: int | None,
) -> list[Detections]:
    """Detect all classes in images that are pixel values already.

    Args:
        model: The detector, in evaluation mode.
        tokenizer: Its tokenizer.
        pixels: What `process_images` returns for the images, or changed pixel values in its place.
        sizes: (width, height) of each image in pixels, before it was resized.
        names: Names of the images for error messages.
        class_names, chunks, threshold, max_detections: As in `detect`.

    Returns:
        As `detect`.

    Raises:
        InputError: The scores or boxes are not finite.
    """
    best_scores = [0.0] * len(sizes)
    # For each image, the boxes, scores and labels of each chunk.
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in sizes]
    device = next(model.parameters()).device
    inputs = to_device(pad_small_images(pixels, model.config), device)
    for chunk in chunks:
        prompt = class_prompt([class_names[i] for i in chunk])
        text = to_device(tokenizer([prompt] * len(sizes), padding=True, return_tensors="pt"), device)
        outputs = model(**inputs, **text)
        token_maps = class_token_maps(text["input_ids"], outputs.logits.shape[-1])
        scores = torch.stack(class_scores(outputs.logits.float(), token_maps)).flatten(1)
        # Pairs of query and class are selected on the device, because LVIS has a million of them.
        limit = int((scores >= threshold).sum(1).max()) if max_detections is None else max_detections
        pairs = scores.topk(min(limit, scores.shape[1]), dim=1).indices.sort(dim=1).values
        query = (pairs // len(chunk))[..., None].expand(-1, -1, 4)
        boxes = outputs.pred_boxes.float().gather(1, query)
        # Everything is copied together, because each copy waits for the GPU.
        sums, best, *columns = to_cpu([_sums(outputs), scores.amax(1), boxes, scores.gather(1, pairs), pairs])
        _check_finite(sums, names, outputs.logits.dtype)
        for image, (box, score, pair) in enumerate(zip(*columns, strict=True)):
            best_scores[image] = max(best_scores[image], best[image].item())
            is_found = score >= threshold
            label = torch.tensor(chunk)[pair[is_found] % len(chunk)]
            found[image].append((in_pixels(box[is_found], sizes[image]), score[is_found], label))
    return [join(parts, best, max_detections) for parts, best in zip(found, best_scores, strict=True)]


def in_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Convert boxes of a detector to those of `Detections`.

    Args:
        boxes: Shape (n, 4): centre, width and height relative to the image.
        size: (width, height) of the image in pixels.

    Returns:
        Shape (n, 4): x, y, width and height in pixels. Boxes are cut at the border of the image.
    """
    width, height = size
    centre_x, centre_y, w, h = boxes.unbind(-1)
    x0, x1 = (((centre_x + side * w / 2) * width).clamp(0, width) for side in (-1, 1))
    y0, y1 = (((centre_y + side * h / 2) * height).clamp(0, height) for side in (-1, 1))
    return torch.stack([x0, y0, x1 - x0, y1 - y0], dim=-1)


def join(parts: Sequence[tuple[Tensor, Tensor, Tensor]], best_score: float, limit: int | None) -> Detections:
    """Join the detections with several prompts in one image.

    Args:
        parts: The boxes, scores and labels with each prompt.
        best_score: The best score in the image.
        limit: Maximum number of detections. None for no limit.

    Returns:
        The detections, sorted by score.
    """
    boxes, scores, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    order = scores.argsort(descending=True, stable=True)[:limit]
    return {"boxes": boxes[order], "scores": scores[order], "labels": labels[order], "best_score": best_score}


def _sums(outputs: Any) -> Tensor:
    """Return a number per image that is finite if all logits and boxes are. The logits of padding are -inf."""
    # The maximum is NaN if a logit is NaN, and infinite if a logit is infinite.
    return outputs.logits.flatten(1).amax(1).float() + outputs.pred_boxes.flatten(1).float().sum(1)


def _check_finite(sums: Tensor, names: list[str], dtype: torch.dtype) -> None:
    """Raise an `InputError` if a result of `_sums`, which a model of this dtype gave, is not finite."""
    is_finite = sums.isfinite().tolist()
    if not all(is_finite):
        raise InputError(
            f"{names[is_finite.index(False)]}: the scores or boxes are not finite. The weights may be damaged, or too "
            f"large for {str(dtype).removeprefix('torch.')}."
        )


def check_image_size(
    model: nn.Module, processor: Any, image_size: int | None = None, sizes: Iterable[tuple[int, int]] = ()
) -> None:
    """Detect in blank images to check that a model supports an image size, and the sizes of the images in a data set.

    Args:
        model: The detector. Its mode, training or evaluation, stays as it is.
        processor: Its processor, which resizes images to this size.
        image_size: Width and height of a square image in pixels. None to check only `sizes`.
        sizes: (width, height) of images in pixels, before they are resized. The most oblong ones are checked.

    Raises:
        InputError: The model fails, a square image has fewer positions than the model has queries, or an image is so
            oblong that its shorter side has no pixels left.
    """
    config: Any = model.config
    if image_size is not None:
        try:
            pixels = _blank(model, processor, (image_size, image_size))
        except RuntimeError as error:
            raise InputError(f"image_size={image_size}: does not suit this base model ({error}).") from None
        # Smaller images would be padded, and most of each image would be padding.
        positions = num_positions(pixels.shape[-2], pixels.shape[-1], config)
        if positions < config.num_queries:
            raise InputError(
                f"image_size={image_size}: does not suit this base model (a square image has only {positions} "
                f"positions for {config.num_queries} queries)."
            )
    by_shape = sorted(set(sizes), key=lambda size: size[0] / size[1])
    for size in {by_shape[0], by_shape[-1]} if by_shape else ():
        if max(size) > OBLONG * min(size):
            try:
                _blank(model, processor, size)
            except RuntimeError as error:
                raise InputError(
                    f"images of {size[0]} x {size[1]} pixels: do not suit this base model ({error})."
                ) from None


def _blank(model: nn.Module, processor: Any, size: tuple[int, int]) -> Tensor:
    """Detect in a blank image of this size. Returns its pixels after resizing."""
    image = Image.new("RGB", size)
    with evaluation_mode(model):
        detect(model, processor, [image], ["object"], [[0]])
    return process_images(processor.image_processor, [image])["pixel_values"]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode in this context."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # Not by `train`, because parts of a model can be in another mode than the whole.
        for module, mode in modes:
            module.training = mode


def without_autocast(model: nn.Module) -> nn.Module:
    """Return a model that computes without the autocast of Accelerate.

    With mixed precision, `Accelerator.prepare` replaces the forward of a model by one that enters autocast.

    Args:
        model: The model, not inside of another module.

    Returns:
        The model itself, or a copy that shares all of its modules and parameters.
    """
    if "_original_forward" not in vars(model):
        return model
    plain = copy.copy(model)
    plain.forward = vars(model)["_original_forward"]
    return plain


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Disable the adapters of a model in this context, if it has any."""
    tuned: Any = model
    with tuned.disable_adapter() if hasattr(tuned, "disable_adapter") else contextlib.nullcontext():
        yield


def detect_split(
    model: nn.Module,
    processor: Any,
    data: DetectionSplit,
    batch_size: int,
    accelerator: Accelerator,
    label: str = "evaluating",
    num_workers: int = 0,
    *,
    max_detections: int | None = MAX_DETECTIONS,
) -> list[Row]:
    """Detect all classes in all images of a split. All processes of a launch call this together.

    Each process takes a share of the images. All images of a batch have the same size: padding changes scores, and the
    detections in an image must not depend on the batch size or the number of processes.

    Args:
        model: The detector. Its mode, training or evaluation, stays as it is.
        processor: Its processor.
        data: The split.
        batch_size: Batch size per device.
        accelerator: The accelerator of the launch.
        label: Text of the progress bar.
        num_workers: Number of processes that read images.
        max_detections: Maximum number of detections per image, as in `detect`.

    Returns:
        The rows of all images, in each process.

    Raises:
        InputError: The scores or boxes are not finite, or `max_detections` is below 1.
    """
    _check_limit(max_detections)
    detector = accelerator.unwrap_model(model)
    chunks = split_classes(data.class_names, processor.tokenizer, detector.config.max_text_len)
    mine = sorted(range(len(data)), key=data.sizes.__getitem__)[accelerator.process_index :: accelerator.num_processes]
    loader: DataLoader = DataLoader(
        range(len(data)),  # type: ignore[arg-type]  # any sequence serves as a Dataset
        batch_sampler=batches_of_one_size(data, mine, batch_size),
        collate_fn=functools.partial(_process, data, processor.image_processor),
        num_workers=num_workers,
        worker_init_fn=make_worker_init_fn(num_workers),
        # Starting a loader draws from its generator. The default one belongs to training.
        generator=torch.Generator(),
    )
    rows: list[Row] = []
    bar = tqdm(loader, desc=label, leave=False, disable=not accelerator.is_local_main_process)
    with evaluation_mode(model):
        for images, pixels in bar:
            sizes = [data.sizes[image] for image in images]
            names = [f"{label}: image {quoted(data.image_ids[image])}" for image in images]
            with accelerator.autocast(), hint("If training caused this, lower the learning rate."):
                results = detect_in_pixels(
                    detector, processor.tokenizer, pixels, sizes, names, data.class_names, chunks, 0.0, max_detections
                )
            for image, result in zip(images, results, strict=True):
                rows += rows_of(image, result)
    return gather_object(rows)


def batches_of_one_size(data: DetectionSplit, images: Iterable[int], batch_size: int) -> list[list[int]]:
    """Divide images into batches, so that all images of a batch have the same size and need no padding.

    Args:
        data: The split.
        images: Indices of the images.
        batch_size: Largest number of images in a batch.

    Returns:
        The indices of each batch. Batches are sorted by the size of their images.
    """
    batches = []
    for _, same in itertools.groupby(sorted(images, key=data.sizes.__getitem__), key=data.sizes.__getitem__):
        group = list(same)
        batches += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    return batches


def _process(data: DetectionSplit, image_processor: Any, images: list[int]) -> tuple[list[int], Any]:
    """Return the indices of some images, and the output of the image processor for them."""
    return images, process_images(image_processor, [data.open_image(image) for image in images])


def rows_of(image: int, result: Detections) -> list[Row]:
    """Return the detections in one image as rows.

    Args:
        image: Index of the image.
        result: Its detections, from `detect`.

    Returns:
        One row per detection.
    """
    columns = (result["boxes"].tolist(), result["scores"].tolist(), result["labels"].tolist())
    return [(image, *box, score, label) for box, score, label in zip(*columns, strict=True)]


def result_of(image: int, rows: list[Row]) -> Detections:
    """Return the detections in one image from the rows of all images. This is the inverse of `rows_of`.

    Args:
        image: Index of the image.
        rows: Rows of any images.

    Returns:
        The detections in this image, in the order of their rows.
    """
    mine = [row for row in rows if row[0] == image]
    return {
        "boxes": torch.tensor([row[1:5] for row in mine], dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor([row[5] for row in mine], dtype=torch.float32),
        "labels": torch.tensor([row[6] for row in mine], dtype=torch.long),
    }
