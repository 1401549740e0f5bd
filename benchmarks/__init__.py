# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measurements, from the root of the repository: `python -m benchmarks.speed` and `python -m benchmarks.transfer`."""

import sys
from pathlib import Path

# Data, training samples and metrics are those of the examples, whose modules are beside one another.
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
