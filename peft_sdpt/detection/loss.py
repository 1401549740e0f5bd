# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The training loss of Grounding DINO and MM Grounding DINO.

It is the loss of transformers 5.24 without three errors:

* The encoder term with `two_stage`. In transformers, it scores the learned queries against the text *before* fusion,
  with detached boxes, so it trains neither prompts nor proposals. Here, the term uses the best proposals of the fused
  encoder output, with their gradients, as in the paper (arXiv 2303.05499, section 3.3) and its released code.
* The one-hot labels. In transformers, they are offset by the number of classes of the image itself, instead of the sum
  over the images before it. If the prompts of a batch have different classes, the labels are wrong, or an IndexError is
  raised.
* The number of boxes with several processes. In transformers, the loss is divided by the mean number of boxes per
  process and then again by the number of processes. Here, it is divided by the mean per process only. DDP then takes
  the mean over processes, which gives the loss of the whole batch.

The loss of transformers also waits for the GPU many times per image and stage. Here, all of them are matched together:
their costs are copied to the CPU once, and the matches are copied back once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers.loss.loss_grounding_dino import sigmoid_focal_loss

from ..errors import InputError
from ..wording import counted
from .devices import to_cpu
from .grounding import phrase_numbers

# How far a box may extend over the border of its image, as a fraction of the image size.
BORDER = 0.1
# In place of the logit of a token that is padding. Its focal loss and the gradient of it are 0 in single precision.
NEVER = -1e4


class _Stage(NamedTuple):
    """Predictions of a stage: logits (B, Q, T) and boxes (B, Q, 4), in single precision, and its weight in the loss."""

    logits: Tensor
    boxes: Tensor
    weight: float


class _Targets(NamedTuple):
    """The objects of all images of a batch, one after the other.

    Attributes:
        tokens: The tokens of the class of each object, shape (n, T), boolean.
        boxes: Shape (n, 4).
        sizes: The number of objects of each image.
    """

    tokens: Tensor
    boxes: Tensor
    sizes: list[int]


class GroundedDetectionLoss:
    """Loss of a grounded detector from its outputs and labels.

    Call it with the model's outputs and labels. It can be passed to `Trainer(compute_loss_func=...)` as it is. With
    gradient accumulation, also set `trainer.loss_is_scaled_for_ga = False`: the `Trainer` expects that a
    `compute_loss_func` divides by the number of accumulated batches, and this loss is a mean over one batch.

    Args:
        config: Config of the base model. The costs, coefficients and `focal_alpha` are read from it.
        class_coefficient: Weight of the focal loss on tokens. It is 2 in transformers and in the released Grounding
            DINO.
        encoder_coefficient: Weight of the encoder's proposals relative to the last decoder layer. 0 leaves them out.
    """

    def __init__(self, config: Any, class_coefficient: float = 2.0, encoder_coefficient: float = 1.0):
        self.num_queries = config.num_queries
        self.encoder_coefficient = encoder_coefficient
        self.coefficients = {
            "loss_ce": class_coefficient,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }
        self.costs = {"class": config.class_cost, "boxes": config.bbox_cost, "giou": config.giou_cost}
        self.focal_alpha = config.focal_alpha

    def __call__(self, outputs: Any, labels: list[dict[str, Tensor]], num_items_in_batch: Any = None) -> Tensor:
        """Compute the loss.

        Args:
            outputs: Outputs of the detector: `logits` (B, Q, T), `pred_boxes` (B, Q, 4), `input_ids` (B, L) and, with
                `two_stage`, `enc_outputs_class` (B, S, T) and `enc_outputs_coord_logits` (B, S, 4).
            labels: For each image, `class_labels` (n,), indices of phrases in the prompt of the image, and `boxes`
                (n, 4), centre, width and height as fractions of the image size. n may be 0. If an image has more boxes
                than the detector has queries, some boxes are not used.
            num_items_in_batch: The number that the loss is divided by. None for `mean_boxes_per_process(labels)`. With
                gradient accumulation, pass the number for the labels of all accumulated batches; then their losses add
                up to the loss of one large batch. The `Trainer` of transformers 5.24 passes None for such labels.

        Returns:
            The weighted sum of the losses, a scalar.

        Raises:
            InputError: There is not one label per image, a class label is not the index of a phrase, or the boxes are
                not fractions of the image size.
        """
        matched = self._match(outputs, labels)
        num_boxes = mean_boxes_per_process(labels) if num_items_in_batch is None else num_items_in_batch
        total = outputs.logits.new_zeros(())
        for stage, targets, queries, objects in matched:
            total = total + stage.weight * self._stage_loss(stage, targets, queries, objects, num_boxes)
        return total

    def of_images(
        self, outputs: Any, labels: list[dict[str, Tensor]], terms: Sequence[str] = ("class", "box")
    ) -> Tensor:
        """Compute the loss of each image. It does not depend on the other images of the batch.

        Args:
            outputs, labels: As in `__call__`.
            terms: "class" for the focal loss on tokens, "box" for the losses of boxes.

        Returns:
            Shape (B,): for each image, the weighted sum of these terms over its objects and queries, divided by the
            number of its objects, or by 1 if there are none.

        Raises:
            InputError: As in `__call__`.
        """
        sizes = outputs.logits.new_tensor([max(1, len(label["boxes"])) for label in labels], dtype=torch.float32)
        total = torch.zeros_like(sizes)
        for stage, targets, queries, objects in self._match(outputs, labels):
            total = total + stage.weight * self._losses_of_images(stage, targets, queries, objects, terms)
        return total / sizes

    def _match(self, outputs: Any, labels: list[dict[str, Tensor]]) -> list[tuple[_Stage, _Targets, Tensor, Tensor]]:
        """Check the labels, and match the queries of each stage with the objects.

        Returns:
            For each stage, its predictions, the objects, and the matches: indices into the (B * Q,) queries and into
            the objects of all images.
        """
        stages = [_Stage(outputs.logits.float(), outputs.pred_boxes.float(), 1.0)]
        if outputs.enc_outputs_class is not None and self.encoder_coefficient:
            token_logits, box_logits = outputs.enc_outputs_class, outputs.enc_outputs_coord_logits
            best = token_logits.max(-1).values.topk(min(self.num_queries, token_logits.shape[1]), dim=1).indices
            token_logits = token_logits.gather(1, best[..., None].expand(-1, -1, token_logits.shape[-1]))
            boxes = box_logits.gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
            stages.append(_Stage(token_logits.float(), boxes.float(), self.encoder_coefficient))
        phrases = phrase_numbers(outputs.input_ids, outputs.logits.shape[-1])
        labels = _checked(labels, len(phrases), outputs.logits.device)
        sizes = [len(label["boxes"]) for label in labels]
        classes = torch.cat([label["class_labels"] for label in labels])
        # For each object, the phrase numbers of the prompt of its image.
        own = torch.cat([row.expand(size, -1) for row, size in zip(phrases, sizes, strict=True)])
        targets = _Targets(own == classes[:, None] + 1, torch.cat([label["boxes"] for label in labels]), sizes)
        wrong_class = (classes < 0) | (classes >= own.amax(1))
        wrong_box = _wrong_boxes(targets.boxes)
        # Whether a label is wrong is read together with the costs, because each read waits for the GPU.
        is_wrong, *costs = to_cpu([(wrong_class | wrong_box).any(), *(self._costs(stage, targets) for stage in stages)])
        if is_wrong:
            _refuse(targets, classes, phrases, wrong_class, wrong_box)
        matches = _match(costs, sizes, phrases.device)
        return [(stage, targets, *pair) for stage, pair in zip(stages, matches, strict=True)]

    @torch.no_grad()
    def _costs(self, stage: _Stage, targets: _Targets) -> Tensor:
        """Compute the costs of matching queries with objects of their image, as the matcher of transformers does.

        Returns:
            Shape (B, Q, most objects of an image). Columns beyond the number of objects of an image have no meaning.
        """
        pad = torch.nn.utils.rnn.pad_sequence
        boxes = pad(targets.boxes.split(targets.sizes), batch_first=True)
        tokens = pad(targets.tokens.split(targets.sizes), batch_first=True).to(stage.logits.dtype)
        # The mean over the tokens of a class.
        tokens = tokens / tokens.sum(-1, keepdim=True)
        scores = stage.logits.sigmoid()
        # The costs of a class use the focal loss with alpha 0.25 and gamma 2, whatever `focal_alpha` is.
        negative = 0.75 * scores**2 * -(1 - scores + 1e-8).log()
        positive = 0.25 * (1 - scores) ** 2 * -(scores + 1e-8).log()
        of_class = (positive - negative) @ tokens.mT
        of_boxes = torch.cdist(stage.boxes, boxes, p=1)
        giou = generalised_iou(stage.boxes[:, :, None], boxes[:, None])
        total = self.costs["boxes"] * of_boxes + self.costs["class"] * of_class - self.costs["giou"] * giou
        # SciPy takes no NaN. Such predictions are matched last.
        worst = torch.finfo(total.dtype).max
        return total.nan_to_num(nan=worst, posinf=worst, neginf=worst)

    def _stage_loss(self, stage: _Stage, targets: _Targets, queries: Tensor, objects: Tensor, num_boxes: Any) -> Tensor:
        """Compute the loss of a stage, of which `queries`, indices into (B * Q,), are matched with `objects`."""
        boxes = stage.boxes.flatten(0, 1)[queries]
        losses = {
            "loss_ce": sigmoid_focal_loss(
                *_logits_and_targets(stage, targets, queries, objects), num_boxes, alpha=self.focal_alpha
            ),
            "loss_bbox": (boxes - targets.boxes[objects]).abs().sum() / num_boxes,
            "loss_giou": (1 - generalised_iou(boxes, targets.boxes[objects])).sum() / num_boxes,
        }
        return sum(self.coefficients[name] * loss for name, loss in losses.items())

    def _losses_of_images(
        self, stage: _Stage, targets: _Targets, queries: Tensor, objects: Tensor, terms: Sequence[str]
    ) -> Tensor:
        """Compute what `_stage_loss` computes, but of some terms, for each image, shape (B,)."""
        num_images, num_queries = stage.logits.shape[:2]
        total = stage.logits.new_zeros(num_images)
        if "class" in terms:
            pair = _logits_and_targets(stage, targets, queries, objects)
            focal_loss = torch.vmap(partial(sigmoid_focal_loss, num_boxes=1, alpha=self.focal_alpha))
            of_class = focal_loss(*(part.unflatten(0, (num_images, num_queries)) for part in pair))
            total = total + self.coefficients["loss_ce"] * of_class
        if "box" in terms:
            boxes, wanted = stage.boxes.flatten(0, 1)[queries], targets.boxes[objects]
            of_boxes = self.coefficients["loss_bbox"] * (boxes - wanted).abs().sum(-1)
            of_boxes = of_boxes + self.coefficients["loss_giou"] * (1 - generalised_iou(boxes, wanted))
            # If an image has more objects than queries, some of them have no query.
            parts = of_boxes.split([min(size, num_queries) for size in targets.sizes])
            total = total + torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True).sum(1)
        return total


def _logits_and_targets(stage: _Stage, targets: _Targets, queries: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the tokens, and 1 for the tokens of the class of the matched object, both (B * Q, T)."""
    logits = stage.logits.flatten(0, 1)
    is_target = torch.zeros_like(logits, dtype=torch.bool)
    is_target[queries] = targets.tokens[objects]
    # Masks padding, whose logits are -inf. NaN is not masked, so that it shows in the loss.
    is_padding = logits == float("-inf")
    return logits.masked_fill(is_padding, NEVER), (is_target & ~is_padding).to(logits.dtype)


def generalised_iou(first: Tensor, second: Tensor) -> Tensor:
    """Compute the generalised IoU of boxes (arXiv 1902.09630).

    The function of transformers 5.24 compares all boxes with all, and waits for the GPU twice to check them.

    Args:
        first, second: Boxes of shapes (..., 4) that broadcast: centre, width and height.

    Returns:
        Shape (...), in [-1, 1]. NaN if neither box has an area.
    """
    (low, high), (other_low, other_high) = _corners(first), _corners(second)

    def area(low: Tensor, high: Tensor) -> Tensor:
        width, height = (high - low).clamp(min=0).unbind(-1)
        # The gradient of `prod` would wait for the GPU, to count zeros.
        return width * height

    inside = area(torch.maximum(low, other_low), torch.minimum(high, other_high))
    union = area(low, high) + area(other_low, other_high) - inside
    hull = area(torch.minimum(low, other_low), torch.maximum(high, other_high))
    return inside / union - (hull - union) / hull


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper left and the lower right corners of boxes, both of shape (..., 2)."""
    return boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2


def _match(costs: list[Tensor], sizes: list[int], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Match the queries of each stage with the objects of their image, so that the sum of the costs is smallest.

    Args:
        costs: The costs of each stage, shape (B, Q, M), on the CPU.
        sizes: The number of objects of each image.
        device: Device of the result.

    Returns:
        For each stage, indices into the (B * Q,) queries and into the objects of all images.
    """
    stages = []
    for tables in costs:
        matches, first = [], 0
        for image, (table, size) in enumerate(zip(tables.numpy(), sizes, strict=True)):
            queries, objects = linear_sum_assignment(table[:, :size])
            matches.append(np.stack([image * len(table) + queries, first + objects]))
            first += size
        stages.append(np.concatenate(matches, axis=1))
    together = torch.from_numpy(np.concatenate(stages, axis=1)).to(device)
    return [(part[0], part[1]) for part in together.split([stage.shape[1] for stage in stages], dim=1)]


def _checked(labels: Any, num_images: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Check what the labels of a batch are made of, without their values.

    Returns:
        The labels, with boxes in single precision.

    Raises:
        InputError: The labels cannot be used. The message names the image.
    """
    if not isinstance(labels, list | tuple) or len(labels) != num_images:
        got = len(labels) if isinstance(labels, list | tuple) else type(labels).__name__
        raise InputError(f"labels: must be a list with one entry per image, got {got} for {num_images} images.")
    for image, label in enumerate(labels):
        names = ("class_labels", "boxes")
        if not isinstance(label, dict) or not all(isinstance(label.get(name), Tensor) for name in names):
            raise InputError(f"labels[{image}]: must be a dict with the tensors `class_labels` and `boxes`.")
        classes, boxes = label["class_labels"], label["boxes"]
        is_integer = not classes.is_floating_point() and classes.dtype != torch.bool
        if not is_integer or classes.ndim != 1 or boxes.shape != (len(classes), 4):
            raise InputError(
                f"labels[{image}]: `class_labels` must be n integers and `boxes` have the shape (n, 4), got the shapes "
                f"{tuple(classes.shape)} ({classes.dtype}) and {tuple(boxes.shape)}."
            )
        if {classes.device, boxes.device} != {device}:
            raise InputError(
                f"labels[{image}]: must be on the device of the outputs, {device}, got {classes.device} and "
                f"{boxes.device}."
            )
    return [
        {**label, "class_labels": label["class_labels"].long(), "boxes": label["boxes"].float()} for label in labels
    ]


def _wrong_boxes(boxes: Tensor) -> Tensor:
    """Return which boxes are not in their image, shape (n,). Boxes in pixels are not, and boxes of corners seldom."""
    low, high = _corners(boxes)
    return ~((low > -BORDER) & (high < 1 + BORDER) & (boxes[:, 2:] > 0)).all(-1)


def _refuse(targets: _Targets, classes: Tensor, phrases: Tensor, wrong_class: Tensor, wrong_box: Tensor) -> NoReturn:
    """Raise the error of the first object whose label is wrong."""
    first = int((wrong_class | wrong_box).nonzero()[0])
    image = next(i for i in range(len(phrases)) if sum(targets.sizes[: i + 1]) > first)
    if wrong_class[first]:
        num_phrases = int(phrases[image].max())
        raise InputError(
            f"labels[{image}]: class label {int(classes[first])} must be from 0 to {num_phrases - 1}, because the "
            f"prompt of the image has {counted(num_phrases, 'phrase')}."
        )
    raise InputError(
        f"labels[{image}]: box {targets.boxes[first].tolist()} must be centre x, centre y, width and height as "
        "fractions of the image size, and lie in the image."
    )


def mean_boxes_per_process(labels: list[dict[str, Tensor]]) -> float | Tensor:
    """Compute the mean number of boxes per process in a batch, with at least 1 box in all processes together.

    All processes of a launch call this together.

    Args:
        labels: Labels as in `GroundedDetectionLoss`.

    Returns:
        The mean number. With several processes, it is a scalar tensor on the device of the process, because a number
        would have to wait for the GPU.
    """
    num_boxes = float(sum(len(label["class_labels"]) for label in labels))
    # At least one box in the whole batch. At least one per process would shrink the loss of a batch with fewer boxes.
    # Without Accelerate there is one process. Making a PartialState here would start a distributed run.
    if not PartialState._shared_state or (state := PartialState()).num_processes == 1:
        return max(num_boxes, 1.0)
    total = reduce(torch.full((), num_boxes, device=state.device), reduction="sum")
    return total.clamp(min=1.0) / state.num_processes
