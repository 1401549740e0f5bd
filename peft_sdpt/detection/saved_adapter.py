# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Saved adapters in a folder or on the Hub, with the class names and the processor saved beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

from ..config import SDPTConfig
from ..downloads import DamagedFileError, download
from ..errors import InputError, reason
from ..files import read_json, whole_files
from ..model_card import CARD, carry_card, code, literal, write_licence, write_section
from ..wording import printable, quoted
from .base_models import not_a_detector, refuse_adapter_folder
from .grounding import clean_name

CLASS_NAMES_FILE = "class_names.json"
THRESHOLD_FILE = "detection.json"
# The files of a processor and of an adapter that are downloaded from the Hub. An adapter needs the first two `FILES`.
PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
)
FILES = ("adapter_config.json", "adapter_model.safetensors", CLASS_NAMES_FILE, THRESHOLD_FILE, *PROCESSOR_FILES)
# Number of classes that a model card lists.
LISTED_CLASSES = 100
# Largest number of letters of a class name. A prompt of the base models has at most 256 tokens.
MAX_CLASS_NAME = 1000
# Largest shorter edge of an image after resizing, in pixels. Detectors are trained with 800. A size in a downloaded
# file must not use up the memory.
MAX_IMAGE_SIZE = 4096


@dataclass(frozen=True)
class SavedAdapter:
    """A saved SDPT adapter.

    Attributes:
        source: The folder or Hub id as the user gave it.
        name: Name of the adapter.
        folder: Folder with the files of the adapter.
        base_model: Folder or Hub id of the base model it was trained on. None if its config does not say.
    """

    source: str
    name: str
    folder: Path
    base_model: str | None


def find_adapter(source: str, name: str | None = None) -> SavedAdapter:
    """Find a saved adapter in a folder or on the Hub. Its files are downloaded from the Hub.

    Args:
        source: A folder or a Hub id. `user/repository/best` is a folder in a repository.
        name: Name of the adapter. None for the last part of the folder or id.

    Returns:
        The adapter. Its weights are not loaded.

    Raises:
        InputError: There is no such adapter, or it is not an SDPT adapter.
    """
    where = f"source={quoted(source, 300)}"
    folder = Path(source)
    if not os.path.isdir(source):
        repository, subfolder = "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:])
        try:
            # The files are downloaded here, so that the rest of the code handles only local folders.
            downloaded = download(repository, FILES, subfolder)
        except DamagedFileError as error:
            raise InputError(f"{where}: {reason(error)}.") from None
        except Exception as error:  # `huggingface_hub` raises many kinds of errors
            raise InputError(f"{where}: no such folder, and no such repository on the Hub ({reason(error)}).") from None
        if downloaded is None:
            raise InputError(f"{where}: is not a saved adapter, because the repository has no {FILES[0]}.")
        folder = downloaded
    for file in FILES[:2]:
        if not (folder / file).is_file():
            raise InputError(f"{where}: is not a saved adapter, because {folder} has no {file}.")
    if not isinstance(read_json(folder / "adapter_config.json"), dict):
        raise InputError(f"{where}: adapter_config.json cannot be read (it is not a JSON object).")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{where}: is not an adapter that can be loaded ({reason(error)}).") from None
    if not isinstance(config, SDPTConfig):
        raise InputError(f"{where}: is not an SDPT adapter, because its config is a {type(config).__name__}.")
    return SavedAdapter(source, name or Path(source).resolve().name, folder, config.base_model_name_or_path)


def common_base_model(adapters: Sequence[SavedAdapter]) -> str:
    """Find the base model that all adapters were trained on.

    Args:
        adapters: At least one adapter.

    Returns:
        The folder or Hub id.

    Raises:
        InputError: An adapter does not name its base model, or two name different ones.
    """
    base_models = {}
    for adapter in adapters:
        base_model = adapter.base_model
        if not base_model:
            raise InputError(f"adapters={adapter.source!r}: does not name its base model.")
        base_models[str(Path(base_model).resolve()) if os.path.isdir(base_model) else base_model] = adapter
    if len(base_models) > 1:
        named = "; ".join(f"{adapter.name}: {printable(name, 300)}" for name, adapter in base_models.items())
        raise InputError(f"adapters=...: the adapters were trained on different base models ({named}).")
    return next(iter(base_models))


def load_detector(model_name_or_path: str | os.PathLike, adapters: Sequence[SavedAdapter] = ()) -> nn.Module:
    """Load a base model in float32 with saved adapters on it, in evaluation mode.

    Args:
        model_name_or_path: Folder or Hub id of the base model.
        adapters: The adapters. Their names in the model are "adapter0", "adapter1" and so on, because their own names
            may have characters that are not allowed in the name of a module. The first adapter is active.

    Returns:
        The base model if there are no adapters, else a `PeftModel`.

    Raises:
        InputError: The base model or an adapter cannot be loaded.
    """
    model = load_base_model(model_name_or_path)
    for number, adapter in enumerate(adapters):
        folder, name = str(adapter.folder), f"adapter{number}"
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        except Exception as error:  # a damaged folder can raise anything
            raise _does_not_load("adapters", adapter, model_name_or_path, error) from None
    return model.eval()


def load_trainable(model_name_or_path: str | os.PathLike, adapter: SavedAdapter) -> PeftModel:
    """Load a base model in float32 with a saved, trainable adapter on it.

    Args:
        model_name_or_path: Folder or Hub id of the base model.
        adapter: The adapter. Its name in the model is "default".

    Returns:
        The base model with the adapter.

    Raises:
        InputError: The base model or the adapter cannot be loaded.
    """
    model = load_base_model(model_name_or_path)
    try:
        return PeftModel.from_pretrained(model, str(adapter.folder), is_trainable=True)
    except Exception as error:  # a damaged folder can raise anything
        raise _does_not_load("adapter", adapter, model_name_or_path, error) from None


def _does_not_load(
    argument: str, adapter: SavedAdapter, model_name_or_path: str | os.PathLike, error: Exception
) -> InputError:
    # The message lists each layer that does not fit.
    because = printable(str(error) or type(error).__name__, 1200)
    return InputError(
        f"{argument}={adapter.source!r}: cannot be loaded on the base model {model_name_or_path} ({because})."
    )


def load_base_model(model_name_or_path: str | os.PathLike) -> nn.Module:
    """Load a zero-shot detector of transformers in float32.

    Args:
        model_name_or_path: Folder or Hub id of the detector.

    Returns:
        The detector, in evaluation mode.

    Raises:
        InputError: The model cannot be loaded, or the folder holds an adapter, which transformers would load with it.
    """
    refuse_adapter_folder(model_name_or_path)
    try:
        return AutoModelForZeroShotObjectDetection.from_pretrained(
            model_name_or_path, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # a damaged file can raise anything
        raise not_a_detector(model_name_or_path, error) from None


def load_processor(adapter: SavedAdapter | None, model_name_or_path: str | os.PathLike) -> Any:
    """Load the processor that was saved with an adapter, with the image size of its training, or the base model's own.

    Args:
        adapter: The adapter. If it was saved without a processor, or is None, the base model's processor is loaded.
        model_name_or_path: Folder or Hub id of the base model.

    Returns:
        The processor.

    Raises:
        InputError: No processor can be loaded, it lacks a tokenizer or an image processor, or it cannot process an
            image of 8 by 8 pixels. Code of a repository is never run.
    """
    if adapter and any((adapter.folder / f"{name}_config.json").is_file() for name in ("preprocessor", "processor")):
        source, where = str(adapter.folder), f"adapter={adapter.source!r}"
    else:
        source, where = str(model_name_or_path), f"model_name_or_path={quoted(str(model_name_or_path), 300)}"
    try:
        if not os.path.isdir(source):
            # If the Hub does not give out a file at the moment, transformers assumes that the file does not exist, and
            # makes a tokenizer without words.
            source = str(download(source, ("config.json", *PROCESSOR_FILES)) or source)
        # By default, transformers would ask on the terminal whether to run code of the repository.
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{where}: has no processor that can be loaded ({reason(error)}).") from None
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise InputError(f"{where}: the processor must have both a tokenizer and an image processor.")
    _check_processor(processor, where)
    if adapter:
        _check_vocabulary(processor, model_name_or_path, where)
    return processor


def _check_processor(processor: Any, where: str) -> None:
    """Raise an `InputError` if a processor cannot process an image and a text, or cuts, frames or enlarges images."""
    sizes = dict(getattr(processor.image_processor, "size", None) or {})
    if not all(type(pixels) is int and pixels >= 1 for pixels in sizes.values()):
        raise InputError(f"{where}: the size of its images must be whole numbers of pixels, got {quoted(sizes)}.")
    # An image is large only if both edges are long.
    if min(sizes.values(), default=0) > MAX_IMAGE_SIZE:
        raise InputError(
            f"{where}: the size of its images must be at most {MAX_IMAGE_SIZE:,} pixels for the shorter edge, got "
            f"{quoted(sizes)}."
        )
    for name in ("do_center_crop", "pad_size"):
        if value := getattr(processor.image_processor, name, None):
            raise InputError(f"{where}: its processor must not cut images or add a frame, got {name}={quoted(value)}.")
    try:
        inputs = processor(images=[Image.new("RGB", (8, 8))], text="a.", return_tensors="pt")
        finite = bool(inputs["pixel_values"].isfinite().all()) and inputs["input_ids"].numel() > 0
    except Exception as error:  # values of the files that do not fit together can raise anything
        raise InputError(f"{where}: its processor cannot process an image ({reason(error)}).") from None
    if not finite:
        raise InputError(f"{where}: its processor makes pixels that are not finite.")


def _check_vocabulary(processor: Any, model_name_or_path: str | os.PathLike, where: str) -> None:
    """Raise an `InputError` if a tokenizer has tokens for which the base model has no embedding."""
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    except Exception:  # the error is raised when the base model is loaded
        return
    known = getattr(getattr(config, "text_config", config), "vocab_size", None)
    last = max(processor.tokenizer.get_vocab().values(), default=0)
    if known is not None and last >= known:
        raise InputError(
            f"{where}: its tokenizer has the token {last:,}, but the base model knows the tokens below {known:,}."
        )


def set_image_size(processor: Any, shorter_edge: int) -> None:
    """Set the size to which the processor of a detector resizes images.

    Args:
        processor: The processor, which is changed.
        shorter_edge: Shorter edge of an image in pixels. The longer edge is limited in proportion.

    Raises:
        InputError: The shorter edge is below 1 or above 4,096 pixels.
    """
    if not 1 <= shorter_edge <= MAX_IMAGE_SIZE:
        raise InputError(f"image_size={shorter_edge}: must be from 1 to {MAX_IMAGE_SIZE:,} pixels.")
    # Detectors are trained with images of at most 800 by 1333 pixels.
    longest_edge = round(shorter_edge * 1333 / 800)
    processor.image_processor.size = {"shortest_edge": shorter_edge, "longest_edge": longest_edge}


def read_class_names(adapter: SavedAdapter) -> list[str]:
    """Read the names of the classes that an adapter was trained on.

    Args:
        adapter: The adapter.

    Returns:
        The names, in the order of training.

    Raises:
        InputError: The file is missing, or is not a list of names in JSON, or a name in it is empty or too long.
    """
    file = adapter.folder / CLASS_NAMES_FILE
    if not file.is_file():
        raise InputError(f"adapter={adapter.source!r}: was saved without class names ({file.name}).")
    class_names = read_json(file)
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise InputError(f"{file}: must be a JSON list of names.")
    for name in class_names:
        if not clean_name(name) or len(name) > MAX_CLASS_NAME:
            raise InputError(f"{file}: a name must have at least one letter and at most 1,000, got {quoted(name)}.")
    return [clean_name(name) for name in class_names]


def read_threshold(adapter: SavedAdapter, default: float | None = None) -> float | None:
    """Read the suggested score threshold of an adapter.

    Args:
        adapter: The adapter.
        default: What to return if the adapter was saved without one.

    Returns:
        The threshold, at least 0 and below 1, or `default`.

    Raises:
        InputError: The file is damaged.
    """
    file = adapter.folder / THRESHOLD_FILE
    if not file.is_file():
        return default
    content = read_json(file)
    threshold = content.get("threshold") if isinstance(content, dict) else None
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold < 1:
        raise InputError(f"{file}: must be a JSON object with a threshold of at least 0 and below 1.")
    return float(threshold)


def write_threshold(
    folder: str | os.PathLike,
    processor: Any,
    class_names: Sequence[str],
    threshold: Mapping[str, Any] | None,
    source: str = ".",
) -> None:
    """Write a suggested score threshold into the folder of an adapter, and the code that detects into its model card.

    Args:
        folder: Folder of the adapter, with its model card.
        processor: The processor of the model.
        class_names: Names of the classes that the adapter was trained on.
        threshold: A `ThresholdChoice` with the name of its `split`. None if no threshold is known.
        source: Where the model card says that the adapter is: a Hub id, or "." for the folder of the card.
    """
    file = Path(folder) / THRESHOLD_FILE
    if threshold:
        file.write_text(json.dumps(dict(threshold), indent=2) + "\n", encoding="utf-8")
    else:
        file.unlink(missing_ok=True)
    write_section(Path(folder) / CARD, "detection", _describe(processor, class_names, threshold, source))


def _describe(processor: Any, class_names: Sequence[str], threshold: Mapping[str, Any] | None, source: str) -> str:
    """Return the section of the model card that tells what an adapter detects, and how."""
    names = [code(name) for name in class_names[:LISTED_CLASSES]]
    if len(class_names) > LISTED_CLASSES:
        names.append(f"and {len(class_names) - LISTED_CLASSES:,} more, which `{CLASS_NAMES_FILE}` lists")
    size = dict(processor.image_processor.size)
    pixels = ", ".join(
        f"{name.replace('_', ' ')} {value} pixels" for name, value in sorted(size.items(), reverse=True) if value
    )
    rows = [("classes", f"{len(class_names):,}: {', '.join(names)}"), ("image size", f"resized to {pixels}")]
    if threshold:
        best = f"{threshold['threshold']:g}, which has the best F1 on the split {code(threshold['split'])}"
        gives = ", ".join(f"{name} {threshold[name.lower()]:.2f}" for name in ("F1", "precision", "recall"))
        rows.append(("score threshold", f"{best}: {gives} at IoU 0.5"))
    comment = "this repository" if source != "." else "the folder of this file, or the id of its repository on the Hub"
    lines = [
        "## How to detect with it",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "```python",
        *_EXAMPLE.format(source=literal(source), comment=comment).strip().splitlines(),
        "```",
        "",
        "The code needs `pip install peft_sdpt[detection]`, and a photo with the name `photo.jpg`. A box is x, y, "
        "width and height in pixels.",
    ]
    return "\n".join(lines)


_EXAMPLE = """
from peft_sdpt import detection

adapter = detection.find_adapter({source})  # {comment}
names, threshold = detection.read_class_names(adapter), detection.read_threshold(adapter, default=0.3)
processor = detection.load_processor(adapter, adapter.base_model)
model = detection.load_detector(adapter.base_model, [adapter])
chunks = detection.split_classes(names, processor.tokenizer, model.config.max_text_len)
image = detection.read_image("photo.jpg")
found = detection.detect(model, processor, [image], names, chunks, threshold)[0]
for box, score, label in zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist()):
    print(names[label], round(score, 2), [round(value) for value in box])
"""


def write_adapter(
    folder: str | os.PathLike,
    model: PeftModel,
    processor: Any,
    class_names: Sequence[str],
    *,
    threshold: Mapping[str, Any] | None = None,
    licence: Mapping[str, str] | None = None,
    source: str = ".",
) -> None:
    """Write the files of `save_adapter` directly into a folder, for code that moves the complete folder itself.

    The function suits `peft_sdpt.training.Checkpoints`. If it fails, a part of the files may be there.

    Args:
        folder: Folder to write to. It is made if it does not exist.
        model: The model with the adapter.
        processor: The processor of the model.
        class_names: Names of the classes that the adapter was trained on.
        threshold: Suggested score threshold, a `ThresholdChoice` with the name of its `split`. None if it is not known.
        licence: Metadata for the model card, as from `licence_of`. None keeps what the card has.
        source: Where the model card says that the adapter is: a Hub id, or "." for the folder of the card.
    """
    model.save_pretrained(str(folder))
    processor.save_pretrained(folder)
    text = json.dumps(list(class_names), indent=2, ensure_ascii=False) + "\n"
    (Path(folder) / CLASS_NAMES_FILE).write_text(text, encoding="utf-8")
    write_threshold(folder, processor, class_names, threshold, source)
    write_licence(Path(folder) / CARD, licence or {})


def save_adapter(
    folder: str | os.PathLike,
    model: PeftModel,
    processor: Any,
    class_names: Sequence[str],
    results: str | None = None,
    *,
    threshold: Mapping[str, Any] | None = None,
    licence: Mapping[str, str] | None = None,
    source: str = ".",
) -> list[str]:
    """Save an adapter with everything that detecting with it needs: its processor, class names and score threshold.

    Each file is written completely or not at all. The model card of the folder is kept, apart from its sections on
    detection and results.

    Args:
        folder: Folder to write to. It is made if it does not exist.
        model: The model with the adapter.
        processor: The processor of the model.
        class_names: Names of the classes that the adapter was trained on.
        results: Section on results for the model card, in Markdown. None removes this section.
        threshold: Suggested score threshold, a `ThresholdChoice` with the name of its `split`. None if it is not known.
        licence: Metadata for the model card, as from `licence_of`. None keeps what the card has.
        source: Where the model card says that the adapter is: a Hub id, or "." for the folder of the card.

    Returns:
        The sorted names of the files.

    Raises:
        InputError: The folder cannot be written.
    """
    with whole_files(folder) as unfinished:
        carry_card(Path(folder), unfinished)
        write_adapter(unfinished, model, processor, class_names, threshold=threshold, licence=licence, source=source)
        write_section(unfinished / CARD, "results", results)
        names = sorted(path.name for path in unfinished.iterdir())
    if not threshold:
        # The folder may have the threshold of an earlier adapter.
        (Path(folder) / THRESHOLD_FILE).unlink(missing_ok=True)
    return names
