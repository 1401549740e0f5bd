# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Measure the memory that a training step stores between forward and backward, for each part of the detector.

    python -m benchmarks.speed.kept

The command prints a table in MB of the tensors that autograd saves. Each tensor is counted once, for the first part
that saves it. Weights are not counted. The result is the same on every machine.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from peft_sdpt.detection.loss import GroundedDetectionLoss

from .full_hosts import MODELS, labels, make_host, model_inputs, sharing_copy
from .methods import METHODS, suitable

# Names of modules, and the part that they and their submodules belong to.
PARTS = {
    r"text_backbone$": "text backbone",
    r"\bbackbone$": "image backbone",
    r"encoder\.layers\.\d+\.fusion_layer$": "fusion layers",
    r"encoder\.layers\.\d+\.text_enhancer_layer$": "text layers of the encoder",
    r"encoder\.layers\.\d+\.deformable_layer\.self_attn$": "deformable attention of the encoder",
    r"encoder\.layers\.\d+\.deformable_layer$": "feed-forward layers of the encoder",
    r"(?<!_)decoder$": "decoder",
}
REST = "heads, proposals and loss"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=tuple(MODELS), default="grounding-dino-tiny", help="The base model.")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=suitable("training", False),
        default=["sdpt", "lora"],
        help="Methods to measure, one column each.",
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=(480, 640), help="Height and width of the image in pixels."
    )
    parser.add_argument("--tokens", type=int, default=32, help="Number of text tokens.")
    return parser.parse_args()


@contextlib.contextmanager
def first_saves(known: Iterable[torch.Tensor], note: Callable[[int], None]) -> Iterator[None]:
    """Call `note` with the size in bytes of each memory that autograd saves, once, apart from that of `known`."""
    seen, kept_alive = {tensor.untyped_storage().data_ptr() for tensor in known}, []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept_alive.append(tensor)  # its memory could otherwise be reused and counted again
            note(storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        yield


def kept(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Counter[str]:
    """Return the bytes that one step stores for each part."""
    entered, bytes_of = [REST], Counter()
    hooks = []
    for name, module in model.named_modules():
        part = next((part for pattern, part in PARTS.items() if re.search(pattern, name)), None)
        if part:
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: entered.append(part)))
            hooks.append(module.register_forward_hook(lambda *_: entered.pop() and None))
    weights = (*model.parameters(), *model.buffers())
    with first_saves(weights, lambda size: bytes_of.update({entered[-1]: size})):
        GroundedDetectionLoss(model.config)(model(**inputs), labels(inputs))
    for hook in hooks:
        hook.remove()
    return bytes_of


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    host = make_host(args.host, "cpu", torch.float32)
    inputs = model_inputs(tuple(args.size), args.tokens, "cpu", torch.float32)
    columns = [kept(METHODS[name].attach(sharing_copy(host)).train(), inputs) for name in args.methods]
    print(f"| MB | {' | '.join(METHODS[name].label for name in args.methods)} |")
    print("| --- |" + " --- |" * len(columns))
    for part in [*PARTS.values(), REST]:
        print(f"| {part} | {' | '.join(f'{column[part] / 1e6:.0f}' for column in columns)} |")
    print(f"| total | {' | '.join(f'{column.total() / 1e6:.0f}' for column in columns)} |")


if __name__ == "__main__":
    main()
