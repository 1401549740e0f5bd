# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The training loss of a grounded detector, for Grounding DINO and MM Grounding DINO.

Hungarian matching, focal loss on tokens, L1 and generalised IoU on boxes are those of transformers. Two of its parts
are wrong in transformers 5.24 and are put right here:

* With `two_stage`, its encoder term scores the learned queries against the text *before* fusion, on detached boxes: it
  trains neither prompts nor proposals. Here, as in the paper (arXiv 2303.05499, section 3.3) and its released code, the
  term takes the best proposals of the fused encoder output, with their gradients.
* Its one-hot labels are offset by the class count of the image itself instead of the sum over the images before it:
  wrong labels, or an IndexError, when the prompts of a batch have different classes.

A third part matters with several processes: transformers divides by the mean number of boxes a process and then by the
number of processes once more, which multiplies the loss by that number. Here it is the mean a process, so that the mean
over processes, which is what DDP takes, is the loss of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from transformers.loss.loss_grounding_dino import GroundingDinoHungarianMatcher, GroundingDinoImageLoss

from .grounding import class_token_maps


class _TokenLoss(GroundingDinoImageLoss):
    """transformers' set loss with one-hot labels that are right for any mix of prompts."""

    def _get_target_classes_one_hot(self, outputs: dict, targets: list[dict], indices: list[tuple]) -> Tensor:
        one_hot = torch.zeros_like(outputs["logits"])
        for image, (queries, boxes) in enumerate(indices):
            classes = targets[image]["class_labels"][boxes]
            one_hot[image, queries] = outputs["label_maps"][image][classes].to(one_hot.dtype)
        return one_hot


class GroundedDetectionLoss:
    """Loss of a grounded detector from its outputs and labels.

    Call it with the model's output and labels; it suits `Trainer(compute_loss_func=...)` as it is. With gradient
    accumulation, set `trainer.loss_is_scaled_for_ga = False` as well: the `Trainer` takes the loss of a
    `compute_loss_func` to be divided by the number of accumulated batches already, and this one is a mean of one batch.

    Args:
        config: the host's config; costs, coefficients and `focal_alpha` are read from it.
        class_coefficient: weight of the focal loss on tokens (2 in transformers and in the released Grounding DINO).
        encoder_coefficient: weight of the encoder's proposals against the last decoder layer. 0 leaves them out.
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
        """
        Args:
            outputs: what the detector returns: `logits` (B, Q, T), `pred_boxes` (B, Q, 4), `input_ids` (B, L) and, of a
                two-stage host, `enc_outputs_class` (B, S, T) and `enc_outputs_coord_logits` (B, S, 4).
            labels: B dicts of `class_labels` (n,), indices of the phrases of the image's own prompt, and `boxes`
                (n, 4), centre, width and height as shares of the image. n may be 0.
            num_items_in_batch: what the loss is divided by; None for `mean_boxes_per_process(labels)`. Where gradients
                accumulate, that of the labels of all accumulated batches makes the sum of their losses the loss of
                one large batch. (The `Trainer` of transformers 5.24 finds no items in labels like these: None.)

        Returns:
            The weighted sum, a scalar.
        """
        stages = [(outputs.logits, outputs.pred_boxes, 1.0)]
        if outputs.enc_outputs_class is not None and self.encoder_coefficient:
            token_logits, box_logits = outputs.enc_outputs_class, outputs.enc_outputs_coord_logits
            best = token_logits.max(-1).values.topk(min(self.num_queries, token_logits.shape[1]), dim=1).indices
            token_logits = token_logits.gather(1, best[..., None].expand(-1, -1, token_logits.shape[-1]))
            boxes = box_logits.gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
            stages.append((token_logits, boxes, self.encoder_coefficient))
        token_maps = class_token_maps(outputs.input_ids, outputs.logits.shape[-1])
        num_boxes = mean_boxes_per_process(labels) if num_items_in_batch is None else num_items_in_batch
        total = outputs.logits.new_zeros(())
        for token_logits, boxes, weight in stages:
            stage = {
                "logits": token_logits.float(),
                "pred_boxes": boxes.float(),
                "label_maps": token_maps,
                # Tokens of no phrase are -inf in the host; NaN must stay in the loss and be seen.
                "text_mask": token_logits != float("-inf"),
            }
            matches = self.set_loss.matcher(stage, labels)
            losses = self.set_loss.loss_labels(stage, labels, matches, num_boxes)
            losses |= self.set_loss.loss_boxes(stage, labels, matches, num_boxes)
            total = total + weight * sum(self.coefficients[name] * losses[name] for name in self.coefficients)
        return total


def mean_boxes_per_process(labels: list[dict[str, Tensor]]) -> float:
    """Boxes of some images, or their mean over the processes of a launch, which all must call this.

    Args:
        labels: as `GroundedDetectionLoss` takes them.
    """
    num_boxes, num_processes = sum(len(label["class_labels"]) for label in labels), 1
    # Outside of Accelerate there is one process, and asking PartialState would start a distributed run.
    if PartialState._shared_state:
        device = labels[0]["boxes"].device
        num_boxes = float(reduce(torch.tensor(float(num_boxes), device=device), reduction="sum"))
        num_processes = PartialState().num_processes
    # At least one box in the whole batch, not one a process: that would shrink the loss of a batch with fewer.
    return max(float(num_boxes), 1.0) / num_processes
