# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The model card beside a saved adapter: what it is, what it belongs to, and how it is loaded.

PEFT writes a card with every adapter, but for tags and the host's name a form that nobody has filled in. Sections of
ours are kept between comments, so that they can be written anew while the text of the adapter's author stays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES

if TYPE_CHECKING:
    from .config import SDPTConfig

CARD = "README.md"
PIPELINE_TAG = "zero-shot-object-detection"
TAGS = ("prompt-tuning", "sdpt")
DETECTION_TAG = "open-vocabulary-detection"
_DETECTOR = "AutoModelForZeroShotObjectDetection"
_PAPER = "https://arxiv.org/abs/2407.11414"
_TAG_OF_HOST = "base_model:adapter:"
_VERSIONS = "### Framework versions"


def complete_card(folder: str | os.PathLike, config: SDPTConfig) -> None:
    """Complete the `README.md` in a folder, if it is a card of PEFT's or an unfilled form; no other is touched.

    Metadata: library, pipeline, tags, and the host where it is one of the Hub. A `license` that is there stays, and
    none is guessed. Text: an unfilled form is replaced, what somebody wrote stays and gets a section behind it, which
    is written anew each time.

    Args:
        folder: where the adapter is saved.
        config: of the adapter.
    """
    file = Path(folder) / CARD
    if not file.is_file():
        return
    try:
        content = file.read_text(encoding="utf-8-sig")
        if not re.match(r"\s*---\s*\n", content):
            return
        card = ModelCard(content, ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError) as error:  # the adapter itself is in order
        warnings.warn(f"{file}: not completed, it cannot be read as a model card ({error}).", stacklevel=3)
        return
    unfilled = _is_unfilled(card.text)
    if not unfilled and card.data.library_name != "peft":
        return

    host = _hub_id(config.base_model_name_or_path)
    data = card.data
    data.library_name = "peft"
    tags = {tag for tag in data.tags or () if not tag.startswith(_TAG_OF_HOST)} | set(TAGS)
    if _class_of_host(config) == _DETECTOR:
        data.pipeline_tag = data.pipeline_tag or PIPELINE_TAG
        tags.add(DETECTION_TAG)
    data.tags = sorted(tags | ({_TAG_OF_HOST + host} if host else set()))
    if host:
        data.base_model = host
    elif isinstance(data.base_model, str) and not _hub_id(data.base_model):
        data.base_model = None  # a path, which the Hub refuses

    text = f"# SDPT adapter for {_name(config)}\n" if unfilled else _without_versions_of_peft(card.text)
    card.text = "\n" + with_section(text, "adapter", _describe(config, host))
    card.save(file)


def with_section(text: str, name: str, body: str | None) -> str:
    """Put a section of ours into the text of a card.

    Args:
        text: of the card, or all of it.
        name: of the section.
        body: what it says; None takes it out.

    Returns:
        The text with the section in the place that it had, at the end if it had none.

    Example:
        >>> print(with_section("# Mine", "results", "AP 0.5"))
        # Mine
        <BLANKLINE>
        <!-- results: begin. Written by a program; what you write above or below stays. -->
        <BLANKLINE>
        AP 0.5
        <BLANKLINE>
        <!-- results: end -->
        <BLANKLINE>
    """
    begin = f"<!-- {name}: begin. Written by a program; what you write above or below stays. -->"
    end = f"<!-- {name}: end -->"
    # The wording of another version, or one that was edited, marks the same place.
    found = re.search(rf"<!-- {name}: begin.*?-->(?:.*?{end})?", text, re.DOTALL)
    before, after = (text[: found.start()], text[found.end() :]) if found else (text, "")
    parts = [before, *([f"{begin}\n\n{body.strip()}\n\n{end}"] if body is not None else []), after]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def carry_card(folder: Path, other: Path) -> None:
    """Copy the model card of a folder, if it has one that can be read, to another folder, where PEFT completes it."""
    try:
        ModelCard.load(folder / CARD)
        shutil.copyfile(folder / CARD, other / CARD)
    except (OSError, ValueError, yaml.YAMLError):
        pass


def write_results(card: Path, results: str | None) -> None:
    """Put results into a model card, in place of those it has; None takes them out."""
    card.write_text(with_section(card.read_text(encoding="utf-8"), "results", results), encoding="utf-8")


def _name(config: SDPTConfig) -> str:
    """What to call the host: of a folder, its last part, since where it lay is nobody's business."""
    name = config.base_model_name_or_path
    return name if _hub_id(name) else Path(name or "").name or "the host"


def _hub_id(name: str | None) -> str | None:
    """The name, if it can be one of the Hub and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not os.path.exists(name) else None


def _describe(config: SDPTConfig, host: str | None) -> str:
    link = f"[{host}](https://huggingface.co/{host})" if host else f"`{_name(config)}`"
    lines = [
        f"Tokens for [SDPT, Synchronous Dual Prompt Tuning]({_PAPER}), a tuner that the package `peft_sdpt` adds to "
        f"PEFT. They belong to {link}, whose own weights are not in here and stay as they are.",
        "",
        "| | |",
        "|---|---|",
    ]
    widths = list((config.fusion_layers or {}).values())
    tokens = f"{config.num_virtual_tokens} a layer" + (" and modality" if config.prompt_mode == "independent" else "")
    if widths:
        size = sum(math.prod(config.prompt_shape(width)) for width in widths)
        wide = " or ".join(f"{width}" for width in sorted(set(widths)))
        lines += [
            f"| tokens | {tokens}, {size:,} numbers in all |",
            f"| fusion layers | {len(widths)}, tokens of {wide} numbers; `fusion_layers` in `adapter_config.json` "
            "names them |",
        ]
    else:
        lines += [f"| tokens | {tokens} |"]
    usual = {each.name: each.default for each in dataclasses.fields(config)}
    for name in ("prompt_mode", "prompt_space", "image_attends_prompts", "pinv_rtol"):
        if (value := getattr(config, name)) != usual[name]:
            lines.append(f"| `{name}` | {value} |")
    if config.modules_to_save:
        lines.append(f"| trained whole | {', '.join(f'`{name}`' for name in config.modules_to_save)} |")
    revision = f', revision="{config.revision}"' if config.revision else ""
    name = _class_of_host(config)
    lines += [
        "",
        "## How to load it",
        "",
        "```python",
        "import peft_sdpt  # first: without it, PEFT ends in KeyError: 'SDPT'",
        "from peft import PeftModel",
        *([f"from transformers import {name}"] if name else []),
        "",
        f'host = {name}.from_pretrained("{host or _name(config)}"{revision})'
        if name
        else "host = ...  # the model that these tokens belong to, built by the code it comes from",
        'model = PeftModel.from_pretrained(host, "user/repository")  # this one, or a folder',
        "```",
        "",
        *(
            []
            if name
            else [
                "A host whose fusion layers `peft_sdpt` does not know by itself is declared first, in each process "
                "that loads this adapter: `peft_sdpt.register_host`.",
                "",
            ]
        ),
        _VERSIONS,
        "",
        f"- PEFT {peft.__version__}",
        f"- peft_sdpt {config.peft_sdpt_version}",
    ]
    return "\n".join(lines)


def _class_of_host(config: SDPTConfig) -> str | None:
    """What loads the host in transformers; None where it is of another library, or nobody told."""
    known = config.auto_mapping or {}
    if not str(known.get("parent_library", "")).startswith("transformers."):
        return None
    name = known["base_model_class"]
    return _DETECTOR if name in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES.values() else name


def _is_unfilled(text: str) -> bool:
    """Whether all lines are those of the form that PEFT and transformers save, in this version of huggingface_hub."""
    return {line.strip() for line in text.splitlines()} <= _form() | {_VERSIONS, f"- PEFT {peft.__version__}"}


@functools.cache
def _form() -> frozenset[str]:
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    forms = (ModelCard.from_template(ModelCardData(), model_description=text).text for text in ("", description))
    return frozenset(line.strip() for form in forms for line in form.splitlines())


def _without_versions_of_peft(text: str) -> str:
    """The text without what PEFT puts at its end where it does not find its version; our section has it."""
    return re.sub(rf"\n*{_VERSIONS}\n+(- PEFT \S+\n*)+\Z", "\n", text.rstrip("\n") + "\n")
