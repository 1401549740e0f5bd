# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The commands `sdpt-train` and `sdpt-detect`. The scripts in `examples/` run them with a small base model."""

from ..errors import one_line_errors


def sdpt_train() -> None:
    """Run the installed command `sdpt-train`. Without the extra `detection`, it ends with one line."""
    with one_line_errors("sdpt-train"):
        from .train import main
    main()


def sdpt_detect() -> None:
    """Run the installed command `sdpt-detect`. Without the extra `detection`, it ends with one line."""
    with one_line_errors("sdpt-detect"):
        from .detect import main
    main()
