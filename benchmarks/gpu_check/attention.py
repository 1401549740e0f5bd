# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Problems for the attention of fusion layers, the ways to compute it, and what the result should be."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from peft_sdpt import fused_attention
from peft_sdpt.attention import (
    GatedPrompts,
    Side,
    SideInput,
    add_validity,
    append_prompts,
    bi_attention,
    hide_padding,
)

EAGER = "eager"
KERNELS, CHUNKS, ONE_CHUNK = "kernels", "chunks", "one chunk"
# Ways of the fused attention: two calls of `scaled_dot_product_attention`, chunks that fit the cache of a CPU, and all
# image tokens at once. `CHOSEN` is the way that the package chooses.
WAYS = (KERNELS, CHUNKS, ONE_CHUNK)
CHOSEN = "chosen"

# For each kind of layer: embedding dimensions of image, text and attention, number of heads, mask function of the text.
KINDS = {"Grounding DINO": (256, 256, 1024, 4, hide_padding), "GLIP-L": (256, 768, 2048, 8, add_validity)}
NUM_PROMPTS = 10
# In a dry run, embedding dimensions are divided by this.
TINY = 8


@contextlib.contextmanager
def use_way(way: str) -> Iterator[None]:
    """Compute the fused attention in a way of `WAYS`, or else in the way that the package chooses.

    Forward and backward must be in the same context. With dropout, `KERNELS` computes it in chunks. Only this function
    uses private names of the package.
    """
    if way not in WAYS:
        yield
        return
    size = 2**40 if way == ONE_CHUNK else fused_attention._LOGITS_AT_A_TIME
    # There may be a number for each kind of device.
    changes = {name: size for name in vars(fused_attention) if name.startswith("_LOGITS_AT_A_TIME")}
    changes["_kernels_pay"] = lambda *_: way == KERNELS
    with mock.patch.multiple(fused_attention, **changes):
        yield


@dataclass(frozen=True)
class Problem:
    """Inputs and weights of the attention of a fusion layer.

    Attributes:
        image, text: Tokens, `(B, M, dv)` and `(B, T, dl)`.
        image_prompts, text_prompts: `(N, dv)` and `(N, dl)`.
        gates: Gates of the prompts of image and text, `(2, 1, heads)`.
        image_mask, text_mask: As the base model makes them.
        sides: Projections of image and text.
        options: Keyword arguments of `bi_attention`.
    """

    image: torch.Tensor
    text: torch.Tensor
    image_prompts: torch.Tensor
    text_prompts: torch.Tensor
    gates: torch.Tensor
    image_mask: torch.Tensor | None
    text_mask: torch.Tensor
    sides: tuple[Side, Side]
    options: dict[str, Any]

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What has a gradient."""
        return [self.image, self.text, self.image_prompts, self.text_prompts, self.gates]

    def in_dtype(self, dtype: torch.dtype) -> Problem:
        """Return a copy as a model in this dtype has it, with prompts and gates of at least single precision."""
        dtypes = [dtype] * 2 + [torch.promote_types(dtype, torch.float32)] * 3
        names = ("image", "text", "image_prompts", "text_prompts", "gates")
        leaves = [leaf.detach().to(to, copy=True) for leaf, to in zip(self.leaves, dtypes, strict=True)]
        sides = tuple(Side(*(copy.deepcopy(projection).to(dtype) for projection in side)) for side in self.sides)
        return replace(self, **{k: v.requires_grad_() for k, v in zip(names, leaves, strict=True)}, sides=sides)


def make_problem(
    kind: str, device: str, batch: int, image_length: int, text_length: int, tiny: bool = False
) -> Problem:
    """Return a problem in float64. In the last sample, half of the tokens are padding."""
    *dims, num_heads, text_mask_function = KINDS[kind]
    image_dim, text_dim, embed_dim = (dim // TINY if tiny else dim for dim in dims)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    def projection(inputs: int, outputs: int) -> nn.Linear:
        linear = nn.Linear(inputs, outputs, device=device, dtype=torch.float64).requires_grad_(False)
        linear.weight.copy_(random(outputs, inputs) / inputs**0.5)
        linear.bias.copy_(0.3 * random(outputs))
        return linear

    def side(dim: int) -> Side:
        return Side(projection(dim, embed_dim), projection(dim, embed_dim), projection(embed_dim, dim))

    hidden = torch.zeros(batch, text_length, dtype=torch.bool, device=device)
    hidden[-1, text_length // 2 :] = True
    image_mask = None
    if kind == "Grounding DINO":
        image_mask = torch.zeros(batch, image_length, dtype=torch.bool, device=device)
        image_mask[-1, image_length // 2 :] = True
    gates = torch.linspace(-0.8, 0.9, num_heads, dtype=torch.float64, device=device)
    return Problem(
        image=random(batch, image_length, image_dim),
        text=random(batch, text_length, text_dim),
        image_prompts=random(NUM_PROMPTS, image_dim),
        text_prompts=random(NUM_PROMPTS, text_dim),
        gates=torch.stack([gates, gates.flip(0)])[:, None],
        image_mask=image_mask,
        text_mask=hidden if text_mask_function is hide_padding else 1 - hidden.long(),
        sides=(side(image_dim), side(text_dim)),
        options={
            "num_heads": num_heads,
            "scale": (embed_dim // num_heads) ** -0.5,
            "text_mask_function": text_mask_function,
        },
    )


def attend(problem: Problem, way: str, gated: bool, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs of image and text, with prompts. `way` is `EAGER`, or that of the context; see `use_way`."""
    sides = []
    for tokens, mask, prompts, gates in zip(
        (problem.image, problem.text),
        (problem.image_mask, problem.text_mask),
        (problem.image_prompts, problem.text_prompts),
        problem.gates.split(1),
        strict=True,
    ):
        if gated:
            sides.append(SideInput(tokens, mask, None, gated=GatedPrompts(prompts, (len(prompts),), gates)))
        else:
            sides.append(SideInput(tokens, mask, prompts))
    if way == EAGER:
        (image, _), (text, _) = bi_attention(*sides, *problem.sides, dropout=dropout, **problem.options)
        return image, text
    return fused_attention.fused_bi_attention(*sides, *problem.sides, dropout=dropout, **problem.options)


def appended_and_dropped(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs as the method defines them: append the prompts to both inputs, and drop their rows."""
    visible_text = 1 if problem.options["text_mask_function"] is add_validity else 0
    image_mask = None if problem.image_mask is None else F.pad(problem.image_mask, (0, NUM_PROMPTS))
    image = SideInput(append_prompts(problem.image, problem.image_prompts), image_mask, None)
    text_mask = F.pad(problem.text_mask, (0, NUM_PROMPTS), value=visible_text)
    text = SideInput(append_prompts(problem.text, problem.text_prompts), text_mask, None)
    (image_out, _), (text_out, _) = bi_attention(image, text, *problem.sides, **problem.options)
    return image_out[:, :-NUM_PROMPTS], text_out[:, :-NUM_PROMPTS]


def added_by_gates(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs with gated prompts: those of the base model, and what each head reads from prompts alone.

    What a head reads from prompts is the attention of the base model with nothing else to read, times its gate.
    """
    tokens = SideInput(problem.image, problem.image_mask, None), SideInput(problem.text, problem.text_mask, None)
    (image_out, _), (text_out, _) = bi_attention(*tokens, *problem.sides, **problem.options)
    heads, batch = problem.options["num_heads"], len(problem.image)

    def gated(side: Side, gates: torch.Tensor) -> Side:
        weight = side.out.weight.unflatten(1, (heads, -1)) * gates[0, :, None]
        return side._replace(out=lambda states: F.linear(states, weight.flatten(1)))

    image_side, text_side = problem.sides
    of_image, of_text = (prompts.expand(batch, -1, -1) for prompts in (problem.image_prompts, problem.text_prompts))
    options = {name: value for name, value in problem.options.items() if name != "text_mask_function"}
    nothing_hidden = SideInput(problem.image, None, None), SideInput(of_text, None, None)
    (read_by_image, _), _ = bi_attention(*nothing_hidden, gated(image_side, problem.gates[1]), text_side, **options)
    nothing_hidden = SideInput(of_image, None, None), SideInput(problem.text, None, None)
    _, (read_by_text, _) = bi_attention(*nothing_hidden, image_side, gated(text_side, problem.gates[0]), **options)
    return image_out + read_by_image, text_out + read_by_text


def with_gradients(outputs: tuple[torch.Tensor, ...], problem: Problem, seed: int = 1) -> list[torch.Tensor]:
    """Return outputs, and the gradients of a random combination of them. A gradient that does not exist is zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outputs]
    total = sum((out * weight).to(torch.promote_types(out.dtype, torch.float32)).sum()
                for out, weight in zip(outputs, weights, strict=True))  # fmt: skip
    gradients = torch.autograd.grad(total, problem.leaves, allow_unused=True)
    zeros = (torch.zeros_like(leaf) if gradient is None else gradient
             for leaf, gradient in zip(problem.leaves, gradients, strict=True))  # fmt: skip
    return [*(out.detach() for out in outputs), *zeros]
