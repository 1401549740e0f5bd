# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A whole detector as an exported program, which runs with PyTorch alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

from ..detection.prediction import DEFAULT_THRESHOLD
from ..errors import InputError
from ..wording import shown_path
from .exporting import ExportedDetector, Tensors, export_detector

# The text in a program with its metadata.
DESCRIPTION = "detector.json"
SUFFIX = ".pt2"


def export_program(
    model: nn.Module,
    processor: Any,
    class_names: Sequence[str] | None,
    path: str | os.PathLike,
    *,
    fixed_size: tuple[int, int] | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    check: bool = True,
) -> ExportedDetector:
    """Write a detector as a file that `torch.export.load` reads, without peft_sdpt, PEFT and transformers.

    It is exported in float32, on the device of the model. `torch.autocast` around a call computes in half precision.
    Inputs, outputs and metadata are those of `peft_sdpt.deployment.onnx.export_onnx`. The program takes `pixel_values`
    and `pixel_mask` as keyword arguments and returns a dict with `scores` and `boxes`. The file has the metadata as
    JSON in the extra file `detector.json`.

    Without `class_names`, the program detects what a text names. It also takes `input_ids`, `token_type_ids` and
    `attention_mask`, int64 (B, L), with up to `config.max_text_len` tokens. In the place of `scores`, it returns
    `logits` (B, Q, `config.max_text_len`) of the tokens, as the detector does.

    Args:
        model: A Grounding DINO, MM Grounding DINO or LLMDet of transformers, or a `PeftModel` of one. It stays
            unchanged.
        processor: Its processor, which has a `tokenizer` and an `image_processor`.
        class_names: Names of the classes. They set the order of the scores. None if the program takes tokens.
        path: The file to write, `.pt2`. Its folder must exist.
        fixed_size: Height and width (H, W) of all images in pixels. Smaller images need padding. The file loads faster.
            None for any size.
        threshold: Lowest score of a detection. It is only written to the metadata.
        check: Whether to compare the program with the model, on random images.

    Returns:
        What was written.

    Raises:
        InputError: The model cannot be exported, see `detector_config`, the classes cannot be read, `path` does not end
            with `.pt2` or cannot be written, `fixed_size` is too small, or more than 5% of the queries differ by more
            than 0.001.
    """
    if Path(path).suffix != SUFFIX:
        raise InputError(f"path={shown_path(path)}: must end with {SUFFIX}, which torch.export.load expects.")
    return export_detector(
        model,
        processor,
        class_names,
        path,
        _save,
        fixed_size=fixed_size,
        threshold=threshold,
        check=check,
    )


def _save(
    program: ExportedProgram, inputs: Tensors, metadata: Mapping[str, Any], file: Path
) -> Callable[[Tensors], Tensors]:
    """Write a program. Returns what it computes."""
    _allow_all_sizes(program)
    for node in program.graph.nodes:
        # Names of modules and paths of code on this machine, which take more space than a small detector.
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(name, None)
    with open(file, "wb") as opened:
        torch.export.save(program, opened, extra_files={DESCRIPTION: json.dumps(metadata)})
    module = program.module()
    return lambda inputs: module(**inputs)


def _allow_all_sizes(program: ExportedProgram) -> None:
    """Drop the conditions on sizes that were true for the example.

    PyTorch notes them where it chooses among ways to compute the same, for instance when no size is 1. Other sizes
    would raise errors, although the operators of the program work with them.
    """
    # Versions before 2.9 have no guards in programs.
    getattr(program, "_guards_code", []).clear()
    ranges = program.range_constraints
    for symbol, values in list(ranges.items()):
        if str(symbol).startswith("s"):  # a size of an input
            ranges[symbol] = ValueRanges(0, values.upper)
        else:
            del ranges[symbol]  # of a number that only assertions used
