# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the released SDPT code (wuyongjianCODE/SDPT, made of GLIP) as adapters of this package.

    python -m peft_sdpt.convert CHECKPOINT.pth OUTPUT_DIR [--base_model_name_or_path NAME]

What is read, as `maskrcnn_benchmark/utils/checkpoint.py` and `fuse_helper.py` of that code write it: under `"model"`
the state dict of the whole detector, with `module.` before all names where it was trained in several processes, and in
it `rpn.head.dyhead_tower.{i}.b_attn.attn.cpt_input` of each fusion layer that has tokens.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file

from .config import SDPTConfig
from .files import publish_folder
from .hosts import GLIP
from .model_card import CARD

# A parameter of zeros that is appended to the text mask: what hides prompts from the image.
_MASK = "cpt_maskpad"
_TOKENS = "cpt_input"
_INDEPENDENT = ("cpt_vinput", "cpt_linput")
_HOST_KEYS = {
    f"{projection}.{part}"
    for projection in (*GLIP.image_projections, *GLIP.text_projections)
    for part in ("weight", "bias")
}
# `complete_card` puts its section behind this.
_CARD = """---
library_name: peft
---

Converted by `python -m peft_sdpt.convert` from a checkpoint of the released SDPT code. The host is GLIP, as its own
code builds it, with the other weights of that checkpoint.
"""


def convert(
    checkpoint: str | os.PathLike, output_dir: str | os.PathLike, base_model_name_or_path: str | None = None
) -> SDPTConfig:
    """Write the tokens of a checkpoint of the released code as an adapter for `PeftModel.from_pretrained`.

    The tokens `(1, N, E)` of each layer become prompts `(N, E)` in float32, under the full name of the attention in
    GLIP. The config asks for the released function: the full inverse, and prompts that only text tokens see. All
    weights of the host stay behind; those outside of the fusion layers were perhaps trained too.

    Args:
        checkpoint: a `.pth` file. It is read by `torch.load` with `weights_only=True`, so no code in it runs.
        output_dir: a folder that is new or empty. It gets its name once all of it is written.
        base_model_name_or_path: what the adapter's config is to say of its host.

    Returns:
        The config that was written.

    Raises:
        ValueError: the checkpoint cannot be read so, has no tokens, or has some that are not of this form or not of
            `prompt_mode="unified"`; all that is wrong is named. The independent mode of the released code has two sets
            of query and key rows without values, another function than ours.
        FileExistsError: `output_dir` is a file or holds something.
        OSError: something cannot be opened or written.
    """
    output = Path(output_dir).resolve()
    present = sorted(os.listdir(output)) if output.is_dir() else []
    if present or output.is_file():
        there = CONFIG_NAME if CONFIG_NAME in present else present[0] if present else "a file of this name"
        raise FileExistsError(f"output_dir '{output_dir}' must be new or empty; there is {there}")

    tokens, faults = _tokens(_state_dict(checkpoint))
    if faults:
        raise ValueError(f"checkpoint '{checkpoint}' cannot be converted: {'; '.join(faults)}")
    config = SDPTConfig(
        num_virtual_tokens=len(next(iter(tokens.values()))),
        # Whole names, so that layers of GLIP without tokens stay as they are.
        target_modules=list(tokens),
        prompt_space="aligned",
        pinv_rtol=None,
        image_attends_prompts=False,
        fusion_layers={name: value.shape[-1] for name, value in tokens.items()},
        base_model_name_or_path=base_model_name_or_path,
        inference_mode=True,
    )
    _write(output, tokens, config)
    return config


def _state_dict(checkpoint: str | os.PathLike) -> Any:
    """What the checkpoint has of the model, or all of it where that is a state dict; the released code reads both."""
    try:
        # Only what is used is brought into memory: a checkpoint of GLIP-L has gigabytes.
        mapped = zipfile.is_zipfile(checkpoint)
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of pickle, zip, torch
        # Without a name it is of what is in the file, which is cut off perhaps.
        if isinstance(error, OSError) and error.filename:
            raise
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"an object of {found[1]}" if found else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )
        raise ValueError(
            f"checkpoint '{checkpoint}' must be readable by torch.load with weights_only=True, which takes tensors and "
            f"plain values and runs no code in them; got {reason}"
        ) from error
    return content.get("model", content) if isinstance(content, Mapping) else content


def _tokens(state: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Full name of each attention that has tokens with these, `(N, E)`; and what is wrong, in words."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return {}, [f"it, or its 'model', must be a state dict, names to tensors; got {type(state).__name__}"]
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    tokens: dict[str, torch.Tensor] = {}
    faults: list[str] = []
    independent = []
    for key, value in state.items():
        name, _, leaf = key.rpartition(".")
        if not leaf.startswith("cpt_"):
            continue
        if not name:
            faults.append(f"{key} is of no module")
        elif leaf in _INDEPENDENT:
            independent.append(key)
            other = _INDEPENDENT[leaf == _INDEPENDENT[0]]
            if f"{name}.{_TOKENS}" in state:
                faults.append(f"{name} has {_TOKENS} and {leaf}, tokens of two modes")
            if f"{name}.{other}" not in state:
                faults.append(f"{key} without {name}.{other}")
        elif leaf not in (_TOKENS, _MASK):
            faults.append(f"{key} is unknown; known are {_TOKENS}, {', '.join(_INDEPENDENT)} and {_MASK}")
        elif fault := _fault(key, value):
            faults.append(fault)
        elif leaf == _TOKENS:
            tokens[name] = value.detach()[0].to(torch.float32, copy=True).contiguous()
    if independent:
        faults.append(
            f"{', '.join(independent)}: two sets, which the released code uses as rows of queries and keys without "
            "values; prompt_mode='independent' gives its tokens values, which is another function"
        )
    elif not tokens and not faults:
        faults.append(f"no key ends with '.{_TOKENS}'; it was trained without vpt_only -4")
    if len({len(value) for value in tokens.values()}) > 1:
        counts = ", ".join(f"{len(value)} in {name}.{_TOKENS}" for name, value in tokens.items())
        faults.append(f"there must be as many tokens in each layer, got {counts}")
    # Adapters and LoRA, which the released code can train beside tokens: without them the function is another.
    strangers = [
        key
        for name in tokens
        for key in state
        if key.startswith(f"{name}.") and not key.startswith(f"{name}.cpt_") and key[len(name) + 1 :] not in _HOST_KEYS
    ]
    if strangers:
        faults.append(f"tokens must be all that GLIP's attention got, and it has {', '.join(strangers)} as well")
    return tokens, faults


def _fault(key: str, value: Any) -> str | None:
    """What is wrong with tokens, or with the mask beside them."""
    if not isinstance(value, torch.Tensor):
        return f"{key} must be a tensor, got {type(value).__name__}"
    if key.endswith(_MASK):
        return f"{key} must be zeros, which hide prompts from the image; got others" if value.any() else None
    if value.dim() != 3 or len(value) != 1 or value.numel() == 0:
        return f"{key} must be (1, N, E), tokens and width, both at least 1; got {tuple(value.shape)}"
    if not value.is_floating_point():
        return f"{key} must be of floating point, got {value.dtype}"
    if not value.to(torch.float32).isfinite().all():
        return f"{key} has values that are not finite"
    return None


def _write(output: Path, tokens: Mapping[str, torch.Tensor], config: SDPTConfig) -> None:
    """Write the adapter beside `output` and move it there: a name stands for all of it, or is not there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as unfinished:
        # A folder within, because a temporary one is closed to other users and would stay so.
        folder = Path(unfinished, "adapter")
        folder.mkdir()
        (folder / CARD).write_text(_CARD, encoding="utf-8")
        weights = {f"base_model.model.{name}.sdpt_prompts": value for name, value in tokens.items()}
        try:
            save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{output}: {error}") from error
        config.save_pretrained(folder)
        publish_folder(folder, output)


def main(arguments: list[str] | None = None) -> None:
    """The command. Errors are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_sdpt.convert",
        description="Turn a training checkpoint of the released SDPT code, made of GLIP, into an adapter for PEFT.",
    )
    parser.add_argument("checkpoint", help="A .pth file that the released code has written.")
    parser.add_argument("output_dir", help="Folder for the adapter; new or empty.")
    parser.add_argument(
        "--base_model_name_or_path", help="What adapter_config.json is to say of the host: a name or a path of GLIP."
    )
    args = parser.parse_args(arguments)
    try:
        config = convert(args.checkpoint, args.output_dir, args.base_model_name_or_path)
    except (OSError, ValueError) as error:
        print(f"peft_sdpt.convert: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    layers = config.fusion_layers or {}
    widths = " or ".join(str(width) for width in sorted(set(layers.values())))
    size = os.path.getsize(os.path.join(args.output_dir, SAFETENSORS_WEIGHTS_NAME))
    print(
        f"{args.output_dir}: {len(layers)} fusion layer{'s' * (len(layers) > 1)}, {config.num_virtual_tokens} tokens a "
        f"layer, {widths} wide; {SAFETENSORS_WEIGHTS_NAME} has {size:,} bytes.",
        *(f"  {name}" for name in layers),
        f"Weights of the host were not taken: those stay in {args.checkpoint}.",
        sep="\n",
    )


if __name__ == "__main__":
    main()
