# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The model card of a saved adapter: what it is, its base model, and how to load it.

PEFT saves a card with each adapter, but it is an empty form apart from the tags and the name of the base model. This
module adds sections between two comments. They can be rewritten while the text of the adapter's author stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import keyword
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import peft
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft.config import PeftConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES

from .errors import reason
from .wording import counted, printable

CARD = "README.md"
PIPELINE_TAG = "zero-shot-object-detection"
TAGS = ("prompt-tuning", "sdpt")
DETECTION_TAG = "open-vocabulary-detection"
LICENCE_FIELDS = ("license", "license_name", "license_link")
_DETECTOR = "AutoModelForZeroShotObjectDetection"
_PAPER = "https://arxiv.org/abs/2407.11414"
_BASE_MODEL_TAG = "base_model:adapter:"
_VERSIONS = "### Framework versions"
# Largest size of a card in bytes, and of its metadata in letters. Longer YAML would take too long to parse.
MAX_CARD, MAX_METADATA = 1_000_000, 20_000
# Largest number of letters of a name in a card.
MAX_SHOWN = 200
# Text that could become markup, HTML or a link. An underscore between letters is no markup. A number with a full stop
# is markup only at the start. GitHub makes links of addresses even without markup.
_MARKUP = re.compile(r"""[^\w\s.,;/+=?'"-]|(?<!\w)_|_(?!\w)|(?<=_)_|^\W|^\d+\.(?=\s)|www\.""", re.IGNORECASE)


class AdapterConfig(Protocol):
    """The fields of `SDPTConfig` that a card needs. Importing the class would be circular."""

    base_model_name_or_path: str | None
    revision: str | None
    auto_mapping: dict[str, Any] | None
    num_virtual_tokens: int
    prompt_mode: str
    fusion_layers: dict[str, int] | None
    fusion_gates: dict[str, list[int]] | None
    modules_to_save: Any
    lora_rank: int | None
    lora_layers: dict[str, list[int]] | None
    peft_sdpt_version: str | None
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def lora_scaling(self) -> float: ...

    @property
    def default_prompt_space(self) -> str: ...

    def parameter_shapes(self) -> dict[str, tuple[int, ...]] | None: ...


def plain(text: object) -> str:
    """Return a name or a value as Markdown for a card, which shows it as it is.

    Letters that could become markup, HTML or a link, or end a line, a cell or a comment, are written as numeric
    entities.

    Args:
        text: Any text, or a value to convert to text. It becomes one line of at most 200 letters.

    Example:
        >>> plain("user/my_model"), plain("<b> | c"), plain("www.a.b"), plain("1. cat")
        ('user/my_model', '&#60;b&#62; &#124; c', 'www&#46;a.b', '1&#46; cat')
    """
    return _MARKUP.sub(lambda match: f"{match[0][:-1]}&#{ord(match[0][-1])};", printable(str(text), MAX_SHOWN))


def code(text: object) -> str:
    """Return a name or a value as Markdown for a card, which shows it as code. See `plain`.

    Example:
        >>> code("red apple"), code("a|b")
        ('`red apple`', '<code>a&#124;b</code>')
    """
    line = printable(str(text), MAX_SHOWN)
    # Entities do not work between backticks.
    return f"`{line}`" if re.fullmatch(r"[\w.,:;/+='-][\w\s.,:;/+='-]*", line) else f"<code>{plain(line)}</code>"


def literal(text: str) -> str:
    """Return a text as a Python string for code in a card. The text cannot end the string, the line or the code.

    Example:
        >>> print(literal('a"); print("b'), literal("user/adapter"))
        "a\\u0022); print(\\u0022b" "user/adapter"
    """
    safe = (letter if letter.isprintable() and letter not in '"\\<>`&' else _escape(letter) for letter in text)
    return f'"{"".join(safe)}"'


def _escape(letter: str) -> str:
    number = ord(letter)
    return f"\\u{number:04x}" if number < 2**16 else f"\\U{number:08x}"


def complete_card(folder: str | os.PathLike, saved_config: PeftConfig) -> None:
    """Complete the model card in a folder, if it is a card of PEFT or an empty form. Other files are left alone.

    The metadata gets the library, the pipeline, the tags, and the base model if it is on the Hub. An existing `license`
    is kept. No licence is added here; see `write_licence`. An empty form is replaced by our text. A text that somebody
    wrote is kept, and our section is added after it, or replaced in its place.

    Args:
        folder: Folder of the saved adapter.
        saved_config: Config of the adapter, an `SDPTConfig`.
    """
    file = Path(folder) / CARD
    if not file.is_file():
        return
    try:
        card = _completed(file, cast(AdapterConfig, saved_config))
        content = None if card is None else str(card)
    except Exception as error:  # any metadata is possible; this is only a warning, because the adapter itself is saved
        warnings.warn(
            f"{file}: not completed, because it cannot be read as a model card ({reason(error)}).", stacklevel=3
        )
        return
    if content is not None:
        file.write_text(content, encoding="utf-8", newline="")


def _completed(file: Path, config: AdapterConfig) -> ModelCard | None:
    """Return a completed card. None if the file is neither a card of PEFT nor an empty form."""
    if not re.match(r"\s*---\s*\n", _read(file)):
        return None
    card = _load(file)
    # `ModelCard.data` is declared as the class for all kinds of cards, of which this is a subclass.
    data = cast(ModelCardData, card.data)
    unfilled = _is_unfilled(card.text)
    if not unfilled and data.library_name != "peft":
        return None

    base_model = _hub_id(config.base_model_name_or_path)
    data.library_name = "peft"
    tags = {tag for tag in data.tags or () if not tag.startswith(_BASE_MODEL_TAG)} | set(TAGS)
    if _auto_class(config) == _DETECTOR:
        data.pipeline_tag = data.pipeline_tag or PIPELINE_TAG
        tags.add(DETECTION_TAG)
    data.tags = sorted(tags | ({_BASE_MODEL_TAG + base_model} if base_model else set()))
    if base_model:
        data.base_model = base_model
    elif isinstance(data.base_model, str) and not _hub_id(data.base_model):
        data.base_model = None  # the Hub rejects a path

    text = f"# SDPT adapter for {plain(_name(config))}\n" if unfilled else _without_versions_of_peft(card.text)
    card.text = "\n" + with_section(text, "adapter", _describe(config, base_model))
    return card


def _read(file: Path) -> str:
    """Return the text of a card. Raise a `ValueError` if the card or its metadata is too long."""
    if file.stat().st_size > MAX_CARD:
        raise ValueError(f"it has more than {MAX_CARD:,} bytes")
    content = file.read_text(encoding="utf-8-sig")
    start = content.find("---")
    if start >= 0 and content.find("\n---", start) - start > MAX_METADATA:
        raise ValueError(f"its metadata has more than {MAX_METADATA:,} letters")
    return content


def _load(file: Path) -> ModelCard:
    """Return a card. Raise an error of any class if its metadata has other types than PEFT and the Hub expect."""
    card = ModelCard(_read(file), ignore_metadata_errors=True)
    tags = card.data.get("tags")
    if not (tags is None or (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags))):
        raise ValueError("its tags are not a list of texts")
    return card


def with_section(text: str, name: str, body: str | None) -> str:
    """Write one of our sections into the text of a model card.

    Args:
        text: Text of the card, with or without its metadata.
        name: Name of the section.
        body: Text of the section. None removes it.

    Returns:
        The text with the section, in its old place or at the end.

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
    # Other versions may word the rest of the comment differently, and somebody may have edited it.
    start = text.find(f"<!-- {name}: begin")
    opened = text.find("-->", start) if start >= 0 else -1
    before, after = text, ""
    if opened >= 0:
        closed = text.find(end, opened)
        before, after = text[:start], text[opened + len("-->") if closed < 0 else closed + len(end) :]
    parts = [before, *([f"{begin}\n\n{body.strip()}\n\n{end}"] if body is not None else []), after]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def carry_card(folder: Path, other: Path) -> None:
    """Copy the model card of a folder to another folder, if it exists and can be read. PEFT then completes it there."""
    with contextlib.suppress(Exception):  # any metadata is possible
        _load(folder / CARD)
        shutil.copyfile(folder / CARD, other / CARD)


def write_section(card: Path, name: str, body: str | None) -> None:
    """Write a section into a model card. None removes it. See `with_section`."""
    card.write_text(with_section(card.read_text(encoding="utf-8"), name, body), encoding="utf-8")


def licence_of(source: str | os.PathLike, base_model: str | None = None) -> dict[str, str]:
    """Find the licence in the model card of a folder, or of a repository on the Hub.

    Args:
        source: A folder or a Hub id.
        base_model: The base model that the card must name. None for any card.

    Returns:
        A dict with `license`. For a licence that the Hub does not know, it also has `license_name` and `license_link`.
        It is empty if there is no card, the card names no licence, or the Hub cannot be reached.
    """
    try:
        file = Path(source) / CARD if Path(source).is_dir() else hf_hub_download(str(source), CARD)
        metadata = _load(Path(file)).data.to_dict()
    except Exception:  # `huggingface_hub` and its HTTP client raise many kinds of errors, and any metadata is possible
        return {}
    if base_model is not None and (metadata.get("base_model") or None) != _hub_id(base_model):
        return {}
    licence = {name: metadata.get(name) for name in LICENCE_FIELDS}
    return {name: value for name, value in licence.items() if isinstance(value, str) and _is_name(value)}


def _is_name(text: str) -> bool:
    """Return whether a text can be a name in metadata: one line of at most 200 letters."""
    return text.isprintable() and len(text) <= MAX_SHOWN


def write_licence(card: Path, licence: Mapping[str, str]) -> None:
    """Write a licence into the metadata of a model card.

    Args:
        card: Path of the card.
        licence: A result of `licence_of`. If it is empty, the card stays as it is.
    """
    if not licence:
        return
    content = _load(card)
    for name in LICENCE_FIELDS:
        setattr(content.data, name, licence.get(name))
    content.save(card)


def _name(config: AdapterConfig) -> str:
    """Return a name of the base model: its Hub id, or only the last part of its path, to keep the path private."""
    name = config.base_model_name_or_path or ""
    return _hub_id(name) or Path(name).name or "the base model"


def _hub_id(name: str | None) -> str | None:
    """Return the name if it can be a Hub id and is not a local path, else None."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and _is_name(name) and not os.path.exists(name) else None


def _size_of(config: AdapterConfig, *endings: str) -> int:
    """Return the number of parameters whose names have one of these endings."""
    shapes = config.parameter_shapes() or {}
    return sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(endings))


def _describe(config: AdapterConfig, base_model: str | None) -> str:
    """Return the section that describes an adapter.

    Args:
        config: Config of the adapter.
        base_model: Hub id of the base model, or None.
    """
    link = f"[{plain(base_model)}](https://huggingface.co/{base_model})" if base_model else code(_name(config))
    what = "Tokens" if config.lora_rank is None else "Tokens and LoRA matrices"
    lines = [
        f"{what} for [SDPT, Synchronous Dual Prompt Tuning]({_PAPER}), a tuner that the package `peft_sdpt` adds to "
        f"PEFT. They were trained on the base model {link}. Its weights are not part of this repository.",
        "",
        "| | |",
        "|---|---|",
    ]
    widths = list((config.fusion_layers or {}).values())
    tokens = f"{config.num_virtual_tokens} per layer" + (" and modality" if config.prompt_mode == "independent" else "")
    if widths:
        size = counted(_size_of(config, ".sdpt_prompts", ".sdpt_gates"), "parameter")
        wide = " or ".join(f"{width}" for width in sorted(set(widths)))
        lines += [
            f"| tokens | {tokens}, {size} in total{' with the gates' if config.fusion_gates else ''} |",
            f"| fusion layers | {len(widths)}, with tokens of width {wide}; `fusion_layers` in `adapter_config.json` "
            "lists them |",
        ]
    else:
        lines += [f"| tokens | {tokens} |"]
    defaults = {each.name: each.default for each in dataclasses.fields(config)}
    defaults["prompt_space"] = config.default_prompt_space
    for name in ("prompt_gate", "prompt_groups", "prompt_mode", "prompt_space", "image_attends_prompts", "pinv_rtol"):
        if (value := getattr(config, name)) != defaults[name]:
            lines.append(f"| `{name}` | {plain(value)} |")
    if config.lora_rank is not None:
        size = counted(_size_of(config, ".sdpt_lora_A", ".sdpt_lora_B"), "parameter")
        layers = counted(len(config.lora_layers or {}), "linear layer")
        lines.append(
            f"| LoRA | rank {config.lora_rank}, scaled by {config.lora_scaling:g}, on {layers}, {size} in total; "
            "`lora_layers` in `adapter_config.json` lists them |"
        )
    if config.modules_to_save:
        lines.append(f"| fully trained modules | {', '.join(map(code, config.modules_to_save))} |")
    revision = f", revision={literal(str(config.revision))}" if config.revision else ""
    auto_class = _auto_class(config)
    lines += [
        "",
        "## How to load it",
        "",
        "```python",
        "import peft_sdpt  # first; without it, PEFT raises KeyError: 'SDPT'",
        "from peft import PeftModel",
        *([f"from transformers import {auto_class}"] if auto_class else []),
        "",
        f"base_model = {auto_class}.from_pretrained({literal(base_model or f'path/to/{_name(config)}')}{revision})"
        if auto_class
        else "base_model = ...  # the model that these tokens belong to, built by its own code",
        'model = PeftModel.from_pretrained(base_model, "user/repository")  # this repository, or a folder',
        "```",
        "",
        *(
            []
            if auto_class
            else [
                "If `peft_sdpt` does not know the fusion layers of the base model, register a spec for them by "
                "`peft_sdpt.register_host`, in each process that loads this adapter.",
                "",
            ]
        ),
        _VERSIONS,
        "",
        f"- PEFT {peft.__version__}",
        f"- peft_sdpt {plain(config.peft_sdpt_version)}",
    ]
    return "\n".join(lines)


def _auto_class(config: AdapterConfig) -> str | None:
    """Return the class of transformers that loads the base model. None for other libraries, or if it is not known."""
    known = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    library, name = str(known.get("parent_library")), str(known.get("base_model_class"))
    if not library.startswith("transformers.") or not name.isidentifier() or keyword.iskeyword(name):
        return None
    return _DETECTOR if name in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES.values() else name


def _is_unfilled(text: str) -> bool:
    """Return whether a text is the empty form that PEFT and transformers save with this version of huggingface_hub."""
    return {line.strip() for line in text.splitlines()} <= _form() | {_VERSIONS, f"- PEFT {peft.__version__}"}


@functools.cache
def _form() -> frozenset[str]:
    """Return all lines of the empty forms."""
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    forms = (ModelCard.from_template(ModelCardData(), model_description=text).text for text in ("", description))
    return frozenset(line.strip() for form in forms for line in form.splitlines())


def _without_versions_of_peft(text: str) -> str:
    """Remove the version that PEFT adds at the end of the text. Our section has it."""
    before, heading, after = text.rpartition(_VERSIONS)
    if heading and after.strip() and all(re.fullmatch(r"(- PEFT \S+)?", line) for line in after.splitlines()):
        text = before
    return text.rstrip("\n") + "\n"
