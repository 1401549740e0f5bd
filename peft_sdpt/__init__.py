# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""SDPT, synchronous dual prompt tuning (arXiv 2407.11414), as a tuner of PEFT.

Importing the package registers the tuner type `SDPT`; nothing else is needed.
"""

from aenum import extend_enum
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


_register()
