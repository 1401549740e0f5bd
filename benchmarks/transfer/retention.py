# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What tuning costs on classes that the base model knew: AP on names of its pre-training that no task uses."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from examples.pictograms import read_categories, scene_split
from examples.pictograms.tasks import TASKS
from peft_sdpt.detection.data import DetectionSplit

from .. import EXAMPLES
from .diagnosis import ADAPTER

NUM_NAMES, NUM_IMAGES = 40, 80
# Factors for the gates of SDPT, between the base model (0) and the adapter as it was trained (1).
SCALES = (0.4, 0.7)


def has_known_names(model_name: str) -> bool:
    """Return whether the names of the pre-training are known. They are those of the small base model alone."""
    folder = Path(model_name)
    return folder.exists() and folder.resolve() == EXAMPLES / "host"


def known_classes() -> list[int]:
    """Return `NUM_NAMES` indices into `read_categories()`, evenly spread over what pre-training uses and no task."""
    used = {index for task in TASKS.values() for index in task.classes()}
    left = [i for i, category in enumerate(read_categories()) if category.seen and i not in used]
    return [left[number * len(left) // NUM_NAMES] for number in range(NUM_NAMES)]


@lru_cache
def known_split() -> DetectionSplit:
    """Return `NUM_IMAGES` scenes of `known_classes`, as the base model was pre-trained on, but with other seeds."""
    return scene_split([(zlib.crc32(b"known names"), number) for number in range(NUM_IMAGES)], known_classes())


def at_scales(model: nn.Module, measure: Callable[[], Any]) -> dict[str, Any]:
    """Measure a model with its SDPT adapter at each of `SCALES`. At the end, it has the adapter as it was trained.

    Args:
        model: Any model.
        measure: Measures it.

    Returns:
        The results by scale. Empty if the model has no SDPT adapter with gates.
    """
    if not (hasattr(model, "set_scale") and any(".sdpt_gates." in name for name, _ in model.named_parameters())):
        return {}
    found = {}
    try:
        for scale in SCALES:
            model.set_scale(ADAPTER, scale)
            found[str(scale)] = measure()
    finally:
        model.set_scale(ADAPTER, 1.0)
    return found
