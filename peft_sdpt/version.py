# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The version of the package; `setup.cfg` reads it from here."""

__version__ = "0.1.0"
