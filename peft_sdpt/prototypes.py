# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts that start as prototypes of the downstream tokens, as in Self-Prompt Tuning (arXiv 2402.02382).

There a prompt of a vision transformer starts as a token of the task's pictures. The space of unified prototype tokens
is where a fusion layer compares image and text, so both give candidates: what its query projections make of image
tokens within boxes, and of the text tokens of the classes that these show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .hosts.bi_attention import BiAttentionHost
from .layer import SDPTLayer

# Candidates of a modality and layer that centres are looked for among, drawn at random where there are more.
MOST_CANDIDATES = 4096
PROTOTYPES = ("kmeans", "random", "mean")


def initialize_sdpt_prototypes(
    model: PeftModel,
    dataloader: Iterable[tuple[Mapping[str, Any], list[dict[str, Tensor]]]],
    *,
    adapter_name: str = "default",
    num_batches: int = 4,
    prototypes: str = "kmeans",
    seed: int = 0,
) -> None:
    """Start the prompts of an adapter as prototypes of the tokens of some training batches.

    Called after `get_peft_model(host, SDPTConfig(init_weights="prototypes"))`, as PEFT's
    `initialize_lora_eva_weights` is. Prompts are plain parameters afterwards, and are trained and saved as any. The
    forward passes are those of the host without prompts.

    Args:
        model: a Grounding DINO or MM Grounding DINO with the adapter.
        dataloader: batches, as pairs of what the model takes, `input_ids` among it, and a list of labels, one an image:
            `boxes` `(n, 4)`, centre, width and height as shares of the image, and `class_labels` `(n,)`, which phrase
            of the prompt each is.
        adapter_name: which adapter.
        num_batches: how many batches are looked at. At least 1.
        prototypes: `"kmeans"` for centres of clusters (SciPy's, k-means++ start), `"random"` for tokens as they are,
            `"mean"` for means of random groups of tokens.
        seed: of what is random in it.

    Raises:
        ValueError: an argument breaks its rule, the host is of another kind, or the batches have fewer boxes' tokens
            than there are prompts.
    """
    if prototypes not in PROTOTYPES:
        raise ValueError(f"prototypes must be one of {PROTOTYPES}, got {prototypes!r}")
    if num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches!r}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SDPTLayer) and adapter_name in module.sdpt_prompts
    }
    if not layers:
        raise ValueError(f"adapter_name must be that of an SDPT adapter of the model, got {adapter_name!r}")
    encoders = [module for module in model.modules() if hasattr(type(module), "get_reference_points")]
    if not encoders or not all(isinstance(layer.fusion_host, BiAttentionHost) for layer in layers.values()):
        raise ValueError(
            "model must be a Grounding DINO or MM Grounding DINO of transformers, got "
            f"{type(model.get_base_model()).__name__}: no other host tells where in the image a token lies"
        )
    candidates = _candidates(model, encoders[0], layers, dataloader, num_batches, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for name, layer in layers.items():
        count = layer.sdpt_config[adapter_name].num_virtual_tokens
        sides = [_distinct(_drawn(rows, len(rows), generator)) for rows in candidates[name]]
        sizes = [len(side) for side in sides]
        independent = layer.sdpt_prompts[adapter_name].dim() == 3
        if min(sizes) == 0 or (min(sizes) if independent else sum(sizes)) < count:
            raise ValueError(
                f"dataloader: its batches show {sizes[0]} image tokens and {sizes[1]} text tokens of objects, too few "
                f"for {count} prompts"
            )
        if independent:
            chosen[name] = torch.stack([_prototypes(side, count, prototypes, generator) for side in sides])
        else:
            # As many of either modality where there are enough, or the image would outvote the text by its numbers.
            most = max(min(sizes), count)
            both = torch.cat([_drawn(side, most, generator) for side in sides])
            chosen[name] = _prototypes(both, count, prototypes, generator)
    for name, tokens in chosen.items():
        layers[name].set_tokens(adapter_name, tokens)


@torch.no_grad()
def _candidates(
    model: PeftModel,
    encoder: Any,
    layers: dict[str, SDPTLayer],
    dataloader: Iterable[tuple[Mapping[str, Any], list[dict[str, Tensor]]]],
    num_batches: int,
    seed: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Query states `(n, E)` of each layer, of image tokens within boxes and of text tokens of their classes."""
    # Here, because `import peft_sdpt` does without the extra `detection`.
    from .detection.grounding import class_token_maps

    found = {name: (_Sample(layer.embed_dim, seed), _Sample(layer.embed_dim, seed)) for name, layer in layers.items()}
    current: dict[str, Any] = {}

    def see_positions(_: nn.Module, args: tuple, kwargs: dict) -> None:
        ratios = kwargs["valid_ratios"]
        points = encoder.get_reference_points(kwargs["spatial_shapes_list"], ratios, device=ratios.device)
        # As shares of the image, without what it is padded with.
        centres = points[:, :, 0] / ratios[:, None, 0]
        current["image"] = torch.stack(
            [
                _within(points, label["boxes"].to(points))
                for points, label in zip(centres, current["labels"], strict=True)
            ]
        )

    def see_tokens(name: str, layer: SDPTLayer, args: tuple, kwargs: dict) -> None:
        spec = layer.fusion_host
        assert isinstance(spec, BiAttentionHost)
        bound = spec.bind(args, kwargs)
        tokens = (bound[spec.image_tokens], bound[spec.text_tokens])
        shown = (current["image"], current["text"][:, : tokens[1].shape[1]])
        for sample, projection, states, mask in zip(found[name], layer.projections, tokens, shown, strict=True):
            sample.add(states[mask], projection)

    hooks = [encoder.register_forward_pre_hook(see_positions, with_kwargs=True)]
    hooks += [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: see_tokens(name, module, args, kwargs), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            for _, (inputs, labels) in zip(range(num_batches), dataloader, strict=False):
                inputs = {name: value.to(model.device) for name, value in inputs.items()}
                maps = class_token_maps(inputs["input_ids"])
                current["labels"] = labels
                current["text"] = torch.stack(
                    [
                        rows[label["class_labels"].unique().to(rows.device)].any(0)
                        for rows, label in zip(maps, labels, strict=True)
                    ]
                )
                model(**inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: (image.rows, text.rows) for name, (image, text) in found.items()}


class _Sample:
    """`MOST_CANDIDATES` of the rows that are added, whichever: each has drawn a number, and the lowest stay."""

    def __init__(self, width: int, seed: int) -> None:
        self.rows, self._numbers = torch.empty(0, width), torch.empty(0)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, tokens: Tensor, projection: nn.Module) -> None:
        """Take some of the tokens `(n, d)`, projected."""
        numbers = torch.rand(len(tokens), generator=self._generator)
        stay = self._lowest(numbers)  # before the projection, which makes many times as much of them
        rows = torch.cat([self.rows, projection(tokens[stay.to(tokens.device)]).float().cpu()])
        numbers = torch.cat([self._numbers, numbers[stay]])
        stay = self._lowest(numbers)
        self.rows, self._numbers = rows[stay], numbers[stay]

    @staticmethod
    def _lowest(numbers: Tensor) -> Tensor:
        return numbers.argsort()[:MOST_CANDIDATES].sort().values


def _within(points: Tensor, boxes: Tensor) -> Tensor:
    """Which of the points `(L, 2)` lie in any of the boxes `(n, 4)`, centre, width and height; `(L,)`, bool."""
    return ((points[:, None] - boxes[None, :, :2]).abs() <= boxes[None, :, 2:] / 2).all(-1).any(-1)


def _drawn(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of the rows, in a random order."""
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _distinct(rows: Tensor) -> Tensor:
    """Without rows that are another once more, as a word of one prompt is in all pictures before the first fusion.

    Prompts that start alike would stay alike.
    """
    # In double precision, because distances are computed by way of products.
    near = torch.cdist(rows.double(), rows.double()) < 1e-4 * rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return rows[~near.tril(-1).any(-1)]


def _prototypes(rows: Tensor, count: int, kind: str, generator: torch.Generator) -> Tensor:
    """`(count, E)` of the rows `(n, E)`, n being at least `count`."""
    rows = _drawn(rows, len(rows), generator)
    if kind == "random":
        return rows[:count]
    if kind == "mean":
        return torch.stack([group.mean(0) for group in rows.tensor_split(count)])
    # Here, because the rest of the package does without SciPy.
    from scipy.cluster.vq import kmeans2  # type: ignore[import-untyped] # it has no types

    seed = int(torch.randint(2**31, (), generator=generator))
    centres, _ = kmeans2(rows.double().numpy(), count, minit="++", seed=seed, missing="warn")
    return torch.from_numpy(centres).to(rows.dtype)
