# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Plots of results by matplotlib, as SVG files that depend only on the results."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure

# Text stays text, and ids in the file do not change from run to run.
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "peft_sdpt", "font.size": 9}


def as_svg(figure: Figure) -> str:
    """Return a figure as the text of an SVG file."""
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
