# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Saved adapters, from a folder or the Hub, with what was saved beside them: class names and a processor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from peft import PeftConfig
from transformers import AutoProcessor

from errors import InputError
from peft_sdpt import SDPTConfig

HERE = Path(__file__).resolve().parent


@dataclass
class Adapter:
    """A saved adapter: as it was asked for, its name, where its files are, and the host it was trained on."""

    asked: str
    name: str
    folder: Path
    host: str | None


def find_adapter(asked: str) -> Adapter:
    """Find an adapter from `path`, `hub/id` or `name=` either; nothing of the Hub but small files is fetched.

    Raises:
        InputError: it is not there, not of SDPT, or has no name that a folder could have.
    """
    name, equals, where = asked.partition("=")
    if not equals or Path(asked).is_dir():
        name, where = "", asked
    folder = Path(where)
    if not folder.is_dir():
        try:
            # At once and first, so that a local folder and the Hub are the same to all that follows.
            patterns = ["*.json", "*.txt", "adapter_model.safetensors"]
            folder = Path(snapshot_download(where, allow_patterns=patterns, ignore_patterns="*/*"))
        except Exception as error:  # `huggingface_hub` raises many kinds for one cause: it is not there
            raise InputError(f"--adapter {asked}: no such folder, and the Hub has none ({error}).") from None
    name = name or Path(where).resolve().name
    if name in ("", "..") or Path(name).name != name:
        raise InputError(f"--adapter {asked}: {name!r} cannot name a folder of results; write name=path.")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise InputError(f"--adapter {asked}: no saved adapter, {folder} has no {file}.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever a damaged file brings up
        raise InputError(f"--adapter {asked}: adapter_config.json cannot be read ({error!r}).") from None
    if not isinstance(config, SDPTConfig):
        raise InputError(f"--adapter {asked}: no SDPT adapter, its config is a {type(config).__name__}.")
    return Adapter(asked, name, folder, config.base_model_name_or_path)


def find_adapters(asked: list[str]) -> list[Adapter]:
    """Find all adapters.

    Raises:
        InputError: one cannot be used, or two have one name.
    """
    adapters = [find_adapter(text) for text in asked]
    named: dict[str, Adapter] = {}
    for adapter in adapters:
        # Some file systems take capitals for small letters.
        other = named.setdefault(adapter.name.casefold(), adapter)
        if other is not adapter:
            raise InputError(
                f"--adapter {other.asked} {adapter.asked}: both are called {adapter.name}; write name=path."
            )
    return adapters


def find_host(adapters: list[Adapter]) -> str:
    """The host that all adapters were trained on; without any, the one that ships.

    Raises:
        InputError: they name different ones, or none.
    """
    if not adapters:
        return str(HERE / "host")
    hosts = {}
    for adapter in adapters:
        if not adapter.host:
            raise InputError(f"--adapter {adapter.asked}: does not name its host; give --model_name_or_path.")
        hosts[str(Path(adapter.host).resolve()) if Path(adapter.host).is_dir() else adapter.host] = adapter
    if len(hosts) > 1:
        named = "; ".join(f"{adapter.name}: {host}" for host, adapter in hosts.items())
        raise InputError(f"--adapter: they were trained on different hosts ({named}); give --model_name_or_path.")
    return next(iter(hosts))


def read_class_names(adapter: Adapter | None) -> list[str]:
    """The classes that an adapter was trained on.

    Raises:
        InputError: they are not beside it, or there is no adapter.
    """
    if adapter is None:
        raise InputError("no class names: give --class_names, or an --adapter that was saved with its own.")
    file = adapter.folder / "class_names.json"
    if not file.is_file():
        raise InputError(f"--adapter {adapter.asked}: no class names, it has no {file.name}; give --class_names.")
    try:
        class_names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not JSON ({error}).") from None
    if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
        raise InputError(f"{file}: must be a list of names.")
    return class_names


def set_picture_size(processor, shorter_side: int) -> None:
    """Have the processor of a detector bring pictures to a shorter side of so many pixels."""
    # 800 by 1333 is the ratio that detectors are trained with.
    longest = round(shorter_side * 1333 / 800)
    processor.image_processor.size = {"shortest_edge": shorter_side, "longest_edge": longest}


def load_processor(adapter: Adapter | None, host: str):
    """The processor that an adapter was saved with, because pictures should be as large as in training; or the host's.

    Raises:
        InputError: there is none that loads.
    """
    own = adapter and any((adapter.folder / f"{name}_config.json").is_file() for name in ("preprocessor", "processor"))
    source = str(adapter.folder) if own else host
    where = f"--adapter {adapter.asked}" if own else f"--model_name_or_path {host}"
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: no processor to load ({error}).") from None
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise InputError(f"{where}: the processor must have both a tokenizer and an image processor.")
    return processor
