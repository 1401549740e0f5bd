# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers and names in messages and model cards."""

from __future__ import annotations

from collections.abc import Iterable

# LVIS has 1203 classes, and a folder can have any number of files.
MAX_LISTED = 10


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Write a number with its noun.

    Args:
        number: The number.
        singular: The noun for one.
        plural: The noun for any other number. None adds an "s".

    Example:
        >>> counted(1, "class", "classes"), counted(2000, "image")
        ('1 class', '2,000 images')
    """
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def enumerated(names: Iterable[str]) -> str:
    """List the first ten names, and say how many more there are.

    Example:
        >>> enumerated("abcdefghijklm")
        'a, b, c, d, e, f, g, h, i, j and 3 more'
    """
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def shorten(text: str, length: int) -> str:
    """Cut a text to a length, with an ellipsis in place of its end.

    Args:
        text: The text.
        length: Largest number of letters, at least 1.

    Example:
        >>> shorten("a cell with a nucleus", 10), shorten("cell", 10)
        ('a cell wi…', 'cell')
    """
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
