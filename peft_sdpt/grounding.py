# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Former place of `peft_sdpt.detection.grounding`, for code that imports it from here."""

import warnings

from .detection.grounding import *  # noqa: F403

warnings.warn("Import from peft_sdpt.detection; peft_sdpt.grounding is removed in 0.2.", FutureWarning, stacklevel=2)
