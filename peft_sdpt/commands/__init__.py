# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The commands `sdpt-train`, `sdpt-detect`, `sdpt-export` and `sdpt-robustness`.

The scripts in `examples/` run them with a small base model.
"""

import io
import sys

from ..errors import one_line_errors


def print_any_name() -> None:
    """Let `print` write escapes instead of raising an error, for characters that the encoding of stdout does not have.

    On Linux, the name of a file can have any bytes. With `LANG=C`, stdout can only show ASCII.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


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


def sdpt_export() -> None:
    """Run the installed command `sdpt-export`. Without the extra `detection`, it ends with one line."""
    with one_line_errors("sdpt-export"):
        from .export import main
    main()


def sdpt_robustness() -> None:
    """Run the installed command `sdpt-robustness`. Without the extra `detection`, it ends with one line."""
    with one_line_errors("sdpt-robustness"):
        from .robustness import main
    main()
