# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What the frozen backbones of a detector compute."""

from contextlib import contextmanager

import pytest
from transformers import BertModel, SwinBackbone


@contextmanager
def counted():
    """Within, counts samples that each backbone computes, whoever has put what in place of the forward of a module."""
    count = {"picture": 0, "prompt": 0}
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in ((SwinBackbone, "picture"), (BertModel, "prompt")):

            def call(self, first, *args, forward=kind.forward, name=name, **kwargs):
                count[name] += len(first)
                return forward(self, first, *args, **kwargs)

            patch.setattr(kind, "forward", call)
        yield count
