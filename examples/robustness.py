# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measure how robust a detector is: AP under attacks, common corruptions, and purifiers.

    python examples/robustness.py --adapter my-adapter

The script writes `robustness.json` after each part, and at the end a table, `robustness.md`, and a picture,
`robustness.png`. The same command goes on where an earlier one stopped: parts with the same settings are not measured
again. docs/robustness.md explains the table.

Without flags, the small base model in `examples/host` is measured on the built-in task "twemoji". The rest of the code
is in `peft_sdpt/commands/robustness.py`, which is installed as `sdpt-robustness`.
"""

from __future__ import annotations

import functools
from pathlib import Path

from peft_sdpt.commands import robustness
from pictograms.tasks import TASKS, write_task

HOST = Path(__file__).resolve().parent / "host"


def main() -> None:
    robustness.main(
        __doc__,
        program="robustness.py",
        model_name_or_path=str(HOST),
        dataset_name="twemoji",
        tasks={name: functools.partial(write_task, name) for name in TASKS},
    )


if __name__ == "__main__":
    main()
