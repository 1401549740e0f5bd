# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A tuned detector as an exported program, which runs with PyTorch alone."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..detection.base_models import TRAINED
from ..detection.grounding import class_prompt, class_token_maps, split_classes
from ..detection.pixels import num_positions, process_images
from ..errors import InputError
from ..files import whole_file
from ..wording import quoted, shown_path
from .baking import bake, has_prompts

# The file in a program that says how to make its inputs and how to read its outputs.
DESCRIPTION = "detector.json"
SUFFIX = ".pt2"


@dataclass(frozen=True)
class SavedProgram:
    """What `export_program` has written.

    Attributes:
        path: The file.
        num_bytes: Its size.
        difference: Largest difference of scores between the program and the model, for images of noise.
    """

    path: Path
    num_bytes: int
    difference: float


class _WithTokens(nn.Module):
    """A detector that takes pixels and the tokens of a text prompt."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        outputs = self.detector(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
        )
        return {"logits": outputs.logits, "boxes": _corners(outputs.pred_boxes)}


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    """Return boxes `(..., 4)` with a centre and a size as corners within the image."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1)


class _ConstantText(nn.Module):
    """Takes the place of a text model, and returns the features of one text for all samples."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = nn.Buffer(features)

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.features.expand(input_ids.shape[0], -1, -1))


class _WithClasses(nn.Module):
    """A detector that takes pixels alone, because its classes are fixed."""

    def __init__(self, detector: Any, text: Mapping[str, torch.Tensor], features: torch.Tensor) -> None:
        super().__init__()
        self.detector = detector
        detector.model.text_backbone = _ConstantText(features)
        self.input_ids, self.attention_mask = nn.Buffer(text["input_ids"]), nn.Buffer(text["attention_mask"])
        (tokens,) = class_token_maps(text["input_ids"], detector.config.max_text_len)
        self.shares = nn.Buffer((tokens / tokens.sum(-1, keepdim=True)).T)

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = pixel_values.shape[0]  # `len` would fix the batch size of the program
        outputs = self.detector(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_ids=self.input_ids.expand(batch, -1),
            attention_mask=self.attention_mask.expand(batch, -1),
        )
        # As `class_scores` computes them: the mean over the tokens of a class.
        return {"scores": outputs.logits.float().sigmoid() @ self.shares, "boxes": _corners(outputs.pred_boxes)}


@torch.no_grad()
def export_program(
    model: nn.Module,
    processor: Any,
    class_names: Sequence[str] | None,
    path: str | os.PathLike,
    *,
    image_size: tuple[int, int] | None = None,
) -> SavedProgram:
    """Write a tuned detector as a file that `torch.export.load` reads, without peft_sdpt, PEFT and transformers.

    The program takes keyword arguments and returns a dict. Their batch size B may differ from call to call.

    - `pixel_values`: (B, 3, height, width), as the processor makes them.
    - `pixel_mask`: (B, height, width), int64, 1 on the image and 0 on padding.
    - `input_ids`, `token_type_ids` and `attention_mask`: (B, L), int64; only without `class_names`.

    With `class_names`, `scores` (B, queries, number of classes) are those of `peft_sdpt.detection.class_scores`. The
    text model runs once, now, and is not in the file. Without, `logits` (B, queries, tokens) are those of the
    detector, and the length L of the text may differ too, up to `config.max_text_len`. `boxes` (B, queries, 4) are
    left, top, right and bottom edge, as fractions of the width and the height of the image without padding.

    The file also has the text `detector.json` (`DESCRIPTION`): the class names, and how pixels are made.

    Args:
        model: The detector: tuned, baked, or a base model. It is one of Grounding DINO, MM Grounding DINO or LLMDet. It
            stays unchanged. The program runs on its device and in its dtype.
        processor: Its processor.
        class_names: Names of the classes, which must fit into one prompt. None if the program takes tokens.
        path: The file, `.pt2`.
        image_size: Height and width of all images in pixels. Smaller images are padded. None for the size to which the
            processor resizes a square image. The code of the base model does not permit other sizes in one program.

    Returns:
        The file, its size, and how much its scores differ from those of the model.

    Raises:
        InputError: The model cannot be baked or is no such detector, `path` does not end with `.pt2` or cannot be
            written, `image_size` is too small, or the classes are wrong or do not fit into one prompt.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"path={shown_path(path)}: must end with {SUFFIX}, which torch.export.load expects.")
    detector: Any = bake(model) if has_prompts(model) else copy.deepcopy(model).eval().requires_grad_(False)
    config = getattr(detector, "config", None)
    if not isinstance(config, TRAINED):
        raise InputError(
            f"model={type(detector).__name__}: must be a Grounding DINO, MM Grounding DINO or LLMDet; bake "
            "another model and pass the copy to torch.export.export."
        )
    height, width = _size(processor, image_size)
    if config.two_stage and num_positions(height, width, config) < config.num_queries:
        raise InputError(
            f"image_size={height, width}: an image has only {num_positions(height, width, config)} positions for "
            f"{config.num_queries} queries; use a larger size."
        )
    prompt = _prompt(class_names, processor.tokenizer, config.max_text_len)
    text = dict(processor.tokenizer([prompt], return_tensors="pt").to(detector.device))
    # Two images, because a program that is made with one may be limited to one.
    inputs = _example(detector, text, 2, height, width)
    if class_names is None:
        wrapped: nn.Module = _WithTokens(detector)
    else:
        wrapped = _WithClasses(detector, text, _text_features(detector, inputs))
        inputs = {name: inputs[name] for name in ("pixel_values", "pixel_mask")}
    any_size = torch.export.Dim.DYNAMIC
    dims = {name: {0: any_size} if name.startswith("pixel") else {0: any_size, 1: any_size} for name in inputs}
    program = torch.export.export(wrapped, (), inputs, dynamic_shapes=dims, strict=False)
    description = {
        "class_names": None if class_names is None else list(class_names),
        "image_size": [height, width],
        **{name: getattr(processor.image_processor, name, None) for name in ("image_mean", "image_std")},
    }
    with whole_file(path) as unfinished, open(unfinished, "wb") as file:
        torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description)})
    inputs = {name: tensor for name, tensor in _example(detector, text, 3, height, width).items() if name in inputs}
    outputs, expected = program.module()(**inputs), wrapped(**inputs)
    # Sorted, because queries whose scores are nearly equal may change places.
    found, wanted = (
        (each["logits"].sigmoid() if class_names is None else each["scores"]).sort(dim=1).values
        for each in (outputs, expected)
    )
    return SavedProgram(path, path.stat().st_size, (found - wanted).abs().max().item())


def _size(processor: Any, image_size: tuple[int, int] | None) -> tuple[int, int]:
    if image_size is None:
        blank = Image.new("RGB", (64, 64))
        height, width = process_images(processor.image_processor, [blank])["pixel_values"].shape[-2:]
        return height, width
    if len(image_size) != 2 or any(type(side) is not int or side < 1 for side in image_size):
        raise InputError(f"image_size={quoted(image_size)}: must be a height and a width in pixels.")
    height, width = image_size
    return height, width


def _prompt(class_names: Sequence[str] | None, tokenizer: Any, max_text_len: int) -> str:
    if class_names is None:
        return "object. background."
    if isinstance(class_names, str):
        raise InputError(f"class_names={quoted(class_names)}: must be a list of names.")
    if len(chunks := split_classes(class_names, tokenizer, max_text_len)) != 1:
        raise InputError(
            f"class_names: {len(class_names)} classes need {len(chunks)} prompts, but a program has one; export a "
            "program without class_names, or several programs."
        )
    return class_prompt(class_names)


def _text_features(detector: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the text model of a detector computes for the first text, `(1, L, d)`."""
    features: list[torch.Tensor] = []
    with detector.model.text_backbone.register_forward_hook(
        lambda module, args, output: features.append(output.last_hidden_state[:1])
    ):
        detector(**inputs)
    return features[0]


def _example(
    detector: Any, text: Mapping[str, torch.Tensor], batch: int, height: int, width: int
) -> dict[str, torch.Tensor]:
    """Return images of noise, and a text for each."""
    noise = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, height, width, dtype=torch.long)
    return {
        "pixel_values": noise.to(detector.device, detector.dtype),
        "pixel_mask": mask.to(detector.device),
        **{
            name: text[name].expand(batch, -1).contiguous()
            for name in ("input_ids", "token_type_ids", "attention_mask")
        },
    }
