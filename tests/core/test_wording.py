# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Values in messages are one line that can be printed anywhere."""

import pytest

from peft_sdpt.wording import printable, quoted


def nested():
    value = []
    for _ in range(5000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "\ud800",
        "a\nb",
        "\x1b[31m",
        "x" * 10**6,
        b"\xff" * 10**6,
        10**5000,
        nested(),
        {"a": ["\x00"]},
        "\u2028",
        None,
        1.5,
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_value_is_quoted_on_a_line(value):
    text = quoted(value)
    text.encode()
    assert text.isprintable() and 0 < len(text) <= 80


def test_short_values_are_quoted_as_python_writes_them():
    for value in ("a b", [1, "two"], None, 2.5, {"a": 1}, "it's"):
        assert quoted(value) == repr(value)


def test_white_space_and_control_characters_are_printable():
    assert printable(" a\n\tb  c ") == "a b c"
    assert printable("a\x1b[31m\ud800\x00") == "a\\x1b[31m\\ud800\\x00"
    assert printable("grün 細胞") == "grün 細胞"
    assert printable("abcdef", 4) == "abc…"
    assert printable(" " * 200 + "the message", 80) == "the message"
    assert printable("a" * 10**7, 5) == "aaaa…" and len(printable("a b " * 10**6, 100)) == 100
