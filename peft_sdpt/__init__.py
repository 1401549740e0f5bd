# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""SDPT, synchronous dual prompt tuning (arXiv 2407.11414), as a tuner of PEFT.

Importing the package registers the tuner type `SDPT`; nothing else is needed.
"""

import functools
import os
from typing import Any

from aenum import extend_enum
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from .config import SDPTConfig
from .hosts import register_host
from .layer import SDPTLayer
from .model import SDPTModel
from .prototypes import initialize_sdpt_prototypes
from .version import __version__

__all__ = ["SDPTConfig", "SDPTLayer", "SDPTModel", "initialize_sdpt_prototypes", "register_host"]


def _register() -> None:
    """Make `PeftType["SDPT"]` known to PEFT, once in a process.

    Raises:
        ImportError: PEFT, or another package, already has a method of this name.
    """
    if "SDPT" not in PeftType.__members__:
        extend_enum(PeftType, "SDPT", "SDPT")
    registered = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType["SDPT"])
    if registered is None:
        register_peft_method(name="sdpt", config_cls=SDPTConfig, model_cls=SDPTModel)
    elif registered.__module__ != SDPTModel.__module__:
        raise ImportError(
            f"PEFT already has a method SDPT, {registered.__module__}.{registered.__qualname__}, and "
            f"{__name__} {__version__} cannot register its own beside it. Use that one, or a version "
            "of PEFT without it."
        )
    else:
        # The package was imported again after its modules were dropped, so the new classes are used.
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType["SDPT"]] = SDPTConfig
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType["SDPT"]] = SDPTModel


def _check_what_transformers_loads() -> None:
    """Let `PeftConfig.from_pretrained` check the weights beside a config, as `SDPTConfig.from_pretrained` does.

    PEFT calls the method of `SDPTConfig`. `load_adapter` of a transformers model calls the method of `PeftConfig`, and
    then writes any tensor of the adapter into the base model (transformers 5.24). Loading the config is the last step
    before this in which code of this package can run.
    """
    config_class: Any = PeftConfig
    original = config_class.from_pretrained.__func__
    if hasattr(original, "checks_sdpt"):
        return

    @functools.wraps(original)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        config = original(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        # Not `isinstance`, because the package may have been imported again, with another class of this name.
        if hasattr(config, "check_weights_beside") and not hasattr(cls, "check_weights_beside"):
            path, (download, _, _) = os.fspath(pretrained_model_name_or_path), PeftConfig._split_kwargs(kwargs)
            config.check_weights_beside(path, subfolder, **download)
        return config

    config_class.from_pretrained = classmethod(from_pretrained)
    config_class.from_pretrained.__func__.checks_sdpt = True  # do not wrap it twice


_register()
_check_what_transformers_loads()
