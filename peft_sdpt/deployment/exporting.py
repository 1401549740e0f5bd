# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What exported programs and ONNX files share: a detector with fixed text for images of any size, and its checks."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode
from transformers.models.swin.modeling_swin import SwinLayer, SwinPatchEmbeddings, SwinPatchMerging

from ..detection.base_models import TRAINED
from ..detection.grounding import class_prompt, class_scores, class_token_maps, split_classes
from ..detection.pixels import num_positions, pad_small_images, strides_of
from ..detection.prediction import DEFAULT_THRESHOLD
from ..errors import InputError
from ..files import check_writable, whole_file
from ..version import __version__
from ..wording import quoted, shown_path
from .baking import bake, has_prompts

# Largest difference of a score or a box to PyTorch. Differences of 1e-5 are usual in float32.
MAX_DIFFERENCE = 1e-3
# What the encoder reads of the text. It is the same for all images.
_TEXT = ("text_features", "text_attention_mask", "text_self_attention_masks", "text_position_embedding")
# Names of sizes that may vary from call to call.
_SIZES = {
    "pixel_values": ("batch", None, "height", "width"),
    "pixel_mask": ("batch", "height", "width"),
    **dict.fromkeys(("input_ids", "token_type_ids", "attention_mask"), ("batch", "tokens")),
    **dict.fromkeys(("scores", "logits", "boxes"), ("batch", None, None)),
}
# Texts of the example if a program takes tokens. One of them is padded.
_EXAMPLE_TEXTS = ("a dog. red apple.", "cat.")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class ExportedDetector:
    """A file of a detector that runs without peft_sdpt, PEFT and transformers.

    Attributes:
        path: The file.
        num_bytes: Size of the file in bytes.
        inputs: Name and shape of each input. Sizes that may vary are names.
        outputs: Name and shape of each output.
        prompts: The prompts that are built in.
        difference: Largest difference between a score or a box of the file and of the model, in 95% of the queries.
            Boxes are fractions of the image. None if it was not checked.
        opset: Version of the ONNX operators. None for an exported program.
    """

    path: Path
    num_bytes: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    prompts: list[str]
    difference: float | None
    opset: int | None = None


def export_detector(
    model: nn.Module,
    processor: Any,
    class_names: Sequence[str] | None,
    path: str | os.PathLike,
    save: Callable[[ExportedProgram, Tensors, dict[str, Any], Path], Callable[[Tensors], Tensors]],
    *,
    fixed_size: tuple[int, int] | None,
    threshold: float,
    check: bool,
    device: str | None = None,
) -> ExportedDetector:
    """Export a detector with `torch.export`, write it as a file, and compare it with the model.

    Args:
        save: It is called with the exported program, example inputs, metadata, and a file, and writes the file. It
            returns what the file computes, as a function.
        device: The device of the example inputs and of the exported program. None for that of the model.
        model, processor, class_names, path, fixed_size, threshold, check: See `export_program`.

    Returns:
        What was written.

    Raises:
        InputError: See `export_program`.
    """
    path = Path(path)
    config = detector_config(model)
    chunks = check_export(config, processor, class_names, path, fixed_size=fixed_size, threshold=threshold)
    names = None if class_names is None else list(class_names)
    prompts = [class_prompt([names[index] for index in chunk]) for chunk in chunks] if names else []
    host: Any = _plain_copy(model, device)
    tokenizer = processor.tokenizer
    detector = FixedDetector(host, tokenizer, prompts, chunks) if prompts else TokenDetector(host)
    examples = [_example(config, fixed_size)]
    if not fixed_size:
        # The smallest images differ from the example in all sizes, and their coarsest feature map has one position.
        examples.append(_noise(1, *_blank(config)["pixel_values"].shape[-2:]))
    if not prompts:
        text = tokenizer(_EXAMPLE_TEXTS, padding=True, return_tensors="pt")
        for images in examples:
            images.update({name: tokens[: len(images["pixel_mask"])] for name, tokens in text.items()})
    examples = [_moved(images, host.device) for images in examples]
    program = export_graph(detector, examples[0], fixed_size)
    metadata = {
        "class_names": names,
        "prompts": prompts,
        "threshold": threshold,
        **_preparation(processor.image_processor, fixed_size),
        "box_format": "left, top, right, bottom, as fractions of the image",
        "peft_sdpt_version": __version__,
    }
    difference = None
    with whole_file(path) as file:
        run = save(program, examples[0], metadata, file)
        if check:
            reference = TokenDetector(_plain_copy(model, device))
            expect = functools.partial(_scores_and_boxes, reference, tokenizer, prompts) if prompts else reference
            difference = max(_difference(expect(**inputs), run(inputs)) for inputs in examples)
            if not difference <= MAX_DIFFERENCE:  # NaN is not either
                raise InputError(
                    f"path={shown_path(path)}: is not written, because the detections of the exported file differ from "
                    f"those of the model by {difference:.1e}, and {MAX_DIFFERENCE} is allowed."
                )
        num_bytes = file.stat().st_size
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature
    inputs, outputs = (
        {name: name_sizes(name, values[node].shape) for name, node in zip(names, nodes, strict=True)}
        for names, nodes in ((examples[0], signature.user_inputs), (detector.OUTPUTS, signature.user_outputs))
    )
    return ExportedDetector(path, num_bytes, inputs, outputs, prompts, difference)


def name_sizes(name: str, shape: Sequence[Any]) -> list[int | str]:
    """Return the shape of an input or output. Sizes that may vary are replaced by their names."""
    return [size if isinstance(size, int) else str(label) for size, label in zip(shape, _SIZES[name], strict=True)]


def check_export(
    config: Any,
    processor: Any,
    class_names: Sequence[str] | None,
    path: str | os.PathLike,
    *,
    fixed_size: tuple[int, int] | None = None,
    threshold: float = DEFAULT_THRESHOLD,
) -> list[list[int]]:
    """Check the arguments of an export, without the weights of the model.

    Args:
        config: Config of the detector. The other arguments are those of `export_program`.
        processor, class_names, path, fixed_size, threshold: See `export_program`.

    Returns:
        For each prompt, the indices of its classes, as `peft_sdpt.detection.split_classes`.

    Raises:
        InputError: An argument cannot be used.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"path={shown_path(path)}: is in a folder that does not exist.")
    if path.is_dir():
        raise InputError(f"path={shown_path(path)}: is a folder, and must be a file.")
    check_writable(path.parent, "path")
    if not 0 <= threshold < 1:
        raise InputError(f"threshold={threshold}: must be at least 0 and below 1.")
    if fixed_size is not None:
        if len(fixed_size) != 2 or any(type(side) is not int for side in fixed_size):
            raise InputError(f"fixed_size={quoted(fixed_size)}: must be a height and a width in pixels.")
        height, width = fixed_size
        positions = num_positions(height, width, config) if min(fixed_size) >= 1 else 0
        if positions < config.num_queries:
            raise InputError(
                f"fixed_size={height}x{width}: is too small, because it has {positions} positions for "
                f"{config.num_queries} queries."
            )
    if class_names is None:
        return []
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
            "heads, as AutoModelForZeroShotObjectDetection loads it; other base models cannot be exported as detectors."
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
            "model: is quantised or sharded, and cannot be exported; export it in floating point, and quantise an ONNX "
            "file with ONNX Runtime."
        )
    return config


def _plain_copy(model: nn.Module, device: str | None = None) -> nn.Module:
    """Return a copy of a detector in float32, with the prompts of its active adapters in it."""
    plain = bake(model) if has_prompts(model) else copy.deepcopy(getattr(model, "_orig_mod", model))
    if device is not None:
        plain.to(device)
    return plain.float().eval().requires_grad_(False)


def _moved(inputs: Tensors, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


class TokenDetector(nn.Module):
    """A detector whose inputs are pixels and the tokens of a text, as its processor makes them."""

    OUTPUTS = ("logits", "boxes")

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
    ) -> dict[str, Tensor]:
        outputs = self.host(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
        )
        return {"logits": outputs.logits, "boxes": _corners(outputs.pred_boxes)}


class FixedDetector(nn.Module):
    """A detector whose text is fixed. Its inputs are pixels.

    Args:
        host: The detector. It is changed: its encoder gets the text that is fixed here.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        chunks: For each prompt, the indices of its classes.
    """

    OUTPUTS = ("scores", "boxes")

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
            self.register_buffer(f"input_ids{index}", input_ids.to(host.device))
            self.register_buffer(f"class_weights{index}", weights.to(host.device))
        host.model.encoder = text
        host.model.backbone = _SharedBackbone(host.model.backbone)
        host.model.text_backbone = _NoText(host.model.text_projection)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> dict[str, Tensor]:
        self.host.model.backbone.forget()
        all_scores, all_boxes = [], []
        for index in range(self.num_prompts):
            self.host.model.encoder.prompt = index
            input_ids = getattr(self, f"input_ids{index}").expand(pixel_values.shape[0], -1)
            outputs = self.host(pixel_values=pixel_values, pixel_mask=pixel_mask, input_ids=input_ids)
            all_scores.append(outputs.logits.sigmoid() @ getattr(self, f"class_weights{index}"))
            all_boxes.append(_corners(outputs.pred_boxes))
        return {"scores": torch.cat(all_scores, dim=1), "boxes": torch.cat(all_boxes, dim=1)}


class _SharedBackbone(nn.Module):
    """The image backbone of a detector, which encodes the images once for all prompts."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        # The detector calls it for feature maps that are coarser than those of the backbone.
        self.position_embedding = backbone.position_embedding
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
            host(**_moved({"input_ids": input_ids, **_blank(host.config)}, host.device))
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

    hidden: Tensor

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.zeros_like(projection.weight[0]))

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return types.SimpleNamespace(last_hidden_state=self.hidden.expand(*input_ids.shape, -1))


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


def export_graph(detector: nn.Module, inputs: Tensors, fixed_size: tuple[int, int] | None) -> ExportedProgram:
    """Export a detector, which is changed, for batches of any size and images of any size or of a fixed size."""
    _pad_always(detector)
    fixed = {"height", "width"} if fixed_size else set()
    shapes = {
        name: {dim: Dim.DYNAMIC for dim, size in enumerate(_SIZES[name]) if size and size not in fixed}
        for name in inputs
    }
    with torch.no_grad(), quiet():
        with _ExportableOperators():
            program = torch.export.export(detector, (), dict(inputs), dynamic_shapes=shapes, strict=False)
        # ONNX has no assertions. What only they and the text backbone need is dropped with them.
        graph = program.graph_module.graph
        for node in list(graph.nodes):
            if node.op == "call_function" and "_assert" in str(node.target):
                graph.erase_node(node)
        graph.eliminate_dead_code()
        program.graph_module.recompile()
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings of the exporters, which are about their own workings."""
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


@torch.no_grad()
def _scores_and_boxes(detector: TokenDetector, tokenizer: Any, prompts: list[str], **images: Tensor) -> Tensors:
    """Return the outputs of a `FixedDetector`, from a detector that encodes the text of each prompt in this call."""
    all_scores, all_boxes = [], []
    for prompt in prompts:
        text = tokenizer([prompt] * len(images["pixel_mask"]), return_tensors="pt").to(images["pixel_mask"].device)
        outputs = detector(**images, **text)
        maps = class_token_maps(text["input_ids"], outputs["logits"].shape[-1])
        all_scores.append(torch.stack(class_scores(outputs["logits"], maps)))
        all_boxes.append(outputs["boxes"])
    num_classes, before, rows = sum(scores.shape[-1] for scores in all_scores), 0, []
    for scores in all_scores:
        rows.append(nn.functional.pad(scores, (before, num_classes - before - scores.shape[-1])))
        before += scores.shape[-1]
    return {"scores": torch.cat(rows, dim=1), "boxes": torch.cat(all_boxes, dim=1)}


def _difference(expected: Tensors, found: Tensors) -> float:
    """Return the largest difference of a score or a box between a file and the model, in 95% of the queries.

    The encoder ranks positions, and a rounding error can exchange the places of two. The two queries are then others,
    as they are between two attention kernels of PyTorch. A fault in the export changes all queries.
    """
    first, second = (
        torch.cat([each["scores"] if "scores" in each else each["logits"].sigmoid(), each["boxes"]], dim=-1)
        for each in (expected, found)
    )
    return float((first - second).abs().amax(-1).flatten().quantile(0.95, interpolation="higher"))
