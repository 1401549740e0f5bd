# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detection for many clients: requests with different adapters and classes share a batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..detection.devices import to_cpu, to_device
from ..detection.grounding import class_prompt, class_scores, class_token_maps
from ..detection.pixels import pad_small_images, process_images
from ..detection.prediction import Detections, in_pixels, join
from ..errors import InputError


@dataclass(frozen=True)
class Question:
    """One row of a batch: an image, a prompt, and the adapter to detect with.

    Attributes:
        adapter: Name of the adapter in the model, or `"__base__"` for the base model without an adapter.
        pixels: Output of the image processor for the image: `pixel_values` (3, H, W) and `pixel_mask` (H, W).
        tokens: Output of the tokenizer for the prompt, each of length L.
        labels: Class index of each class of the prompt.
        size: (width, height) of the image in pixels, before it was resized.
        threshold: Lowest score of a detection.
    """

    adapter: str
    pixels: Mapping[str, Tensor]
    tokens: Mapping[str, list[int]]
    labels: Sequence[int]
    size: tuple[int, int]
    threshold: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pixels. Only images of one shape share a batch, because padding would change the scores."""
        return tuple(self.pixels["pixel_values"].shape)


def tokenize(tokenizer: Any, class_names: Sequence[str], chunks: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    """Write the prompts of some classes as tokens.

    Args:
        tokenizer: Tokenizer of the detector. The tokenizers of transformers must not be called by two threads at once.
        class_names: Names of the classes.
        chunks: Class indices of each prompt, from `split_classes`.

    Returns:
        The output of the tokenizer for each prompt.
    """
    return [dict(tokenizer(class_prompt([class_names[label] for label in chunk]))) for chunk in chunks]


def make_questions(
    adapter: str,
    image_processor: Any,
    image: Image.Image,
    prompts: Sequence[Mapping[str, list[int]]],
    chunks: Sequence[Sequence[int]],
    threshold: float,
) -> list[Question]:
    """Make the rows of a batch for one image.

    Args:
        adapter: Name of the adapter in the model.
        image_processor: Image processor of the adapter.
        image: The image, RGB.
        prompts: Tokens of each prompt, from `tokenize`.
        chunks: Class indices of each prompt, from `split_classes`.
        threshold: Lowest score of a detection.

    Returns:
        One row for each prompt.

    Raises:
        InputError: The image is so oblong that its shorter side has no pixels left after resizing.
    """
    pixels = {name: values[0] for name, values in process_images(image_processor, [image]).items()}
    return [
        Question(adapter, pixels, tokens, chunk, image.size, threshold)
        for tokens, chunk in zip(prompts, chunks, strict=True)
    ]


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    max_detections: int | None = None,
) -> list[Detections | InputError]:
    """Detect in one batch, for each row with its own adapter and classes.

    The detections are those of a call for the row alone, up to rounding.

    Args:
        model: The `PeftModel` with the adapters, in evaluation mode.
        tokenizer: A tokenizer of the detector, which pads the prompts.
        questions: The rows. Their pixels have one shape.
        max_detections: Maximum number of detections per row. None for no limit.

    Returns:
        The detections of each row. If the outputs of a row are not finite, an `InputError` in their place, so that the
        other rows have their detections.
    """
    config: Any = model.config
    stacked = {name: [question.pixels[name] for question in questions] for name in questions[0].pixels}
    pixels = pad_small_images({name: torch.stack(values) for name, values in stacked.items()}, config)
    text = tokenizer.pad([dict(question.tokens) for question in questions], return_tensors="pt")
    names = [question.adapter for question in questions]
    outputs = model(**to_device({**pixels, **text}, next(model.parameters()).device), adapter_names=names)
    logits, boxes = to_cpu([outputs.logits.float(), outputs.pred_boxes.float()])
    finite = (logits.flatten(1).amax(1) + boxes.flatten(1).sum(1)).isfinite().tolist()
    if not all(finite) and len(questions) > 1:
        # Such a row can spoil the others of its batch.
        return [answer(model, tokenizer, [question], max_detections)[0] for question in questions]
    if not all(finite):
        return [InputError("image: the scores or boxes are not finite; the weights may be damaged.")]
    all_scores = class_scores(logits, class_token_maps(text["input_ids"], logits.shape[-1]))
    return [
        _select(scores, boxes[row], question, max_detections)
        for row, (scores, question) in enumerate(zip(all_scores, questions, strict=True))
    ]


def _select(scores: Tensor, boxes: Tensor, question: Question, max_detections: int | None) -> Detections:
    """Return the detections of a row from its scores (queries, classes) and its boxes (queries, 4)."""
    classes = len(question.labels)
    pairs = (scores.flatten() >= question.threshold).nonzero().squeeze(1)
    found = in_pixels(boxes[pairs // classes], question.size)
    labels = torch.tensor(question.labels)[pairs % classes]
    return join([(found, scores.flatten()[pairs], labels)], scores.max().item(), max_detections)


@dataclass(eq=False)
class _Waiting:
    item: Any
    key: Hashable
    future: asyncio.Future
    since: float


class Batcher:
    """Collects items that concurrent tasks ask about, and handles them in batches.

    A batch has items with one key. It starts when the thread is free, and the batch is full or its first item has
    waited for `max_wait`. The first item that came is in the next batch, so that no item waits forever.

    Args:
        run: Takes the items of a batch, and returns an answer for each. It runs in a thread of its own, one batch at a
            time. If it raises an error, all items of the batch get this error.
        key: Returns the key of an item. If it raises an error, the task that asks about the item gets this error.
        max_batch_size: Maximum number of items in a batch, at least 1.
        max_wait: Longest time that an item waits for others while the thread is free, in seconds.

    Raises:
        InputError: `max_batch_size` or `max_wait` is not allowed.
    """

    def __init__(
        self,
        run: Callable[[list[Any]], Sequence[Any]],
        key: Callable[[Any], Hashable],
        max_batch_size: int,
        max_wait: float,
    ) -> None:
        if not isinstance(max_batch_size, int) or max_batch_size < 1:
            raise InputError(f"max_batch_size={max_batch_size!r}: must be a whole number of at least 1.")
        if not max_wait >= 0:  # nan is not either
            raise InputError(f"max_wait={max_wait!r}: must be at least 0 seconds.")
        self._run, self._key = run, key
        self._max_batch_size, self._max_wait = max_batch_size, max_wait
        self._waiting: list[_Waiting] = []
        self._changed = asyncio.Event()
        self._is_open = False

    async def __call__(self, item: Any) -> Any:
        """Return the answer for an item. The task waits until its batch is done.

        Raises:
            RuntimeError: The call is not within `running`, or `run` has returned a wrong number of answers.
        """
        if not self._is_open:
            raise RuntimeError("a Batcher answers only within `async with batcher.running()`.")
        loop = asyncio.get_running_loop()
        waiting: _Waiting = _Waiting(item, self._key(item), loop.create_future(), loop.time())
        self._waiting.append(waiting)
        self._changed.set()
        return await waiting.future

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Handle items in this context. At its end, the items that still wait are handled, and others are refused.

        Raises:
            RuntimeError: It runs already.
        """
        if self._is_open:
            raise RuntimeError("a Batcher can only run once at a time.")
        self._is_open = True
        with ThreadPoolExecutor(1, "batches") as thread:
            task = asyncio.create_task(self._work(thread))
            try:
                yield
            finally:
                self._is_open = False
                self._changed.set()
                await task

    async def _work(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while batch := await self._next_batch():
            items = [waiting.item for waiting in batch]
            try:
                answers = await loop.run_in_executor(thread, self._answers, items)
            except Exception as error:  # belongs to the tasks that asked; this one goes on
                for waiting in batch:
                    if not waiting.future.done():
                        waiting.future.set_exception(error)
            else:
                for waiting, found in zip(batch, answers, strict=True):
                    if not waiting.future.done():
                        waiting.future.set_result(found)

    def _answers(self, items: list[Any]) -> list[Any]:
        """Return an answer for each item. Runs in the thread."""
        try:
            answers = list(self._run(items))
        except StopIteration as error:  # which a future cannot hold
            raise RuntimeError("run: raised StopIteration.") from error
        if len(answers) != len(items):
            raise RuntimeError(f"run: must return an answer for each of {len(items)} items; returned {len(answers)}.")
        return answers

    async def _next_batch(self) -> list[_Waiting]:
        """Wait for the next batch. It is empty if no item waits and none will come."""
        loop = asyncio.get_running_loop()
        while True:
            # A task that was cancelled does not want its answer.
            self._waiting = [waiting for waiting in self._waiting if not waiting.future.done()]
            timer = None
            if self._waiting:
                first = self._waiting[0]
                batch = [each for each in self._waiting if each.key == first.key][: self._max_batch_size]
                left = first.since + self._max_wait - loop.time()
                if len(batch) == self._max_batch_size or left <= 0 or not self._is_open:
                    self._waiting = [each for each in self._waiting if each not in batch]
                    return batch
                timer = loop.call_later(left, self._changed.set)
            elif not self._is_open:
                return []
            self._changed.clear()
            await self._changed.wait()
            if timer:
                timer.cancel()
