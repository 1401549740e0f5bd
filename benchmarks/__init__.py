# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Benchmarks, to run from the root of the repository.

python -m benchmarks.gpu_check
python -m benchmarks.speed
python -m benchmarks.transfer
python -m benchmarks.serving
"""

from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
