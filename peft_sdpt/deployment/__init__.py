# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Takes a tuned detector out of PEFT: a plain PyTorch model, an exported program, and ONNX."""

from .baking import BakedFusionLayer, bake
from .program import SavedProgram, export_program

__all__ = ["BakedFusionLayer", "SavedProgram", "bake", "export_program"]
