# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Detect objects in your images with the adapters that `train_detection.py` saved.

    python examples/detect.py photo.jpg --adapter my-adapter
    python examples/detect.py folder/of/photos --adapter my-adapter user/other-adapter --threshold 0.4
    python examples/detect.py camera/ --adapter my-adapter --watch

The script writes each image with its boxes drawn, under the name of the image, and `detections.json`, a COCO file whose
annotations have a `score`. Folders are searched with their subfolders, and the results have the same subfolders.
Several adapters are loaded on one base model. Each adapter detects in every image, and has its own folder of results.
Photos with an EXIF orientation are turned upright first, and the boxes are in pixels of the upright image.

Without an adapter, the small base model in `examples/host` detects. The rest of the code is in
`peft_sdpt/commands/detect.py`, which is installed as `sdpt-detect`.
"""

from __future__ import annotations

from pathlib import Path

from peft_sdpt.commands import detect

HOST = Path(__file__).resolve().parent / "host"


def main() -> None:
    detect.main(__doc__, program="detect.py", model_name_or_path=str(HOST))


if __name__ == "__main__":
    main()
