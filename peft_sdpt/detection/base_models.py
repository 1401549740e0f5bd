# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The base models that `peft_sdpt.detection` can train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, GroundingDinoConfig, MMGroundingDinoConfig
from transformers.utils.peft_utils import find_adapter_config_file

from ..downloads import DamagedFileError, check_cache
from ..errors import InputError, reason
from ..wording import quoted

# LLMDet has the config of MM Grounding DINO.
TRAINED = (GroundingDinoConfig, MMGroundingDinoConfig)
# Largest number of layers, and largest other number in a config. Both are far above those of any detector. transformers
# builds all layers of a config before it reads the weights.
MAX_LAYERS, MAX_NUMBER = 1000, 10**7


def load_base_config(model_name_or_path: str | os.PathLike) -> GroundingDinoConfig | MMGroundingDinoConfig:
    """Load the config of a base model, and check that `GroundedDetectionLoss` can train the model.

    It can train Grounding DINO, MM Grounding DINO and LLMDet of transformers. Other base models of SDPT have other
    inputs and need another loss. No weights are loaded, so call this function before any slow preparation.

    Args:
        model_name_or_path: Folder or Hub id of the base model.

    Returns:
        The config.

    Raises:
        InputError: The config cannot be loaded, the model is of another kind, a number in the config is out of range,
            or it is an adapter. Code of a repository is never run.
    """
    refuse_adapter_folder(model_name_or_path)
    name = _quoted(model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
        numbers = [*_numbers(config.to_dict())]
    except Exception as error:  # a damaged file can raise anything
        raise not_a_detector(model_name_or_path, error) from None
    if not isinstance(config, TRAINED):
        raise InputError(
            f"model_name_or_path={name}: must be a Grounding DINO, MM Grounding DINO or LLMDet of transformers, but "
            f"its type is {quoted(config.model_type)}; other base models need a training loop of your own."
        )
    for field, number in numbers:
        most = MAX_LAYERS if "layers" in field or field == "depths" else MAX_NUMBER
        if number > most:
            raise InputError(
                f"model_name_or_path={name}: {quoted(field)} in its config must be at most {most:,}, got "
                f"{quoted(number)}."
            )
    return config


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the whole numbers in a config, each with the name of its field."""
    if type(value) is int:
        yield name, value
    elif isinstance(value, dict):
        for inner_name, inner in value.items():
            yield from _numbers(inner, str(inner_name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, name)


def not_a_detector(model_name_or_path: str | os.PathLike, error: Exception) -> InputError:
    """Return the error for a base model that transformers cannot load, with the reason.

    Damaged files are removed from the cache of the Hub, so that the next try downloads them again.
    """
    if not os.path.isdir(model_name_or_path):
        try:
            check_cache(os.fspath(model_name_or_path))
        except DamagedFileError as damage:
            error = damage
    name = _quoted(model_name_or_path)
    return InputError(f"model_name_or_path={name}: cannot be loaded as a detector ({reason(error)}).")


def _quoted(model_name_or_path: str | os.PathLike) -> str:
    return quoted(os.fspath(model_name_or_path), 300)


def refuse_adapter_folder(model_name_or_path: str | os.PathLike) -> None:
    """Raise an error if an adapter is given as a base model. transformers would load both together.

    Args:
        model_name_or_path: A folder or a Hub id.

    Raises:
        InputError: It is an adapter. A folder or repository that cannot be read raises no error here.
    """
    try:
        adapter = find_adapter_config_file(os.fspath(model_name_or_path))
    except Exception:  # transformers raises the same error when it loads the config
        return
    if adapter:
        what = "folder" if os.path.isdir(model_name_or_path) else "repository"
        raise InputError(
            f"model_name_or_path={_quoted(model_name_or_path)}: is the {what} of an adapter; give its base model here, "
            "and load the adapter onto it."
        )
