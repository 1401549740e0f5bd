# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""How long tests wait for something that should happen."""

import time
from collections.abc import Callable

# Seconds. Nothing takes a tenth of it on two quiet cores; a test that gets here hangs. Less than `faulthandler_timeout`
# in pyproject.toml.
PATIENCE = 1200.0


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until a condition holds. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened for {seconds} seconds"
        time.sleep(0.01)
