# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The base models that `peft_sdpt.detection` can train."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoConfig, GroundingDinoConfig, MMGroundingDinoConfig

from ..errors import InputError

# LLMDet has the config of MM Grounding DINO.
TRAINED = (GroundingDinoConfig, MMGroundingDinoConfig)


def load_base_config(model_name_or_path: str | os.PathLike) -> GroundingDinoConfig | MMGroundingDinoConfig:
    """Load the config of a base model, and check that `GroundedDetectionLoss` can train the model.

    It can train Grounding DINO, MM Grounding DINO and LLMDet of transformers. Other base models of SDPT have other
    inputs and need another loss. No weights are loaded, so call this function before any slow preparation.

    Args:
        model_name_or_path: Folder or Hub id of the base model.

    Returns:
        The config.

    Raises:
        InputError: The config cannot be loaded, the model is of another kind, or the folder holds an adapter.
    """
    refuse_adapter_folder(model_name_or_path)
    name = str(model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(model_name_or_path)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"model_name_or_path={name!r}: cannot be loaded as a detector ({error}).") from None
    if not isinstance(config, TRAINED):
        raise InputError(
            f"model_name_or_path={name!r}: must be a Grounding DINO, MM Grounding DINO or LLMDet of transformers, but "
            f"its type is {config.model_type!r}; other base models need a training loop of your own."
        )
    return config


def refuse_adapter_folder(model_name_or_path: str | os.PathLike) -> None:
    """Raise an error if the folder of an adapter is given as a base model. transformers would load both together."""
    if (Path(model_name_or_path) / "adapter_config.json").is_file():
        raise InputError(
            f"model_name_or_path={str(model_name_or_path)!r}: is the folder of an adapter; give its base model here, "
            "and load the adapter onto it."
        )
