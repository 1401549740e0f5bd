# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Inverse linear projections: from the aligned space of a fusion layer back to its input spaces.

Source: SDPT, arXiv 2407.11414, section 3 (unified prototype tokens and inverse linear projections).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

# Devices whose linear algebra runs in float64. Elsewhere (mps, some xpu) the decomposition is done
# on the CPU, which is exact there too, and only its result moves.
_FLOAT64_DEVICES = ("cpu", "cuda", "meta")


@torch.no_grad()
def inverse_projection(weight: torch.Tensor, rtol: float | None = None) -> torch.Tensor:
    """Moore-Penrose inverse of the weight of a linear projection.

    Computed in float64 whatever the dtype of `weight`, because the trained projections of the known
    hosts have condition numbers of several hundred.

    Args:
        weight: `(out_features, in_features)`, as `nn.Linear` stores it. Floating point.
        rtol: singular values below `rtol` times the largest are dropped (truncated inverse). None
            keeps all that are numerically non-zero, as the paper does.

    Returns:
        `(in_features, out_features)` on the device of `weight`, float64 for a float64 weight and
        float32 for any other. Never an inference-mode tensor, so that training may use it.

    Raises:
        TypeError: `weight` is not floating point (a quantised weight).

    Example:
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
        >>> inverse_projection(weight) @ weight
        tensor([[1., 0.],
                [0., 1.]])
    """
    if not weight.is_floating_point():
        raise TypeError(
            f"cannot invert a projection weight of dtype {weight.dtype}: SDPT needs the projections "
            "of the fusion layers in a floating point dtype (leave them out of quantisation)"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.is_meta:
        return torch.empty(weight.shape[::-1], dtype=dtype, device="meta")
    # Called from a forward under inference_mode, the result would else be unusable in training.
    with torch.inference_mode(False):
        inverse = torch.linalg.pinv(_exact(weight), rtol=rtol)
        return inverse.to(device=weight.device, dtype=dtype)


def _exact(weight: torch.Tensor) -> torch.Tensor:
    exact = weight.detach()
    return (exact if exact.device.type in _FLOAT64_DEVICES else exact.cpu()).double()


@torch.no_grad()
def reachable_basis(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Orthonormal basis of what some projections reach together.

    Of a token of the aligned space, only the part within it has an effect: `pinv(W) = pinv(W) B B^T`. Of all such bases
    it is the one nearest to the columns themselves, the orthogonal factor of their polar decomposition, which is unique
    and moves little when weights do. Coordinates in it therefore mean the same on every machine, and nearly the same in
    every dtype of the host.

    Args:
        weights: `(out_features, in_features)` of each projection. Floating point.

    Returns:
        `(out_features, sum of in_features)`, on the device of the first weight, float64 for float64 weights and float32
        for others. Where the columns are not independent, the basis is one of the smaller space that they span, and
        some directions of coordinates have no effect. Never an inference-mode tensor.
    """
    device = weights[0].device
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    if weights[0].is_meta:
        shape = len(weights[0]), sum(weight.shape[1] for weight in weights)
        return torch.empty(shape, dtype=dtype, device="meta")
    with torch.inference_mode(False):
        columns = torch.cat([_exact(weight) for weight in weights], dim=1)
        left, values, right = torch.linalg.svd(columns, full_matrices=False)
        # As pinv tells zeros from the rest.
        held = values > values[0] * max(columns.shape) * torch.finfo(values.dtype).eps
        return (left[:, held] @ right[held]).to(device=device, dtype=dtype)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context in which products keep the dtype of their factors."""
    has_autocast = torch.amp.is_autocast_available(device_type)  # the meta device has none
    return torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()


def to_aligned_space(coordinates: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Tokens `(..., E)` of their coordinates `(..., r)` in a basis `(E, r)`, in the wider of the two dtypes."""
    dtype = torch.promote_types(coordinates.dtype, basis.dtype)
    with without_autocast(coordinates.device.type):
        # A copy: where a tensor lies decides how its products are rounded, and a loaded one lies as in its file.
        return coordinates.to(dtype, copy=True) @ basis.to(dtype).T


def to_input_space(tokens: torch.Tensor, inverse: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Map tokens of the aligned space to the input of a projection: `(Z - b) pinv(W)^T`.

    The projection of the result is `W pinv(W) (Z - b) + b`: `Z` itself where `W` reaches all of the
    aligned space, and else the point nearest to `Z` that the projection can reach.

    Args:
        tokens: `(N, out_features)`.
        inverse: `(in_features, out_features)`, from `inverse_projection`.
        bias: `(out_features,)` of the projection, or None.

    Returns:
        `(N, in_features)` in the wider of the dtypes of `tokens` and `inverse`.
    """
    dtype = torch.promote_types(tokens.dtype, inverse.dtype)
    # Autocast would do this product in 16 bit, where the large entries of the inverse drown.
    with without_autocast(tokens.device.type):
        centred = tokens.to(dtype)
        if bias is not None:
            centred = centred - bias.to(dtype)
        return centred @ inverse.to(dtype).T
