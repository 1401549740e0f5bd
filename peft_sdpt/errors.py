# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The error for arguments, files and data that cannot be used, and how a command prints it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator, Mapping

from .wording import printable

# Largest number of letters of the one line. Messages of other libraries can quote values of any length.
MAX_MESSAGE = 2000
# Largest number of letters of an error of another library in a message of this package.
MAX_REASON = 400
# A full disk, a limit on the size of files, and a quota. Windows has no quota.
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
# The wording of these errors in Python and Arrow ("errno"), Rust ("os error") and C++ (the text).
_SAYS_FULL = re.compile(
    rf"\b(?:errno|os error) (?:{'|'.join(map(str, _FULL))})\b|{re.escape(os.strerror(errno.ENOSPC))}", re.IGNORECASE
)


class InputError(ValueError):
    """An argument, a file or a data set cannot be used.

    The message names the argument, its value and the rule. It writes an argument as in Python (`split='train'`), so
    that `one_line_errors` can show it as a flag of a command.
    """


class MissingExtraError(ImportError):
    """A package of an extra is not installed. The message names the package and the extra."""


@contextlib.contextmanager
def one_line_errors(program: str, flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """End a program with one line on stderr instead of a traceback.

    The exit code is 2 for an `InputError`, a `MissingExtraError` and a full disk, and 130 for Ctrl-C. Any other
    exception passes through.

    Args:
        program: Name of the program, which starts the line.
        flags: Maps arguments of the library to flags without dashes, as in `with_flags`.
    """
    try:
        yield
    except (InputError, MissingExtraError) as error:
        # An error from a DataLoader worker has a traceback in front of its message.
        message = str(error).rpartition("InputError: ")[2]
        print(f"{program}: {printable(with_flags(message, flags or {}), MAX_MESSAGE)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"{program}: {str(interrupt) or 'interrupted.'}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Trackers, `datasets` and other libraries also write files.
        if not is_full_disk(error):
            raise
        print(f"{program}: a file cannot be written ({printable(str(error), MAX_MESSAGE)}).", file=sys.stderr)
        sys.exit(2)


def is_full_disk(error: BaseException | None) -> bool:
    """Return whether an exception, or one that caused it, comes from a full disk, a quota or a limit on file sizes.

    Args:
        error: An exception of any class. Libraries in other languages raise their own classes, so the message is
            searched too.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) in _FULL or _SAYS_FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def reason(error: BaseException) -> str:
    """Describe an error of another library on one line, for a message of this package.

    Args:
        error: The error. The type is added, unless the message is a sentence, as those of `OSError` and `ValueError`.

    Example:
        >>> reason(KeyError("added_tokens")), reason(OSError("No space\\nleft"))
        ("KeyError: 'added_tokens'", 'No space left')
    """
    text = str(error).rstrip(". \n")
    named = text and isinstance(error, OSError | ValueError) and not isinstance(error, UnicodeError)
    return printable(text if named else f"{type(error).__name__}: {text}", MAX_REASON)


@contextlib.contextmanager
def hint(text: str) -> Iterator[None]:
    """Add a sentence to the message of an `InputError` that is raised in this context.

    Args:
        text: The sentence, for instance the flag of a command that helps.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} {text}") from None


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Write the arguments in a message as flags.

    Args:
        message: A text with arguments as `name=value`. `name=True` becomes the flag alone, as does `name=...`, which
            stands for any value.
        flags: Maps each argument to its flag, without dashes. Other arguments stay as they are.

    Example:
        >>> with_flags("split='tset' is unknown; skip_bad_boxes=True helps", {"split": "eval_split"})
        '--eval_split tset is unknown; skip_bad_boxes=True helps'
        >>> with_flags("skip_bad_boxes=True skips it", {"skip_bad_boxes": "skip_bad_boxes"})
        '--skip_bad_boxes skips it'
    """

    def as_flag(match: re.Match) -> str:
        name, quoted, plain = match["name"], match["quoted"], match["plain"]
        value = "" if plain in ("True", "...") else plain if quoted is None else quoted[1:-1]
        return f"--{flags[name]} {value}".rstrip()

    names = "|".join(map(re.escape, flags))
    if not names:
        return message
    value = r"(?:(?P<quoted>'[^']*'|\"[^\"]*\")|(?P<plain>\.\.\.|[^\s,;:)]*[^\s,;:).]))"
    return re.sub(rf"(?<![\w.])(?P<name>{names})={value}", as_flag, message)
