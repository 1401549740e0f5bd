# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Converting checkpoints of the released SDPT code (wuyongjianCODE/SDPT, based on GLIP) to adapters of this package.

    python -m peft_sdpt.convert CHECKPOINT.pth OUTPUT_DIR [--base_model_name_or_path NAME]

`maskrcnn_benchmark/utils/checkpoint.py` and `fuse_helper.py` of the released code define the format of the checkpoints.
`"model"` is the state dict of the whole detector. All names start with `module.` if it was trained in several
processes. Each fusion layer with tokens has `rpn.head.dyhead_tower.{i}.b_attn.attn.cpt_input`.
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
from .wording import counted

# A parameter of zeros that the released code appends to the text mask. It hides prompts from the image.
_MASK = "cpt_maskpad"
_TOKENS = "cpt_input"
_INDEPENDENT = ("cpt_vinput", "cpt_linput")
_BASE_MODEL_KEYS = {
    f"{projection}.{part}"
    for projection in (*GLIP.image_projections, *GLIP.text_projections)
    for part in ("weight", "bias")
}
# `complete_card` adds its section after this text.
_CARD = """---
library_name: peft
---

Converted by `python -m peft_sdpt.convert` from a checkpoint of the released SDPT code. The base model is GLIP, built by
its own code, with the other weights of that checkpoint.
"""


def convert(
    checkpoint: str | os.PathLike, output_dir: str | os.PathLike, base_model_name_or_path: str | None = None
) -> SDPTConfig:
    """Convert the tokens in a checkpoint of the released code to an adapter for `PeftModel.from_pretrained`.

    The tokens of each layer, shape (1, N, E), become prompts of shape (N, E) in float32, under the full name of the
    attention in GLIP. The config selects the method as released: the full inverse, and prompts that only text tokens
    attend to. The weights of the base model are not converted. Some weights outside the fusion layers may have been
    trained.

    Args:
        checkpoint: A `.pth` file. It is read by `torch.load` with `weights_only=True`, so it cannot run code.
        output_dir: A new or empty folder. It gets its name only after all files are written.
        base_model_name_or_path: Name or path of the base model for the adapter's config.

    Returns:
        The config of the adapter.

    Raises:
        ValueError: The checkpoint cannot be read, has no tokens, or has tokens of another shape or of the independent
            mode. The message lists all problems. The independent mode of the released code has two sets of tokens that
            serve as queries and keys without values, unlike `prompt_mode="independent"` here.
        FileExistsError: `output_dir` is a file, or is not empty.
        OSError: A file cannot be opened or written.
    """
    output = Path(output_dir).resolve()
    present = sorted(os.listdir(output)) if output.is_dir() else []
    if present or output.is_file():
        content = CONFIG_NAME if CONFIG_NAME in present else present[0] if present else ""
        problem = f"it has {content}" if content else "it is a file"
        raise FileExistsError(f"output_dir={str(output_dir)!r}: must be a new or empty folder, but {problem}.")

    tokens, faults = _tokens(_state_dict(checkpoint))
    if faults:
        raise ValueError(f"checkpoint={str(checkpoint)!r}: cannot be converted: {'; '.join(faults)}.")
    config = SDPTConfig(
        num_virtual_tokens=len(next(iter(tokens.values()))),
        # Full names, so that layers of GLIP without tokens are not adapted.
        target_modules=list(tokens),
        prompt_gate=None,
        prompt_space="aligned",
        pinv_rtol=None,
        image_attends_prompts=False,
        fusion_layers={name: value.shape[-1] for name, value in tokens.items()},
        base_model_name_or_path=base_model_name_or_path,
        inference_mode=True,
    )
    config.mark_as_saved(has_weights=True)
    _write(output, tokens, config)
    return config


def _state_dict(checkpoint: str | os.PathLike) -> Any:
    """Return the state dict in a checkpoint, or the checkpoint if it is a state dict. The released code reads both."""
    try:
        # Mapped, so that only the tokens are read into memory. A checkpoint of GLIP-L has several gigabytes.
        mapped = zipfile.is_zipfile(checkpoint)
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # pickle, zipfile and torch raise many kinds of errors
        # Without a file name, the error is about the content of the file, which may be cut off.
        if isinstance(error, OSError) and error.filename:
            raise
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"an object of {name[1]}" if name else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"checkpoint={str(checkpoint)!r}: must be readable by torch.load with weights_only=True, which accepts "
            f"tensors and plain values and runs no code; got {reason}."
        ) from error
    return content.get("model", content) if isinstance(content, Mapping) else content


def _tokens(state: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Collect the tokens in a state dict.

    Returns:
        A dict from the full name of each attention to its tokens, shape (N, E), and a list of all problems.
    """
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return {}, [f"it, or its 'model', must be a state dict that maps names to tensors, got {type(state).__name__}"]
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
            faults.append(f"{key} belongs to no module")
        elif leaf in _INDEPENDENT:
            independent.append(key)
            other = _INDEPENDENT[leaf == _INDEPENDENT[0]]
            if f"{name}.{_TOKENS}" in state:
                faults.append(f"{name} has {_TOKENS} and {leaf}, which belong to different modes")
            if f"{name}.{other}" not in state:
                faults.append(f"{key} needs {name}.{other}, which is missing")
        elif leaf not in (_TOKENS, _MASK):
            faults.append(f"{key} is unknown; the known keys are {_TOKENS}, {', '.join(_INDEPENDENT)} and {_MASK}")
        elif fault := _fault(key, value):
            faults.append(fault)
        elif leaf == _TOKENS:
            tokens[name] = value.detach()[0].to(torch.float32, copy=True).contiguous()
    if independent:
        faults.append(
            f"{', '.join(independent)} belong to the independent mode, where the released code uses tokens as queries "
            "and keys without values; prompt_mode='independent' gives tokens values, which is a different method"
        )
    elif not tokens and not faults:
        faults.append(f"no key ends with '.{_TOKENS}', so it was trained without vpt_only -4")
    if len({len(value) for value in tokens.values()}) > 1:
        counts = ", ".join(f"{len(value)} in {name}.{_TOKENS}" for name, value in tokens.items())
        faults.append(f"all layers must have the same number of tokens, got {counts}")
    # The released code can also train adapters and LoRA in the same layers. Without them, the results would differ.
    other_keys = [
        key
        for name in tokens
        for key in state
        if key.startswith(f"{name}.")
        and not key.startswith(f"{name}.cpt_")
        and key[len(name) + 1 :] not in _BASE_MODEL_KEYS
    ]
    if other_keys:
        faults.append(f"tokens must be the only addition to GLIP's attention, but it also has {', '.join(other_keys)}")
    return tokens, faults


def _fault(key: str, value: Any) -> str | None:
    """Return what is wrong with tokens or with their mask, or None."""
    if not isinstance(value, torch.Tensor):
        return f"{key} must be a tensor, got {type(value).__name__}"
    if key.endswith(_MASK):
        return f"{key} must be zeros, which hide prompts from the image" if value.any() else None
    if value.dim() != 3 or len(value) != 1 or value.numel() == 0:
        return f"{key} must be (1, N, E) with N tokens of dimension E, both at least 1, got {tuple(value.shape)}"
    if not value.is_floating_point():
        return f"{key} must have a floating-point dtype, got {value.dtype}"
    if not value.to(torch.float32).isfinite().all():
        return f"{key} has values that are not finite"
    return None


def _write(output: Path, tokens: Mapping[str, torch.Tensor], config: SDPTConfig) -> None:
    """Write the adapter next to `output` and then rename it, so that `output` is complete or does not exist."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as unfinished:
        # Written to a new folder, because other users cannot read the temporary one, even after it is renamed.
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
    """Run the command. An error prints one line on stderr and ends with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_sdpt.convert",
        description="Convert a training checkpoint of the released SDPT code, based on GLIP, to an adapter for PEFT.",
    )
    parser.add_argument("checkpoint", help="A .pth file from the released code.")
    parser.add_argument("output_dir", help="New or empty folder for the adapter.")
    parser.add_argument(
        "--base_model_name_or_path", help="Name or path of the base model, GLIP, to write to adapter_config.json."
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
        f"{args.output_dir}: {counted(len(layers), 'fusion layer')}, {counted(config.num_virtual_tokens, 'token')} "
        f"per layer, embedding dimension {widths}; {SAFETENSORS_WEIGHTS_NAME} has {size:,} bytes.",
        *(f"  {name}" for name in layers),
        f"The weights of the base model were not converted; they are in {args.checkpoint}.",
        sep="\n",
    )


if __name__ == "__main__":
    main()
