# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The training loss of Grounding DINO and MM Grounding DINO.

The Hungarian matching, the focal loss on tokens, and the L1 and generalised IoU losses on boxes come from transformers.
This module corrects three errors of the loss in transformers 5.24:

* The encoder term with `two_stage`. In transformers, it scores the learned queries against the text *before* fusion,
  with detached boxes, so it trains neither prompts nor proposals. Here, the term uses the best proposals of the fused
  encoder output, with their gradients, as in the paper (arXiv 2303.05499, section 3.3) and its released code.
* The one-hot labels. In transformers, they are offset by the number of classes of the image itself, instead of the sum
  over the images before it. If the prompts of a batch have different classes, the labels are wrong, or an IndexError is
  raised.
* The number of boxes with several processes. In transformers, the loss is divided by the mean number of boxes per
  process and then again by the number of processes. Here, it is divided by the mean per process only. DDP then takes
  the mean over processes, which gives the loss of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from transformers.loss.loss_grounding_dino import GroundingDinoHungarianMatcher, GroundingDinoImageLoss

from ..errors import InputError
from ..wording import counted
from .grounding import class_token_maps

# How far a box may extend over the border of its image, as a fraction of the image size.
BORDER = 0.1


class _TokenLoss(GroundingDinoImageLoss):
    """The set loss of transformers, with one-hot labels that are correct for any mix of prompts."""

    def _get_target_classes_one_hot(self, outputs: dict, targets: list[dict], indices: list[tuple]) -> Tensor:
        one_hot = torch.zeros_like(outputs["logits"])
        for image, (queries, boxes) in enumerate(indices):
            classes = targets[image]["class_labels"][boxes]
            one_hot[image, queries] = outputs["label_maps"][image][classes].to(one_hot.dtype)
        return one_hot


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
        self.set_loss = _TokenLoss(
            matcher=GroundingDinoHungarianMatcher(
                class_cost=config.class_cost, bbox_cost=config.bbox_cost, giou_cost=config.giou_cost
            ),
            focal_alpha=config.focal_alpha,
            losses=["labels", "boxes"],
        )

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
        stages = [(outputs.logits, outputs.pred_boxes, 1.0)]
        if outputs.enc_outputs_class is not None and self.encoder_coefficient:
            token_logits, box_logits = outputs.enc_outputs_class, outputs.enc_outputs_coord_logits
            best = token_logits.max(-1).values.topk(min(self.num_queries, token_logits.shape[1]), dim=1).indices
            token_logits = token_logits.gather(1, best[..., None].expand(-1, -1, token_logits.shape[-1]))
            boxes = box_logits.gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
            stages.append((token_logits, boxes, self.encoder_coefficient))
        token_maps = class_token_maps(outputs.input_ids, outputs.logits.shape[-1])
        labels = _checked(labels, [len(token_map) for token_map in token_maps], outputs.logits.device)
        num_boxes = mean_boxes_per_process(labels) if num_items_in_batch is None else num_items_in_batch
        total = outputs.logits.new_zeros(())
        for token_logits, boxes, weight in stages:
            stage = {
                "logits": token_logits.float(),
                "pred_boxes": boxes.float(),
                "label_maps": token_maps,
                # Masks padding, whose logits are -inf. NaN is not masked, so that it shows in the loss.
                "text_mask": token_logits != float("-inf"),
            }
            matches = self.set_loss.matcher(stage, labels)
            losses = self.set_loss.loss_labels(stage, labels, matches, num_boxes)
            losses |= self.set_loss.loss_boxes(stage, labels, matches, num_boxes)
            total = total + weight * sum(self.coefficients[name] * losses[name] for name in self.coefficients)
        return total


def _checked(labels: Any, num_phrases: list[int], device: torch.device) -> list[dict[str, Tensor]]:
    """Check the labels of a batch, whose images have this number of phrases in their prompts.

    Returns:
        The labels, with boxes in single precision.

    Raises:
        InputError: The labels cannot be used. The message names the image and the value.
    """
    if not isinstance(labels, list | tuple) or len(labels) != len(num_phrases):
        got = len(labels) if isinstance(labels, list | tuple) else type(labels).__name__
        raise InputError(f"labels: must be a list with one entry per image, got {got} for {len(num_phrases)} images.")
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
    labels = [
        {**label, "class_labels": label["class_labels"].long(), "boxes": label["boxes"].float()} for label in labels
    ]
    # The values of all images are checked together, because each look at a value waits for the GPU.
    classes = torch.cat([label["class_labels"] for label in labels])
    boxes = torch.cat([label["boxes"] for label in labels])
    counts = torch.tensor([len(label["boxes"]) for label in labels])
    limits = torch.tensor(num_phrases).repeat_interleave(counts).to(device)
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    # Boxes in pixels do not fit, and boxes of two corners seldom do.
    fits = ((low > -BORDER) & (high < 1 + BORDER) & (boxes[:, 2:] > 0)).all(-1)
    wrong_class = (classes < 0) | (classes >= limits)
    if not (wrong_class | ~fits).any():
        return labels
    first = int((wrong_class | ~fits).nonzero()[0])
    image = next(i for i in range(len(labels)) if sum(len(label["boxes"]) for label in labels[: i + 1]) > first)
    if wrong_class[first]:
        raise InputError(
            f"labels[{image}]: class label {int(classes[first])} must be from 0 to {num_phrases[image] - 1}, because "
            f"the prompt of the image has {counted(num_phrases[image], 'phrase')}."
        )
    raise InputError(
        f"labels[{image}]: box {boxes[first].tolist()} must be centre x, centre y, width and height as fractions of "
        "the image size, and lie in the image."
    )


def mean_boxes_per_process(labels: list[dict[str, Tensor]]) -> float:
    """Compute the mean number of boxes per process in a batch, with at least 1 box in all processes together.

    All processes of a launch call this together.

    Args:
        labels: Labels as in `GroundedDetectionLoss`.

    Returns:
        The mean number.
    """
    num_boxes, num_processes = float(sum(len(label["class_labels"]) for label in labels)), 1
    # Without Accelerate there is one process. Making a PartialState here would start a distributed run.
    if PartialState._shared_state:
        device = labels[0]["boxes"].device
        num_boxes = float(reduce(torch.tensor(num_boxes, device=device), reduction="sum"))
        num_processes = PartialState().num_processes
    # At least one box in the whole batch. At least one per process would shrink the loss of a batch with fewer boxes.
    return max(num_boxes, 1.0) / num_processes
