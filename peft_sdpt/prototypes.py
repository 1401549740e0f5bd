# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts that start as prototypes of the downstream tokens, as in Self-Prompt Tuning (arXiv 2402.02382).

In that paper, a prompt of a vision transformer starts as a token of the task's images. A fusion layer compares image
and text in the space of unified prototype tokens, so both modalities give candidates: the projected image tokens inside
boxes, and the projected text tokens of their classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .hosts import GROUNDING_DINO_DECODER, BiAttentionHost
from .layer import SDPTLayer

# Maximum number of candidates per modality and layer. If there are more, these are drawn at random.
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

    Call it after `get_peft_model(model, SDPTConfig(init_weights="prototypes"))`, as you would call PEFT's
    `initialize_lora_eva_weights`. Afterwards, the prompts are trained and saved as usual. The forward passes run the
    base model without prompts. Layers of the decoder keep their tokens, because their queries are objects and have no
    place in the image yet. The function needs the extra `detection`.

    Args:
        model: A Grounding DINO or MM Grounding DINO with the adapter.
        dataloader: Batches, as pairs of the inputs of the model (with `input_ids`) and a list of labels, one per image:
            `boxes` `(n, 4)`, with centre, width and height relative to the image size, and `class_labels` `(n,)`,
            indices of the phrases in the prompt.
        adapter_name: Name of the adapter.
        num_batches: Number of batches to read, at least 1.
        prototypes: `"kmeans"` uses the centres of clusters (SciPy's, with a k-means++ start), `"random"` uses random
            tokens, and `"mean"` uses the means of random groups of tokens.
        seed: Seed of all random choices.

    Raises:
        ValueError: An argument breaks its rule, the base model is of another kind, or the boxes of the batches contain
            fewer tokens than there are prompts.
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
        raise ValueError(f"adapter_name must name an SDPT adapter of the model, got {adapter_name!r}")
    layers = {name: layer for name, layer in layers.items() if layer.fusion_host != GROUNDING_DINO_DECODER}
    encoders = [module for module in model.modules() if hasattr(type(module), "get_reference_points")]
    if not layers:
        raise ValueError(
            f"adapter_name={adapter_name!r} has prompts in the decoder only, and prototypes are for the encoder"
        )
    if not encoders or not all(isinstance(layer.fusion_host, BiAttentionHost) for layer in layers.values()):
        raise ValueError(
            "model must be a Grounding DINO or MM Grounding DINO of transformers, got "
            f"{type(model.get_base_model()).__name__}: no other base model tells where in the image a token lies"
        )
    candidates = _candidates(model, encoders[0], layers, dataloader, num_batches, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for name, layer in layers.items():
        count = layer.sdpt_prompts[adapter_name].shape[-2]
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
            # Takes equally many tokens of both modalities if possible, because there are many more image tokens.
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
    """Return projected tokens `(n, E)` for each layer: image tokens in boxes, and text tokens of their classes."""
    # Imported here, because `import peft_sdpt` must work without the extra `detection`.
    from .detection.grounding import class_token_maps

    found = {name: (_Sample(layer.embed_dim, seed), _Sample(layer.embed_dim, seed)) for name, layer in layers.items()}
    current: dict[str, Any] = {}

    def see_positions(_: nn.Module, args: tuple, kwargs: dict) -> None:
        ratios = kwargs["valid_ratios"]
        points = encoder.get_reference_points(kwargs["spatial_shapes_list"], ratios, device=ratios.device)
        # Relative to the size of the image without its padding.
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
    """A random sample of the added rows. Each row gets a random number, and rows with the lowest numbers are kept."""

    def __init__(self, width: int, seed: int) -> None:
        self.rows, self._numbers = torch.empty(0, width), torch.empty(0)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, tokens: Tensor, projection: nn.Module) -> None:
        """Add some of the tokens `(n, d)`, projected."""
        numbers = torch.rand(len(tokens), generator=self._generator)
        stay = self._lowest(numbers)  # before the projection, which makes them several times larger
        rows = torch.cat([self.rows, projection(tokens[stay.to(tokens.device)]).float().cpu()])
        numbers = torch.cat([self._numbers, numbers[stay]])
        stay = self._lowest(numbers)
        self.rows, self._numbers = rows[stay], numbers[stay]

    @staticmethod
    def _lowest(numbers: Tensor) -> Tensor:
        return numbers.argsort()[:MOST_CANDIDATES].sort().values


def _within(points: Tensor, boxes: Tensor) -> Tensor:
    """Return which points `(L, 2)` lie in a box `(n, 4)` (centre, width, height), as `(L,)` bool."""
    return ((points[:, None] - boxes[None, :, :2]).abs() <= boxes[None, :, 2:] / 2).all(-1).any(-1)


def _drawn(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return at most `count` of the rows, in random order."""
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _distinct(rows: Tensor) -> Tensor:
    """Return the rows without repetitions. Prompts that start alike would stay alike.

    Before the first fusion layer, a word has the same state for all images.
    """
    # Computed in double precision, because `cdist` computes distances from products.
    near = torch.cdist(rows.double(), rows.double()) < 1e-4 * rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return rows[~near.tril(-1).any(-1)]


def _prototypes(rows: Tensor, count: int, kind: str, generator: torch.Generator) -> Tensor:
    """Return `count` prototypes `(count, E)` of the rows `(n, E)`; n is at least `count`."""
    rows = _drawn(rows, len(rows), generator)
    if kind == "random":
        return rows[:count]
    if kind == "mean":
        return torch.stack([group.mean(0) for group in rows.tensor_split(count)])
    # Imported here, because the core of the package does not need SciPy.
    from scipy.cluster.vq import kmeans2

    seed = int(torch.randint(2**31, (), generator=generator))
    centres, _ = kmeans2(rows.double().numpy(), count, minit="++", seed=seed, missing="warn")
    return torch.from_numpy(centres).to(rows.dtype)
