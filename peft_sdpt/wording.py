# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers and names in messages and model cards."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from typing import Any

# LVIS has 1203 classes, and a folder can have any number of files.
MAX_LISTED = 10
# Largest number of letters of a value that a message quotes.
MAX_QUOTED = 80
# The same for a path.
MAX_PATH_SHOWN = 300


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


def is_control(letter: str) -> bool:
    """Return whether a letter is a control character, or half of a surrogate pair.

    Joiners are neither, because Persian words and emoji need them.
    """
    return unicodedata.category(letter) in ("Cc", "Cs")


def printable(text: str, length: int | None = None) -> str:
    """Return a text as one line that can be printed anywhere.

    Line breaks and other white space become single spaces. Control characters, and code points that are not characters,
    such as halves of surrogate pairs, are replaced by their escapes.

    Args:
        text: Any text.
        length: Largest number of letters. None keeps all.

    Example:
        >>> printable("a\\n b\\x1b[31m\\ud800")
        'a b\\\\x1b[31m\\\\ud800'
    """
    # With a limit, a very long text takes little time.
    line = " ".join(text.split() if length is None else text.split(maxsplit=length)[: length + 1])
    line = line if length is None else line[: length + 1]
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    return line if length is None else shorten(line, length)


def shown_path(path: str | os.PathLike) -> str:
    """Return a path as one line of at most 300 letters, for a message. The name of a file can have any bytes.

    Example:
        >>> shown_path("photos/a\\nb.jpg")
        'photos/a b.jpg'
    """
    return printable(os.fspath(path), MAX_PATH_SHOWN)


def quoted(value: Any, length: int = MAX_QUOTED) -> str:
    """Return the `repr` of a value on one line of limited length, for a message that quotes the value.

    Args:
        value: Any value.
        length: Largest number of letters.

    Example:
        >>> quoted("abc" * 1000, 12), quoted([1, 2])
        ("'abcabcabca…", '[1, 2]')
    """
    if isinstance(value, str | bytes | list | tuple):
        value = value[: length + 1]
    try:
        text = repr(value)
    except Exception:  # for instance a number of 5,000 digits, or deeply nested lists
        text = f"a value of type {type(value).__name__} that cannot be written"
    return printable(text, length)
