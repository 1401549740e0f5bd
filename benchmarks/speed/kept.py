# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""What a training step keeps between forward and backward, by part of the detector: what holds its peak memory.

    python -m benchmarks.speed.kept

Prints a table in MB, of tensors that autograd saves, each counted once and at its first part; weights are left out. No
times: it says the same on every machine.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter

import torch
from torch import nn

from peft_sdpt.detection.loss import GroundedDetectionLoss

from .full_hosts import MODELS, labels, make_host, model_inputs, sharing_copy
from .methods import METHODS, suitable

# Names of modules, and the part that they and all within them are.
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
    parser.add_argument("--host", choices=tuple(MODELS), default="grounding-dino-tiny", help="The detector.")
    parser.add_argument(
        "--methods", nargs="+", choices=suitable("training", False), default=["sdpt", "lora"], help="Columns."
    )
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), help="Of the image: height and width.")
    parser.add_argument("--tokens", type=int, default=32, help="Of the text.")
    return parser.parse_args()


def kept(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Counter[str]:
    """Bytes that one step keeps in each part."""
    entered, bytes_of, seen = [REST], Counter(), []
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            seen.append(tensor)  # or its memory would be used, and counted, again
            bytes_of[entered[-1]] += storage.nbytes()
        return tensor

    hooks = []
    for name, module in model.named_modules():
        part = next((part for pattern, part in PARTS.items() if re.search(pattern, name)), None)
        if part:
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: entered.append(part)))
            hooks.append(module.register_forward_hook(lambda *_: entered.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
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
    print(f"| in all | {' | '.join(f'{column.total() / 1e6:.0f}' for column in columns)} |")


if __name__ == "__main__":
    main()
