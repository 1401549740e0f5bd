# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Tune a grounded detector with SDPT, and measure its AP before and after.

    accelerate launch examples/train_detection.py

Without flags, the script uses the small base model in `examples/host` and the built-in task "twemoji": pictograms with
known names, in a drawing style that the base model has never seen. The script measures COCO AP of the base model,
trains, measures again, and saves the adapter, `metrics.json`, `report.png` and `detections.png` in the output folder.
"Before" is always the base model without an adapter.

With your own photos and boxes:

    accelerate launch examples/train_detection.py --model_name_or_path IDEA-Research/grounding-dino-tiny \\
        --dataset_name path/to/folder --output_dir my-adapter

The script only sets the base model and the built-in tasks. The training is in `peft_sdpt/commands/train.py`, which is
installed as `sdpt-train`.
"""

from __future__ import annotations

import functools
from pathlib import Path

from peft_sdpt.commands import train
from pictograms.tasks import TASKS, write_task

HOST = Path(__file__).resolve().parent / "host"


def main() -> None:
    train.main(
        __doc__,
        program="train_detection.py",
        model_name_or_path=str(HOST),
        dataset_name="twemoji",
        tasks={name: functools.partial(write_task, name) for name in TASKS},
    )


if __name__ == "__main__":
    main()
