# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Inverse linear projections: from the aligned space of a fusion layer back to its input spaces.

Source: SDPT, arXiv 2407.11414, section 3 (unified prototype tokens and inverse linear projections).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

# Devices whose linear algebra runs in float64. On others (mps, some xpu) the decomposition runs on the CPU, and only
# its result moves.
_FLOAT64_DEVICES = ("cpu", "cuda", "meta")


@torch.no_grad()
def inverse_projection(weight: torch.Tensor, rtol: float | None = None) -> torch.Tensor:
    """Compute the Moore-Penrose inverse of the weight of a linear projection.

    The computation is in float64 whatever the dtype of `weight`, because the trained projections of known base models
    have condition numbers of several hundred.

    Args:
        weight: Weight as `nn.Linear` stores it, `(out_features, in_features)`, floating point.
        rtol: Singular values below `rtol` times the largest are dropped (truncated inverse). None keeps all that are
            numerically non-zero, as the paper does.

    Returns:
        `(in_features, out_features)` on the device of `weight`, in float64 for a float64 weight and in float32 for any
        other. It is never an inference-mode tensor, so that training can use it.

    Raises:
        TypeError: `weight` is not floating point, for instance a quantised weight.
        ValueError: `weight` is not finite.

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
    # A forward under inference_mode may call this, and training could not use an inference tensor.
    with torch.inference_mode(False):
        inverse: torch.Tensor = torch.linalg.pinv(_exact(weight), rtol=rtol)
        return inverse.to(device=weight.device, dtype=dtype)


def _exact(weight: torch.Tensor) -> torch.Tensor:
    exact = weight.detach()
    exact = (exact if exact.device.type in _FLOAT64_DEVICES else exact.cpu()).double()
    # For weights that are not finite, `pinv` sometimes raises an error and sometimes returns zeros.
    if not exact.isfinite().all():
        raise ValueError("cannot invert a projection weight with numbers that are not finite: the model is damaged")
    return exact


@torch.no_grad()
def reachable_basis(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute an orthonormal basis of the space that some projections reach together.

    Only the part of a token within this space has an effect: `pinv(W) = pinv(W) B B^T`. Of all such bases, this one is
    the nearest to the columns of the weights: the orthogonal factor of their polar decomposition. It is unique and
    moves little when the weights do, so coordinates in it mean the same on every machine, and nearly the same in every
    dtype.

    Args:
        weights: Weight of each projection, `(out_features, in_features)`, floating point.

    Returns:
        `(out_features, sum of in_features)` on the device of the first weight, in float64 for float64 weights and in
        float32 for others. If the columns are linearly dependent, the basis spans a smaller space, and some directions
        of coordinates have no effect. It is never an inference-mode tensor.

    Raises:
        ValueError: A weight is not finite.
    """
    device = weights[0].device
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    if weights[0].is_meta:
        shape = len(weights[0]), sum(weight.shape[1] for weight in weights)
        return torch.empty(shape, dtype=dtype, device="meta")
    with torch.inference_mode(False):
        columns = torch.cat([_exact(weight) for weight in weights], dim=1)
        left, values, right = torch.linalg.svd(columns, full_matrices=False)
        # `pinv` treats singular values below this threshold as zero.
        nonzero = values > values[0] * max(columns.shape) * torch.finfo(values.dtype).eps
        basis: torch.Tensor = left[:, nonzero] @ right[nonzero]
        return basis.to(device=device, dtype=dtype)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Return a context in which autocast does not change the dtype of products."""
    # `torch.amp.is_autocast_available` would tell, but `torch.compile` of torch 2.11 cannot call it.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def to_aligned_space(coordinates: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Map coordinates `(..., r)` in a basis `(E, r)` to tokens `(..., E)`, in the wider of the two dtypes."""
    dtype = torch.promote_types(coordinates.dtype, basis.dtype)
    with without_autocast(coordinates.device.type):
        # Copied, because the alignment of a tensor in memory affects the rounding of its products, and a loaded tensor
        # is aligned as in its file.
        return coordinates.to(dtype, copy=True) @ basis.to(dtype).T


def to_input_space(tokens: torch.Tensor, inverse: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Map tokens of the aligned space to the input space of a projection: `(Z - b) pinv(W)^T`.

    The projection of the result is `W pinv(W) (Z - b) + b`. This is `Z` itself if `W` reaches all of the aligned space,
    and otherwise the point nearest to `Z` that the projection can reach.

    Args:
        tokens: Tokens, `(N, out_features)`.
        inverse: Inverse from `inverse_projection`, `(in_features, out_features)`.
        bias: Bias of the projection, `(out_features,)`, or None.

    Returns:
        `(N, in_features)` in the wider of the dtypes of `tokens` and `inverse`.
    """
    dtype = torch.promote_types(tokens.dtype, inverse.dtype)
    # Autocast would compute this product in 16 bit, which the large entries of the inverse do not tolerate.
    with without_autocast(tokens.device.type):
        centred = tokens.to(dtype)
        if bias is not None:
            centred = centred - bias.to(dtype)
        return centred @ inverse.to(dtype).T
