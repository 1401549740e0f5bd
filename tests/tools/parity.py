# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Compare with the real files of the hosts and of the released code, wherever they lie.

    python tests/parity.py --released SDPT/maskrcnn_benchmark/utils/fuse_helper.py \
        --glip GLIP/maskrcnn_benchmark/utils/fuse_helper.py \
        --groundingdino GroundingDINO/groundingdino/models/GroundingDINO/fuse_modules.py \
        --mmdetection mmdetection/mmdet/models/utils/vlfuse_helper.py

Any of them, at the shapes of the published models. Of each file the attention alone is run, because the rest imports
packages that do not install any more.

* `--released`: its forward against our layer around GLIP's attention (that of `--glip`, if it is given), in float32;
  and with projections as ill-conditioned as trained ones, where its inverse loses digits in float32: there in float64
  too, against ours in float32 and in float64.
* The others: our layer on the real attention against the words of the paper on it: append to both inputs, run, drop
  the rows. In float64, with each mask as the host means it. With the adapter disabled, the host bit for bit.

A row is a case; its errors are the largest differences, over the largest entry of the reference where that is above 1.
It ends with exit code 1 if one is above its bound, or if tokens change nothing and the comparison is therefore blind.
Not collected by `pytest`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import math
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_sdpt import SDPTConfig
from peft_sdpt.hosts import BiAttentionHost, add_validity, find_hosts
from tests.helpers.detectors import PUBLISHED

GLIP_SHAPES = {"v_dim": 256, "l_dim": 768, "embed_dim": 2048, "num_heads": 8}
DINO_SHAPES = {"v_dim": 256, "l_dim": 256, "embed_dim": 1024, "num_heads": 4}
FLOAT32, FLOAT64 = 1e-5, 1e-10
# Of the query projections, largest singular value over smallest. Those of trained hosts have several hundred.
TRAINED = 500.0
IMAGE_LENGTH, TEXT_LENGTH = 100, 24
# Outputs of image and text, gradients of tokens, image and text.
Results = list[torch.Tensor]


# ---- what is compared with


def load(path: Path, *names: str) -> list[Any]:
    """Classes and functions of a file by name, without running anything else of it but constants."""
    wanted = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if getattr(node, "name", None) in names
        or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    ]
    absent = set(names) - {getattr(node, "name", None) for node in wanted}
    if absent:
        raise SystemExit(f"parity.py: {path} has no {', '.join(sorted(absent))}")
    namespace = {**vars(typing), "torch": torch, "nn": nn, "F": F, "math": math, "Tensor": torch.Tensor}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), namespace)
    return [namespace[name] for name in names]


def configuration(tokens: int = 0) -> SimpleNamespace:
    """What the attentions of GLIP and of the released code read of their config; with tokens, `vpt_only=-4`."""
    fusion = SimpleNamespace(
        STABLE_SOFTMAX_2D=False, CLAMP_MIN_FOR_UNDERFLOW=True, CLAMP_MAX_FOR_OVERFLOW=True
    )  # configs/pretrain/glip_Swin_L.yaml
    return SimpleNamespace(
        MODEL=SimpleNamespace(DYHEAD=SimpleNamespace(FUSE_CONFIG=fusion), PROMPT=SimpleNamespace(NUM_TOKENS=tokens)),
        ECCV=SimpleNamespace(init_way="uniform"),
        vpt_only=-4 if tokens else 0,
        use_lora_cross=0,
        pt4_tokens=0,
        fuse_module_cross_att=0,
    )


def build(attention: type[nn.Module], **arguments: Any) -> nn.Module:
    """A frozen attention in evaluation mode, whose biases are not zero."""
    torch.manual_seed(0)
    if "cfg" in inspect.signature(attention).parameters:
        arguments.setdefault("cfg", configuration())
    module = attention(**arguments).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
    return module


def worsen(projection: nn.Linear, condition: float) -> None:
    """Give the weight of a projection this condition number."""
    left, values, right = torch.linalg.svd(projection.weight.double(), full_matrices=False)
    values = values[0] * condition ** -torch.linspace(0, 1, len(values), dtype=torch.float64)
    projection.weight.copy_((left * values) @ right)


class Holder(nn.Module):
    """A model with one fusion layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attn(*args, **kwargs)


def append_and_drop(
    attention: nn.Module,
    host: BiAttentionHost,
    token_sets: Sequence[torch.Tensor],
    image: torch.Tensor,
    text: torch.Tensor,
    masks: dict[str, torch.Tensor],
    visible: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's words on the host's own attention; `masks` are the host's, by argument."""
    ones_are_tokens = host.text_mask_function is add_validity
    count, lengths = len(token_sets[0]), (image.shape[1], text.shape[1])
    longer = []
    for tokens, projection, inputs in zip(token_sets, host.projections(attention), (image, text), strict=True):
        appended = (tokens - projection.bias) @ torch.linalg.pinv(projection.weight).T
        longer.append(torch.cat([inputs, appended.expand(len(inputs), -1, -1)], dim=1))
    masks = dict(masks)
    if host.image_mask in masks:
        masks[host.image_mask] = F.pad(masks[host.image_mask], (0, count), value=False)
    if not visible and host.text_mask not in masks:
        shape = text.shape[:2]
        masks[host.text_mask] = torch.ones(shape).long() if ones_are_tokens else torch.zeros(shape, dtype=torch.bool)
    if host.text_mask in masks:
        # A prompt is what a token is, or what padding is.
        masks[host.text_mask] = F.pad(masks[host.text_mask], (0, count), value=visible == ones_are_tokens)
    outputs = attention(*longer, **masks)
    return tuple(output[:, :length] for output, length in zip(outputs, lengths, strict=True))


# ---- how


class Report:
    """A table of errors, and whether all are within their bounds."""

    columns = ("image", "text", "d tokens", "d image", "d text", "disabled")

    def __init__(self) -> None:
        self.failed = False
        print(f"{'largest error of':<62}", *(f"{column:>8}" for column in self.columns))

    def row(self, case: str, ours: Results, theirs: Results, bound: float, disabled: float, bare: Results) -> None:
        errors = [*(error(one, other) for one, other in zip(ours, theirs, strict=True)), disabled]
        within = all(value <= bound for value in errors)  # not so for what is not a number
        # Text tokens see prompts in all cases.
        blind = error(theirs[1], bare[1]) < 1e-3 or not theirs[2].any()
        self.failed |= not within or blind
        verdict = "blind" if blind else "ok" if within else f"above {bound:.0e}"
        print(f"{case:<62}", *(f"{value:8.1e}" for value in errors), verdict, flush=True)


def error(one: torch.Tensor, reference: torch.Tensor) -> float:
    return ((one - reference).abs().max() / reference.abs().max().clamp(min=1)).item()


def results(outputs: tuple[torch.Tensor, torch.Tensor], inputs: Sequence[torch.Tensor]) -> Results:
    """Both outputs, and the gradients of the inputs for an arbitrary loss of both."""
    generator = torch.Generator().manual_seed(3)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def random_inputs(batch: int, shapes: dict[str, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, IMAGE_LENGTH, shapes["v_dim"], generator=generator, dtype=dtype)
    text = torch.randn(batch, TEXT_LENGTH, shapes["l_dim"], generator=generator, dtype=dtype)
    return image.requires_grad_(), text.requires_grad_()


def attach(attention: nn.Module, **config: Any) -> tuple[nn.Module, torch.Tensor]:
    """A model with our layer around an attention, and its tokens."""
    torch.manual_seed(2)
    model = get_peft_model(Holder(attention), SDPTConfig(**PUBLISHED, **config))
    return model, model.base_model.model.attn.sdpt_prompts["default"]


def run_bare(
    attention: nn.Module, model: nn.Module, *args: Any, **kwargs: Any
) -> tuple[float, tuple[torch.Tensor, torch.Tensor]]:
    """0 if the model without its adapter is the attention bit for bit, and what that gives."""
    with torch.no_grad(), model.disable_adapter():
        bare = attention(*args, **kwargs)
        return 0.0 if all(map(torch.equal, model(*args, **kwargs), bare)) else math.inf, bare


def check_released(
    path: Path,
    glip: Path | None,
    report: Report,
    *,
    tokens: int,
    padding: int,
    ours_in: torch.dtype = torch.float32,
    theirs_in: torch.dtype = torch.float32,
    condition: float | None = None,
    bound: float = FLOAT32,
) -> None:
    """The released forward against our layer with prompts hidden from the image; batch size 1, which it is made for."""
    released_class = load(path, "BiMultiHeadAttention", "get_inverse")[0]
    # Without tokens the released class is GLIP's.
    glip_class = load(glip, "BiMultiHeadAttention")[0] if glip else released_class
    released = build(released_class, cfg=configuration(tokens), first_cross=True, **GLIP_SHAPES)
    if condition:
        worsen(released.v_proj, condition)
        worsen(released.l_proj, condition)
    plain = build(glip_class, **GLIP_SHAPES)
    plain.load_state_dict({key: value for key, value in released.state_dict().items() if "cpt_" not in key})
    model, prompts = attach(plain.to(ours_in), num_virtual_tokens=tokens, image_attends_prompts=False)
    prompts.data = released.cpt_input.detach()[0].to(ours_in)
    released.to(theirs_in).cpt_input.requires_grad_(True)
    mask = torch.ones(1, TEXT_LENGTH, dtype=torch.long)
    mask[:, TEXT_LENGTH - padding :] = 0
    image, text = random_inputs(1, GLIP_SHAPES, torch.float32)
    ours_of = [tensor.detach().to(ours_in).requires_grad_() for tensor in (image, text)]
    theirs_of = [tensor.detach().to(theirs_in).requires_grad_() for tensor in (image, text)]
    ours = results(model(*ours_of, mask), [prompts, *ours_of])
    # Copies, because the released forward works in place.
    theirs = results(released(*(each.clone() for each in theirs_of), mask.clone()), [released.cpt_input, *theirs_of])
    theirs[2] = theirs[2][0]
    case = f"released, {tokens} tokens, {padding} of {TEXT_LENGTH} text tokens padding"
    if condition:
        precision, our_precision = (str(dtype).removeprefix("torch.") for dtype in (theirs_in, ours_in))
        case = f"released, {tokens} tokens, condition {condition:.0f}, {precision}, ours {our_precision}"
    report.row(case, ours, theirs, bound, *run_bare(plain, model, *ours_of, mask))


def masks_of(host: BiAttentionHost, batch: int, which: Sequence[str]) -> dict[str, torch.Tensor]:
    """Masks in the host's convention, of samples that are padded differently."""
    masks = {}
    if "image" in which:
        padded = torch.tensor([0, 30, 7])[:batch, None]
        masks[host.image_mask] = torch.arange(IMAGE_LENGTH)[None] >= IMAGE_LENGTH - padded
    if "text" in which:
        padding = torch.arange(TEXT_LENGTH)[None] >= TEXT_LENGTH - torch.tensor([5, 0, 11])[:batch, None]
        masks[host.text_mask] = (~padding).long() if host.text_mask_function is add_validity else padding
    return masks


def check_host(name: str, path: Path, shapes: dict[str, int], report: Report) -> None:
    """Our layer on a real attention against append-and-drop, in both modes and visibilities, with each mask."""
    attention = build(load(path, "BiMultiHeadAttention")[0], **shapes).double()
    host = find_hosts(Holder(attention)).get("attn")
    if host is None:
        raise SystemExit(f"parity.py: {path}: BiMultiHeadAttention fits no declaration")
    print(f"{path}: {host.name}")
    image, text = random_inputs(3, shapes, torch.float64)
    sides = ("image", "text") if host.image_mask else ("text",)
    shown = [which for count in range(len(sides) + 1) for which in itertools.combinations(sides, count)]
    for which, mode, visible in itertools.product(shown, ("unified", "independent"), (True, False)):
        masks = masks_of(host, 3, which)
        model, prompts = attach(attention, num_virtual_tokens=10, prompt_mode=mode, image_attends_prompts=visible)
        prompts.data = prompts.data.double()
        inputs = [prompts, image, text]
        sets = prompts if mode == "independent" else (prompts, prompts)
        theirs = results(append_and_drop(attention, host, sets, image, text, masks, visible), inputs)
        ours = results(model(image, text, **masks), inputs)
        seen = "seen by both" if visible else "by text alone"
        case = f"{name}, {' and '.join(which) or 'no'} mask, {mode}, {seen}"
        report.row(case, ours, theirs, FLOAT64, *run_bare(attention, model, image, text, **masks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--released", type=Path, help="maskrcnn_benchmark/utils/fuse_helper.py of SDPT")
    parser.add_argument("--glip", type=Path, help="maskrcnn_benchmark/utils/fuse_helper.py of GLIP")
    parser.add_argument("--groundingdino", type=Path, help="groundingdino/models/GroundingDINO/fuse_modules.py")
    parser.add_argument(
        "--mmdetection", type=Path, nargs="+", default=[], help="mmdet/models/utils/vlfuse_helper.py, of any versions"
    )
    args = parser.parse_args()
    report = Report()
    if args.released:
        for tokens, padding in itertools.product((10, 700), (0, 5)):
            check_released(args.released, args.glip, report, tokens=tokens, padding=padding)
        single, double = torch.float32, torch.float64
        trained = [(single, single, 1e-3), (double, single, FLOAT32), (double, double, FLOAT64)]
        for tokens, (theirs_in, ours_in, bound) in itertools.product((10, 700), trained):
            precisions = {"ours_in": ours_in, "theirs_in": theirs_in, "bound": bound}
            check_released(args.released, args.glip, report, tokens=tokens, padding=5, condition=TRAINED, **precisions)
    if args.glip:
        check_host("GLIP", args.glip, GLIP_SHAPES, report)
    if args.groundingdino:
        check_host("Grounding DINO", args.groundingdino, DINO_SHAPES, report)
    for path in args.mmdetection:
        check_host("mmdetection", path, GLIP_SHAPES, report)
    sys.exit(report.failed)


if __name__ == "__main__":
    main()
