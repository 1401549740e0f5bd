# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""How the examples fail: one line that says what is wrong, and an exit code, instead of a traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """The user's input cannot be used; the message says what, where and why."""


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the program with one line on stderr: exit code 2 for an `InputError`, 130 when it is interrupted."""
    try:
        yield
    except InputError as error:
        # A worker of a DataLoader passes its error on with a traceback as its message; causes run over many lines.
        message = str(error).rpartition("InputError: ")[2]
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"{program}: {str(interrupt) or 'interrupted.'}", file=sys.stderr)
        sys.exit(130)
