# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""The dimension of the prompts of a fusion layer, and their initial values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .config import SDPTConfig
from .hosts import FusionHost

_INITIALISERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": lambda tokens: nn.init.uniform_(tokens, -1.0, 1.0),
    "normal": nn.init.normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "zeros": nn.init.zeros_,
    # Used until `initialize_sdpt_prototypes` is called.
    "prototypes": nn.init.normal_,
}


# With gates, the size of tokens does not decide how loud they are. Larger ones differ more from one another, and reach
# higher AP on new classes (docs/transfer.md).
_STD_WITH_GATES = 4.0


def prompt_dim(config: SDPTConfig, spec: FusionHost, projections: Sequence[nn.Linear]) -> int:
    """Return the dimension of a prompt: E of the aligned space, or less if the projections reach less of it.

    Args:
        config: Config of the adapter.
        spec: Spec of the fusion layer.
        projections: The projections of the layer that are inverted.
    """
    embed_dim = projections[0].out_features
    # The two modules of a split fusion layer do not know each other's projections.
    if config.prompt_space == "aligned" or spec.split:
        return embed_dim
    return min(embed_dim, sum(projection.in_features for projection in projections))


def init_prompts(config: SDPTConfig, dim: int, embed_dim: int, gated: bool = False) -> torch.Tensor:
    """Create prompts with the initial values that `config` asks for.

    They are drawn on the CPU from torch's default generator, so that a seed gives the same prompts on every device.
    Coordinates in an orthonormal basis start like tokens. The part of a token that has an effect is then equally large.

    Args:
        config: Config of the adapter.
        dim: Dimension of a prompt, see `prompt_dim`.
        embed_dim: Dimension E of the aligned space, which determines the size of some initial values.
        gated: Whether the prompts have gates. If so, `"normal"` has a standard deviation of 4 instead of 1, and so has
            `"prototypes"`.

    Returns:
        `(N, dim)`, or `(2, N, dim)` in independent mode (image prompts, text prompts); float32.
    """
    prompts = torch.empty(config.prompt_shape(dim), device="cpu", dtype=torch.float32)
    initialise = _INITIALISERS[_name_of_init(config)]
    # Each set is initialized on its own, because torch would read a 3-D tensor as the weight of a convolution.
    for prompt_set in prompts.view(-1, config.num_virtual_tokens, dim):
        if _name_of_init(config).startswith(("xavier", "kaiming")):
            prompt_set.copy_(initialise(torch.empty(len(prompt_set), embed_dim, device="cpu"))[:, :dim])
        else:
            initialise(prompt_set)
    return prompts * _STD_WITH_GATES if gated and _name_of_init(config) in ("normal", "prototypes") else prompts


def _name_of_init(config: SDPTConfig) -> str:
    return "normal" if isinstance(config.init_weights, bool) else config.init_weights
