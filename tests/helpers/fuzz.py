# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Values that have caused errors, and a time limit for each example. All tests with random input use them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import strategies as st

# Strings that have caused errors: control characters, halves of surrogate pairs, paths, YAML, HTML, long names.
BAD_STRINGS = (
    *(
        "",
        " ",
        ".",
        "a.b",
        "\n",
        "a\nb",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "\u2028",
        "😀",
        "../../x",
        "/etc/passwd",
        "a" * 300,
    ),
    *("(a+)+$", r"([a-z0-9._]+)+!", "<script>", "a\n---\nb: c", "NaN", "1e400", "true", "|", "{}", "C:\\x", "é"),
)
BAD_NUMBERS = (0, -1, 1, 2**31, 2**63, 10**30, 10**400, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"))
scalars = st.one_of(
    st.sampled_from((None, True, False, *BAD_NUMBERS, *BAD_STRINGS)), st.integers(), st.floats(), st.text(max_size=20)
)
# Any value that JSON can hold.
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


class TimeBoundError(BaseException):
    """An example took too long. The class is not an `Exception`, so that the code under test does not catch it."""


@contextmanager
def time_bound(seconds: int = 60) -> Iterator[None]:
    """End an example that hangs. The limit is far above the time of any example, even on a slow machine."""

    def stop(*_: object) -> None:
        raise TimeBoundError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
