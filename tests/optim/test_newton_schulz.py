"""Newton-Schulz against the polar factor, its two forms against each other, and the matrices at the edges."""

from __future__ import annotations

import pytest
import torch

from adapt.optim import newton_schulz
from adapt.optim.newton_schulz import QUINTIC, orthogonalise

SHAPES = [(24, 24), (40, 24), (24, 40), (310, 320), (700, 320), (320, 700), (1, 9), (9, 1)]


def quintic(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The polynomial on singular values, in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = QUINTIC
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_float32_is_the_polynomial_of_the_singular_values(m, n):
    torch.manual_seed(m + n)
    x = torch.randn(m, n)
    expected = quintic(x)
    assert (orthogonalise(x) - expected).norm() < 2e-4 * expected.norm()


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_singular_values_end_in_the_known_band_and_vectors_stay(m, n):
    """Within 0.65 to 1.25 where the input's lie within a factor of a hundred; U and V are those of the polar factor."""
    torch.manual_seed(m + n)
    p = min(m, n)
    u, v = torch.linalg.qr(torch.randn(m, p))[0], torch.linalg.qr(torch.randn(n, p))[0]
    x = (u * torch.logspace(0, -2, p)) @ v.T
    y = orthogonalise(x)
    inner = u.T @ y @ v
    assert inner.diagonal().min() > 0.65
    assert inner.diagonal().max() < 1.25
    assert (inner - torch.diag(inner.diagonal())).norm() < 2e-3 * inner.norm()
    assert (y - u @ inner @ v.T).norm() < 2e-3 * y.norm()


@pytest.mark.parametrize("smallest", [0, -3, -6, -9])
def test_the_gram_form_equals_the_direct_one_on_any_spectrum(smallest):
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(200, 200))[0], torch.linalg.qr(torch.randn(300, 200))[0]
    x = (u * torch.logspace(0, smallest, 200)) @ v.T
    x = x / x.norm()
    expected = newton_schulz._direct(x.double(), 5, *QUINTIC)
    spectral = torch.linalg.matrix_norm(newton_schulz._gram(x, 5, *QUINTIC) - expected, 2)
    assert spectral < 1.5e-3
    assert torch.linalg.matrix_norm(newton_schulz._direct(x, 5, *QUINTIC) - expected, 2) < 5e-5


def test_rank_deficient_matrices_stay_in_their_span():
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(60, 3))[0], torch.linalg.qr(torch.randn(90, 3))[0]
    y = orthogonalise(left @ right.T)
    assert (y - left @ (left.T @ y)).norm() < 1e-3 * y.norm()
    assert 0.65 < y.norm() / 3**0.5 < 1.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_does_not_matter_and_zero_stays_zero(dtype, scale):
    torch.manual_seed(0)
    x = torch.randn(20, 30)
    y, z = orthogonalise(x, dtype=dtype), orthogonalise(x * scale, dtype=dtype)
    assert y.dtype == z.dtype == dtype
    assert (y.float() - z.float()).norm() < (1e-4 if dtype == torch.float32 else 0.1) * y.float().norm()
    assert orthogonalise(torch.zeros(20, 30), dtype=dtype).abs().max() == 0


def test_bfloat16_is_close_to_float32():
    torch.manual_seed(0)
    x = torch.randn(64, 96)
    y = orthogonalise(x)
    assert (orthogonalise(x, dtype=torch.bfloat16).float() - y).norm() < 0.05 * y.norm()


def test_a_batch_is_its_matrices_and_the_floor_zeroes_some():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 24)
    y = orthogonalise(x)
    for i in range(2):
        for j in range(3):
            assert torch.equal(y[i, j], orthogonalise(x[i, j]))
    norm = torch.linalg.matrix_norm(x)
    floored = orthogonalise(x, floor=norm.median().expand(2, 3))
    gone = norm <= norm.median()
    assert 0 < gone.sum() < 6
    assert floored[gone].abs().max() == 0
    assert torch.equal(floored[~gone], y[~gone])


@pytest.mark.parametrize("form", [newton_schulz._direct, newton_schulz._gram])
def test_batched_products_equal_looped_ones(form):
    """What an accelerator runs, here on the CPU: blocks of symmetric products are for single matrices only."""
    torch.manual_seed(0)
    x = torch.randn(2, 300, 400)
    x = x / torch.linalg.matrix_norm(x)[..., None, None]
    batched = form(x, 5, *QUINTIC)
    for one, expected in zip(x, batched, strict=True):
        assert (form(one, 5, *QUINTIC) - expected).norm() < 1e-4 * expected.norm()


def test_empty_matrices_and_batches_pass_through():
    for shape in [(0, 4), (4, 0), (2, 0, 4), (0, 4, 4)]:
        assert orthogonalise(torch.zeros(shape)).shape == shape
