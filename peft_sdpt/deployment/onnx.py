# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A whole detector with a fixed set of classes as one ONNX file, which runs without PyTorch."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.swin.modeling_swin import SwinLayer, SwinPatchEmbeddings, SwinPatchMerging

from ..detection.base_models import TRAINED
from ..detection.grounding import class_prompt, class_scores, class_token_maps, split_classes
from ..detection.pixels import num_positions, pad_small_images, strides_of
from ..detection.prediction import DEFAULT_THRESHOLD
from ..errors import InputError, MissingExtraError
from ..files import check_writable, whole_file
from ..version import __version__
from ..wording import quoted, shown_path
from .baking import bake, has_prompts

# GridSample and LayerNormalization need at least 17. PyTorch writes 18 without a conversion.
OPSET = 18
INPUTS, OUTPUTS = ("pixel_values", "pixel_mask"), ("scores", "boxes")
# Largest difference of a score or a box to PyTorch. Differences of 1e-5 are usual in float32.
MAX_DIFFERENCE = 1e-3
# What the encoder reads of the text. It is the same for all images.
_TEXT = ("text_features", "text_attention_mask", "text_self_attention_masks", "text_position_embedding")


@dataclass(frozen=True)
class ExportedDetector:
    """An ONNX file of a detector, and how it compares with PyTorch.

    Attributes:
        path: The file.
        num_bytes: Size of the file in bytes.
        opset: Version of the ONNX operators.
        inputs: Name and shape of each input. Sizes that may vary are names.
        outputs: Name and shape of each output.
        prompts: The prompts that are built in.
        difference: Largest difference between a score or a box of the file and of the model, in 95% of the queries.
            Boxes are fractions of the image. None if it was not checked.
    """

    path: Path
    num_bytes: int
    opset: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    prompts: list[str]
    difference: float | None


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
    path = Path(path)
    config = detector_config(model)
    chunks = check_export(config, processor, class_names, path, fixed_size=fixed_size, threshold=threshold)
    host = _plain_copy(model)
    prompts = [class_prompt([class_names[index] for index in chunk]) for chunk in chunks]
    detector = _FixedDetector(host, processor.tokenizer, prompts, chunks)
    images = _example(config, fixed_size)
    program = _export(detector, images, fixed_size)
    metadata = {
        "class_names": list(class_names),
        "prompts": prompts,
        "threshold": threshold,
        **_preparation(processor.image_processor, fixed_size),
        "box_format": "left, top, right, bottom, as fractions of the image",
        "peft_sdpt_version": __version__,
    }
    _finish(program.model, metadata)
    with whole_file(path) as file:
        program.save(file, external_data=False)
        session = _session(file)
        difference = None
        if check:
            reference = _Reference(_plain_copy(model), processor.tokenizer, prompts)
            # The smallest images differ from the example in all sizes, and their coarsest feature map has one position.
            smallest = [] if fixed_size else [_noise(1, *_blank(config)["pixel_values"].shape[-2:])]
            difference = max(_difference(session, reference, inputs) for inputs in (images, *smallest))
            if not difference <= MAX_DIFFERENCE:  # NaN is not either
                raise InputError(
                    f"path={shown_path(path)}: is not written, because the detections of the exported file differ from "
                    f"those of the model by {difference:.1e}, and {MAX_DIFFERENCE} is allowed."
                )
        num_bytes = file.stat().st_size
    inputs, outputs = (
        {each.name: each.shape for each in values} for values in (session.get_inputs(), session.get_outputs())
    )
    return ExportedDetector(path, num_bytes, OPSET, inputs, outputs, prompts, difference)


def check_export(
    config: Any,
    processor: Any,
    class_names: Sequence[str],
    path: str | os.PathLike,
    *,
    fixed_size: tuple[int, int] | None = None,
    threshold: float = DEFAULT_THRESHOLD,
) -> list[list[int]]:
    """Check the arguments of `export_onnx`, without the weights of the model.

    Args:
        config: Config of the detector. The other arguments are those of `export_onnx`.
        processor, class_names, path, fixed_size, threshold: See `export_onnx`.

    Returns:
        For each prompt, the indices of its classes, as `peft_sdpt.detection.split_classes`.

    Raises:
        InputError: An argument cannot be used.
        MissingExtraError: A package of the extra `onnx` is not installed.
    """
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(package) is None:
            raise MissingExtraError(
                f"peft_sdpt.deployment.onnx needs the package {package}: pip install peft_sdpt[onnx]", name=package
            )
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"path={shown_path(path)}: is in a folder that does not exist.")
    if path.is_dir():
        raise InputError(f"path={shown_path(path)}: is a folder, and must be a file.")
    check_writable(path.parent, "path")
    if not 0 <= threshold < 1:
        raise InputError(f"threshold={threshold}: must be at least 0 and below 1.")
    if fixed_size is not None:
        height, width = fixed_size
        positions = num_positions(height, width, config) if min(fixed_size) >= 1 else 0
        if positions < config.num_queries:
            raise InputError(
                f"fixed_size={height}x{width}: is too small, because it has {positions} positions for "
                f"{config.num_queries} queries."
            )
    if isinstance(class_names, str):
        raise InputError(f"class_names={quoted(class_names)}: must be a list of names.")
    if not class_names:
        raise InputError("class_names: the list is empty; an exported detector needs at least one class.")
    return split_classes(class_names, processor.tokenizer, config.max_text_len)


def detector_config(model: nn.Module) -> Any:
    """Return the config of a model that can be exported.

    Raises:
        InputError: The model is of another kind, quantised, sharded, on the meta device, or has adapters of another
            tuner only.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, TRAINED) or not any(
        name.split(".")[-1] == "class_embed" for name, _ in model.named_modules()
    ):
        kind = getattr(config, "model_type", None) or type(model).__name__
        raise InputError(
            f"model={quoted(kind)}: must be a Grounding DINO, MM Grounding DINO or LLMDet of transformers with its "
            "heads, as AutoModelForZeroShotObjectDetection loads it; other base models cannot be exported to ONNX."
        )
    if isinstance(model, PeftModel) and not has_prompts(model):
        raise InputError(
            "model: has adapters of another tuner only; merge them with merge_and_unload before the export."
        )
    parameters = list(model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        raise InputError("model: is on the meta device; load its weights before the export.")
    # Quantised weights are integers, tensors of other classes, or in modules of their own.
    in_modules = any("quantized" in type(module).__module__ for module in model.modules())
    are_plain = all(type(each) in (Tensor, nn.Parameter) and each.is_floating_point() for each in parameters)
    if in_modules or not are_plain:
        raise InputError(
            "model: is quantised or sharded, and cannot be exported to ONNX; export the model in float32, and quantise "
            "the file with ONNX Runtime."
        )
    return config


def _plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a detector in float32 on the CPU, with the prompts of its active adapters in it."""
    plain = bake(model) if has_prompts(model) else copy.deepcopy(getattr(model, "_orig_mod", model))
    return plain.float().cpu().eval().requires_grad_(False)


class _FixedDetector(nn.Module):
    """A detector whose text is fixed. Its inputs and outputs are those of the ONNX file.

    Args:
        host: The detector. It is changed: its encoder gets the text that is fixed here.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        chunks: For each prompt, the indices of its classes.
    """

    def __init__(self, host: Any, tokenizer: Any, prompts: list[str], chunks: list[list[int]]) -> None:
        super().__init__()
        self.host = host
        self.num_prompts = len(prompts)
        text = _FixedText(host.model.encoder)
        num_classes = sum(map(len, chunks))
        for index, (prompt, chunk) in enumerate(zip(prompts, chunks, strict=True)):
            input_ids = tokenizer([prompt], return_tensors="pt")["input_ids"]
            text.add(host, input_ids)
            (token_map,) = class_token_maps(input_ids, host.config.max_text_len)
            # The scores of tokens that are one-hot are the weights of `class_scores`. A logit of 200 has the
            # probability 1, and one of -200 the probability 0.
            one_hot = 400.0 * torch.eye(host.config.max_text_len) - 200.0
            weights = torch.zeros(host.config.max_text_len, num_classes)
            weights[:, chunk] = class_scores(one_hot[None], [token_map])[0]
            self.register_buffer(f"input_ids{index}", input_ids)
            self.register_buffer(f"class_weights{index}", weights)
        host.model.encoder = text
        host.model.backbone = _SharedBackbone(host.model.backbone)
        host.model.text_backbone = _NoText(host.model.text_projection.in_features)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        all_scores, all_boxes = [], []
        for index in range(self.num_prompts):
            self.host.model.encoder.prompt = index
            input_ids = getattr(self, f"input_ids{index}").expand(pixel_values.shape[0], -1)
            outputs = self.host(pixel_values=pixel_values, pixel_mask=pixel_mask, input_ids=input_ids)
            all_scores.append(outputs.logits.sigmoid() @ getattr(self, f"class_weights{index}"))
            all_boxes.append(_corners(outputs.pred_boxes))
        self.host.model.backbone.forget()
        return torch.cat(all_scores, dim=1), torch.cat(all_boxes, dim=1)


class _SharedBackbone(nn.Module):
    """The image backbone of a detector, which encodes the images once for all prompts."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.forget()

    def forget(self) -> None:
        """Encode the next images."""
        self.known: Any = None

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[list, list]:
        if self.known is None:
            self.known = self.backbone(pixel_values, pixel_mask)
        features, positions = self.known
        # Copied, because the detector appends coarser maps.
        return list(features), list(positions)


def _corners(boxes: Tensor) -> Tensor:
    """Return boxes `(..., 4)` with a centre and a size as corners that are clipped to the image."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 1)


class _FixedText(nn.Module):
    """The encoder of a detector, which reads one of several fixed prompts instead of the text that is passed."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.num_prompts = 0
        self.prompt = 0

    @torch.no_grad()
    def add(self, host: Any, input_ids: Tensor) -> None:
        """Add the prompt `input_ids`, `(1, L)`, as `host` encodes it."""
        seen: dict[str, Any] = {}
        handle = self.encoder.register_forward_pre_hook(lambda _, args, inputs: seen.update(inputs), with_kwargs=True)
        try:
            host(input_ids=input_ids, **_blank(host.config))
        finally:
            handle.remove()
        # All layers of the encoder compute the same embedding of the positions.
        seen["text_position_embedding"] = self.encoder.layers[0].get_text_position_embeddings(
            seen["text_features"], None, seen["text_position_ids"]
        )
        for name in _TEXT:
            self.register_buffer(f"{name}{self.num_prompts}", seen[name].clone())
        self.num_prompts += 1

    def forward(self, vision_features: Tensor, **inputs: Any) -> Any:
        for name in _TEXT:
            text = getattr(self, f"{name}{self.prompt}")
            # `len` would be exported as a constant.
            inputs[name] = text.expand(vision_features.shape[0], *text.shape[1:])
        return self.encoder(vision_features=vision_features, **inputs)


class _NoText(nn.Module):
    """In the place of a text backbone whose output is not used."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = torch.zeros(*input_ids.shape, self.hidden_size)
        return types.SimpleNamespace(last_hidden_state=hidden)


def _blank(config: Any) -> dict[str, Tensor]:
    """Return the inputs of a detector for a blank image, as small as the detector allows."""
    return pad_small_images({"pixel_values": torch.zeros(1, 3, 32, 32)}, config)


def _example(config: Any, fixed_size: tuple[int, int] | None) -> dict[str, Tensor]:
    """Return random pixels of two images, with padding in the second one."""
    if fixed_size:
        height, width = fixed_size
    else:
        # PyTorch exports a size of 1 as a constant. The coarsest feature map needs several rows, columns and windows.
        rows = max(3, getattr(config.backbone_config, "window_size", 0) + 1)
        coarsest = strides_of(config)[-1]
        smallest = _blank(config)["pixel_values"].shape[-1]
        height, width = max(rows * coarsest, smallest) - 5, max((rows + 1) * coarsest, smallest) - 9
    return _noise(2, height, width)


def _noise(batch: int, height: int, width: int) -> dict[str, Tensor]:
    """Return random pixels of images, with padding in the last one."""
    pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, height, width, dtype=torch.long)
    mask[-1, :, width - width // 8 :] = 0
    return {"pixel_values": pixels * mask[:, None], "pixel_mask": mask}


class _ExportableOperators(TorchFunctionMode):
    """In this thread, replaces functions of PyTorch that would be exported as constants or as rare operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.as_tensor and _has_symbols(args[0]):
            return torch.stack([torch.stack([torch.full((), size, **kwargs) for size in row]) for row in args[0]])
        if func is torch.linspace and isinstance(args[2], torch.SymInt):
            # Grounding DINO only takes steps of 1.
            steps: Any = args[2]
            return torch.arange(steps, **kwargs) + args[0]
        if func is Tensor.split and isinstance(args[1], list):
            # ONNX has sequences of tensors for this, which few engines know.
            starts = [sum(args[1][:index]) for index in range(len(args[1]))]
            dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
            return tuple(args[0].narrow(dim, start, size) for start, size in zip(starts, args[1], strict=True))
        return func(*args, **kwargs)


def _has_symbols(rows: Any) -> bool:
    """Return whether this is a list of sizes of feature maps, (height, width), that may vary."""
    is_table = isinstance(rows, list) and all(isinstance(row, tuple) for row in rows)
    return is_table and any(isinstance(size, torch.SymInt) for row in rows for size in row)


def _pad_always(host: nn.Module) -> None:
    """Let a Swin backbone pad feature maps of any size.

    The code of transformers asks first whether a size needs padding, and the answer for the example would be exported.
    Padding by nothing changes nothing.
    """
    padding: dict[type, Any] = {SwinPatchEmbeddings: _pad_pixels, SwinPatchMerging: _pad_pairs, SwinLayer: _pad_windows}
    modules: Iterator[Any] = host.modules()
    for module in modules:
        if type(module) in padding:
            module.maybe_pad = types.MethodType(padding[type(module)], module)


def _missing(size: int, multiple: int) -> int:
    """Return how much is missing to the next multiple. PyTorch simplifies the padded size only in this form."""
    return multiple * ((size + multiple - 1) // multiple) - size


def _pad_pixels(self: SwinPatchEmbeddings, pixels: Tensor, height: int, width: int) -> Tensor:
    patch_height, patch_width = self.patch_size
    return nn.functional.pad(pixels, (0, _missing(width, patch_width), 0, _missing(height, patch_height)))


def _pad_pairs(self: SwinPatchMerging, features: Tensor, height: int, width: int) -> Tensor:
    return nn.functional.pad(features, (0, 0, 0, _missing(width, 2), 0, _missing(height, 2)))


def _pad_windows(self: SwinLayer, features: Tensor, height: int, width: int) -> tuple[Tensor, tuple[int, ...]]:
    padding = (0, 0, 0, _missing(width, self.window_size), 0, _missing(height, self.window_size))
    # The caller cuts the padding off if the returned numbers are not 0.
    return nn.functional.pad(features, padding), (0, 0, 0, 1, 0, 1)


def _export(detector: _FixedDetector, images: Mapping[str, Tensor], fixed_size: tuple[int, int] | None) -> Any:
    """Export a detector, which is changed, as an `ONNXProgram` of PyTorch."""
    _pad_always(detector)
    any_size = torch.export.Dim.DYNAMIC
    sizes = {} if fixed_size else {2: any_size, 3: any_size}
    shapes = {
        "pixel_values": {0: any_size, **sizes},
        "pixel_mask": {0: any_size, **{dim - 1: size for dim, size in sizes.items()}},
    }
    with torch.no_grad(), _quiet():
        with _ExportableOperators():
            program = torch.export.export(detector, (), dict(images), dynamic_shapes=shapes, strict=False)
        # ONNX has no assertions. What only they and the text backbone need is dropped with them.
        graph = program.graph_module.graph
        for node in list(graph.nodes):
            if node.op == "call_function" and "_assert" in str(node.target):
                graph.erase_node(node)
        graph.eliminate_dead_code()
        return torch.onnx.export(
            program,
            (),
            kwargs=dict(images),
            input_names=INPUTS,
            output_names=OUTPUTS,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            external_data=False,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of the exporter, which are about its own workings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
    names = {"pixel_values": ("batch", None, "height", "width"), "pixel_mask": ("batch", "height", "width")}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = Shape(
            size if isinstance(size, int) else name
            for size, name in zip(value.shape, names.get(value.name, ("batch", None, None)), strict=True)
        )
    model.producer_name = "peft_sdpt"
    model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})


def _preparation(image_processor: Any, fixed_size: tuple[int, int] | None) -> dict[str, Any]:
    """Return how images are prepared, for the metadata."""
    normalizes = image_processor.do_normalize
    size = dict(image_processor.size) if image_processor.do_resize else None
    return {
        "image_size": {"max_height": fixed_size[0], "max_width": fixed_size[1]} if fixed_size else size,
        "image_mean": list(image_processor.image_mean) if normalizes else [0.0, 0.0, 0.0],
        "image_std": list(image_processor.image_std) if normalizes else [1.0, 1.0, 1.0],
        "rescale_factor": image_processor.rescale_factor if image_processor.do_rescale else 1.0,
    }


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])


@dataclass
class _Reference:
    """A detector that encodes the text in each call, with the outputs of the ONNX file."""

    model: Any
    tokenizer: Any
    prompts: list[str]

    @torch.no_grad()
    def __call__(self, images: Mapping[str, Tensor]) -> Tensor:
        """Return the scores and boxes of each query, `(B, Q, C + 4)`."""
        parts = []
        num_images = len(images["pixel_values"])
        for prompt in self.prompts:
            text = self.tokenizer([prompt] * num_images, return_tensors="pt")
            outputs = self.model(**images, **text)
            maps = class_token_maps(text["input_ids"], outputs.logits.shape[-1])
            parts.append((torch.stack(class_scores(outputs.logits, maps)), _corners(outputs.pred_boxes)))
        rows, num_classes, before = [], sum(scores.shape[-1] for scores, _ in parts), 0
        for scores, boxes in parts:
            after = num_classes - before - scores.shape[-1]
            rows.append(torch.cat([nn.functional.pad(scores, (before, after)), boxes], dim=-1))
            before += scores.shape[-1]
        return torch.cat(rows, dim=1)


def _difference(session: Any, reference: _Reference, images: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a score or a box between an ONNX file and the model, in 95% of the queries.

    The encoder ranks positions, and a rounding error can exchange the places of two. The two queries are then others,
    as they are between two attention kernels of PyTorch. A fault in the export changes all queries.
    """
    expected = reference(images)
    outputs = session.run(list(OUTPUTS), {name: tensor.numpy() for name, tensor in images.items()})
    found = torch.cat([torch.from_numpy(output) for output in outputs], dim=-1)
    return float((expected - found).abs().amax(-1).flatten().quantile(0.95, interpolation="higher"))
