# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Takes a tuned detector out of PEFT: a plain PyTorch model, an exported program, and ONNX."""

from .baking import BakedFusionLayer, bake
from .exporting import ExportedDetector
from .onnx import export_onnx
from .program import export_program

__all__ = ["BakedFusionLayer", "ExportedDetector", "bake", "export_onnx", "export_program"]
