# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The commands `sdpt-train` and `sdpt-detect`. The scripts in `examples/` run them with a small base model."""
