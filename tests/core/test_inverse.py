# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Inverse linear projections."""

import pytest
import scipy.linalg
import torch

from peft_sdpt.inverse import inverse_projection, reachable_basis, to_aligned_space, to_input_space

IN, OUT, N = 6, 24, 5


@pytest.fixture
def projection():
    torch.manual_seed(0)
    return torch.randn(OUT, IN), torch.randn(OUT)


def test_projecting_back_gives_the_nearest_reachable_point(projection):
    weight, bias = (t.double() for t in projection)
    tokens = torch.randn(N, OUT, dtype=torch.float64)
    reached = to_input_space(tokens, inverse_projection(weight), bias) @ weight.T + bias
    basis = torch.linalg.qr(weight).Q
    nearest = (tokens - bias) @ basis @ basis.T + bias
    torch.testing.assert_close(reached, nearest, rtol=0, atol=1e-12)
    assert (reached - tokens).norm() > 1  # E is larger than d: not a true inverse


def test_one_token_can_stand_for_any_pair_where_the_space_is_wide_enough():
    """As docs/method.md says: 6 + 8 columns in a space of 24 are independent."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    weights, biases = (random(OUT, 6), random(OUT, 8)), (random(OUT), random(OUT))
    wanted = random(N, 6), random(N, 8)
    columns = torch.cat(weights, dim=1)
    right = [(x @ w.T + b) @ w for x, w, b in zip(wanted, weights, biases, strict=True)]
    tokens = torch.linalg.lstsq(columns.T, torch.cat(right, dim=1).T).solution.T
    for x, weight, bias in zip(wanted, weights, biases, strict=True):
        found = to_input_space(tokens, inverse_projection(weight), bias)
        torch.testing.assert_close(found, x, rtol=0, atol=1e-10)


def test_the_basis_of_what_projections_reach():
    """The orthogonal factor of the polar decomposition of all columns, which SciPy computes too."""
    torch.manual_seed(0)
    weights = torch.randn(OUT, 6).double(), torch.randn(OUT, 8).double()
    columns, basis = torch.cat(weights, dim=1), reachable_basis(weights)
    torch.testing.assert_close(basis, torch.from_numpy(scipy.linalg.polar(columns.numpy())[0]), rtol=0, atol=1e-10)
    torch.testing.assert_close(basis.T @ basis, torch.eye(14, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(basis @ basis.T @ columns, columns, rtol=0, atol=1e-10)
    # All that an inverse sees of a token is within it.
    tokens = torch.randn(N, OUT, dtype=torch.float64)
    for weight in weights:
        inverse = inverse_projection(weight)
        seen = to_input_space(to_aligned_space(tokens @ basis, basis), inverse, None)
        torch.testing.assert_close(seen, to_input_space(tokens, inverse, None), rtol=0, atol=1e-10)


def test_the_basis_moves_little_with_the_weights():
    """A singular vector may turn its sign or mix with its neighbours; coordinates must not."""
    torch.manual_seed(0)
    weights = [torch.linalg.qr(torch.randn(OUT, IN))[0], torch.randn(OUT, IN)]  # equal singular values among them
    rounded = [weight.bfloat16().float() for weight in weights]
    assert (reachable_basis(weights) - reachable_basis(rounded)).abs().max() < 0.02
    assert reachable_basis(rounded).dtype == torch.float32


def test_columns_that_are_not_independent_reach_less():
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN).double()
    basis = reachable_basis([weight, 2 * weight])
    assert basis.shape == (OUT, 2 * IN)
    assert torch.linalg.matrix_rank(basis) == IN
    torch.testing.assert_close(basis @ basis.T @ weight, weight, rtol=0, atol=1e-10)
    assert not reachable_basis([torch.zeros(OUT, IN)]).any()


def test_a_basis_without_weights():
    with torch.device("meta"):
        basis = reachable_basis([torch.empty(OUT, IN), torch.empty(OUT, 4)])
    assert basis.is_meta and basis.shape == (OUT, IN + 4)
    with torch.inference_mode():
        assert not reachable_basis([torch.randn(OUT, IN)]).is_inference()


def test_exact_inverse_where_the_projection_reaches_everything():
    torch.manual_seed(0)
    weight, bias = torch.randn(IN, IN).double(), torch.randn(IN).double()
    tokens = torch.randn(N, IN, dtype=torch.float64)
    reached = to_input_space(tokens, inverse_projection(weight), bias) @ weight.T + bias
    torch.testing.assert_close(reached, tokens, rtol=0, atol=1e-10)


def test_without_bias(projection):
    weight, bias = projection
    inverse, tokens = inverse_projection(weight), torch.randn(N, OUT)
    torch.testing.assert_close(to_input_space(tokens, inverse, None), tokens @ inverse.T)
    assert not torch.allclose(to_input_space(tokens, inverse, None), to_input_space(tokens, inverse, bias), atol=1e-3)


def test_rtol_drops_small_singular_values():
    torch.manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(OUT, IN).double()).Q,
        torch.linalg.qr(torch.randn(IN, IN).double()).Q,
    )
    values = torch.tensor([1.0, 0.5, 0.2, 0.11, 0.09, 0.001], dtype=torch.float64)
    weight = left * values @ right.T
    kept = torch.linalg.svdvals(inverse_projection(weight, rtol=0.1))
    expected = torch.tensor([1 / 0.11, 5, 2, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(kept, expected, rtol=1e-9, atol=1e-9)
    assert torch.linalg.svdvals(inverse_projection(weight))[0] == pytest.approx(1000)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtype_is_float32_or_better(projection, dtype, expected):
    weight = projection[0].to(dtype)
    inverse = inverse_projection(weight)
    assert inverse.dtype == expected
    torch.testing.assert_close(inverse.double(), torch.linalg.pinv(weight.double()), rtol=0, atol=1e-7)


def test_float32_weight_is_inverted_in_float64():
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(OUT, IN)).Q, torch.linalg.qr(torch.randn(IN, IN)).Q
    weight = left * torch.logspace(0, -5, IN) @ right.T
    exact = torch.linalg.pinv(weight.double())
    error = (inverse_projection(weight).double() - exact).norm() / exact.norm()
    in_float32 = (torch.linalg.pinv(weight).double() - exact).norm() / exact.norm()
    assert error < 1e-7 < in_float32


def test_inverse_is_usable_in_training_after_inference_mode(projection):
    with torch.inference_mode():
        inverse = inverse_projection(projection[0].clone())
    tokens = torch.randn(N, OUT, requires_grad=True)
    to_input_space(tokens, inverse, None).sum().backward()
    torch.testing.assert_close(tokens.grad, inverse.sum(0).expand(N, -1))


def test_autocast_does_not_lower_the_precision(projection):
    weight, bias = projection
    inverse, tokens = inverse_projection(weight), torch.randn(N, OUT)
    expected = to_input_space(tokens, inverse, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(to_input_space(tokens, inverse, bias), expected)


def test_meta_weight_gives_a_meta_inverse():
    inverse = inverse_projection(torch.empty(OUT, IN, device="meta", dtype=torch.bfloat16))
    assert inverse.is_meta and inverse.shape == (IN, OUT) and inverse.dtype == torch.float32


def test_quantised_weight_is_refused():
    with pytest.raises(TypeError, match=r"torch\.int8.*floating point"):
        inverse_projection(torch.zeros(OUT, IN, dtype=torch.int8))
