# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A whole detector with a fixed set of classes as one ONNX file, which runs without PyTorch."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..detection.prediction import DEFAULT_THRESHOLD
from ..errors import MissingExtraError
from .exporting import ExportedDetector, FixedDetector, Tensors, export_detector, name_sizes, quiet

# GridSample and LayerNormalization need at least 17. PyTorch writes 18 without a conversion.
OPSET = 18


def export_onnx(
    model: nn.Module,
    processor: Any,
    class_names: Sequence[str],
    path: str | os.PathLike,
    *,
    fixed_size: tuple[int, int] | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    check: bool = True,
) -> ExportedDetector:
    """Write a detector for fixed classes as one ONNX file.

    The text of the classes is encoded once and built in, and so are the prompts of the active adapters. The model stays
    unchanged. It is exported in float32.

    Inputs of the file:

    - `pixel_values`, float32 (B, 3, H, W): resized and normalized images.
    - `pixel_mask`, int64 (B, H, W): 1 on the image, 0 on padding on the right and at the bottom.

    Outputs of the file, with Q queries for each prompt, and C classes:

    - `scores`, float32 (B, Q, C): the scores of `peft_sdpt.detection.class_scores`.
    - `boxes`, float32 (B, Q, 4): left, top, right and bottom edge, as fractions of the width and the height of the
      image without padding, in [0, 1].

    B, H and W may vary from call to call. An image must have at least as many positions as the detector has queries,
    see `peft_sdpt.detection.pad_small_images`.

    If the classes do not fit into one prompt, the file has several prompts, as `peft_sdpt.detection.detect`. The
    queries of the prompts follow each other. A query has a score of 0 for the classes of the other prompts.

    The metadata of the file has JSON values: `class_names`, `prompts`, `threshold`, `image_size` (the `size` of
    the image processor, or `max_height` and `max_width` with a fixed size), `image_mean`, `image_std`,
    `rescale_factor`, `box_format` and `peft_sdpt_version`. `examples/detect_onnx.py` reads them without PyTorch.

    Args:
        model: A Grounding DINO, MM Grounding DINO or LLMDet of transformers, or a `PeftModel` of one.
        processor: Its processor, which has a `tokenizer` and an `image_processor`.
        class_names: Names of the classes. They set the order of the scores.
        path: The file to write. Its folder must exist.
        fixed_size: Height and width (H, W) of all images in pixels, for engines that need fixed sizes. Smaller images
            need padding. None for any size.
        threshold: Lowest score of a detection. It is only written to the metadata.
        check: Whether to compare the file with the model, on random images in ONNX Runtime.

    Returns:
        What was written.

    Raises:
        InputError: The model cannot be exported, see `detector_config`, the classes cannot be read, the file cannot be
            written, `fixed_size` is too small, or more than 5% of the queries differ by more than 0.001.
        MissingExtraError: A package of the extra `onnx` is not installed.
    """
    check_packages()
    exported = export_detector(
        model,
        processor,
        class_names or (),  # None, which programs allow, is no class
        path,
        _save,
        fixed_size=fixed_size,
        threshold=threshold,
        check=check,
        device="cpu",
    )
    return dataclasses.replace(exported, opset=OPSET)


def check_packages() -> None:
    """Check that the extra `onnx` is installed.

    Raises:
        MissingExtraError: A package is not installed.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtraError(
                f"peft_sdpt.deployment.onnx needs the package {package}: pip install peft_sdpt[onnx]", name=package
            )


def _save(
    program: ExportedProgram, inputs: Tensors, metadata: Mapping[str, Any], file: Path
) -> Callable[[Tensors], Tensors]:
    """Write an ONNX file. Returns what it computes in ONNX Runtime."""
    converted = _convert(program, inputs)
    _finish(converted.model, metadata)
    converted.save(file, external_data=False)
    session = _session(file)

    def run(inputs: Tensors) -> Tensors:
        outputs = session.run(list(FixedDetector.OUTPUTS), {name: tensor.numpy() for name, tensor in inputs.items()})
        return dict(zip(FixedDetector.OUTPUTS, map(torch.from_numpy, outputs), strict=True))

    return run


def _convert(program: ExportedProgram, inputs: Tensors) -> Any:
    """Return an exported program as an `ONNXProgram` of PyTorch."""
    with torch.no_grad(), quiet():
        return torch.onnx.export(
            program,
            (),
            kwargs=dict(inputs),
            input_names=list(inputs),
            output_names=FixedDetector.OUTPUTS,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            external_data=False,
            verbose=False,
        )


def _finish(model: Any, metadata: Mapping[str, Any]) -> None:
    """Simplify the graph of an ONNX model, name its sizes, and add metadata to it."""
    from onnx_ir import Shape
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    for simplify in (
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        # Without the stack traces of each operator.
        common.ClearMetadataAndDocStringPass(),
    ):
        simplify(model)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # PyTorch has its own names for sizes there
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = Shape(name_sizes(value.name, value.shape))
    model.producer_name = "peft_sdpt"
    model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])
