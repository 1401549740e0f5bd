# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Export a detector for fixed classes as one file: ONNX, which runs without PyTorch, or a program of PyTorch.

    python examples/export_onnx.py --adapter my-adapter --output detector.onnx
    python examples/export_onnx.py --class_names "red apple" pear --output detector.pt2

The file has the base model, the adapter, and the text of the classes. Its metadata tell how images are prepared. The
script runs the file and prints by how much it differs from the model.

Without an adapter, the small base model in `examples/host` is exported. The rest of the code is in
`peft_sdpt/deployment/` and `peft_sdpt/commands/export.py`, which is installed as `sdpt-export`.
"""

from __future__ import annotations

from pathlib import Path

from peft_sdpt.commands import export

HOST = Path(__file__).resolve().parent / "host"


def main() -> None:
    export.main(__doc__, program="export_onnx.py", model_name_or_path=str(HOST))


if __name__ == "__main__":
    main()
