"""Newton-Schulz: the nearest semi-orthogonal matrix, roughly, by matrix products alone.

The quintic iteration of Jordan et al. (Muon, 2024), X <- aX + (bK + cK²)X with K = XXᵀ on the smaller side. With the usual
coefficients it does not converge: singular values end up between about 0.7 and 1.2, which is all Muon needs.

Two forms of the same polynomial. The direct one is the line above. For float32 matrices that are not nearly square the
Gram form iterates on K and Q alone, both p x p with p the smaller side, and touches the long side twice: X_T = Q_T X_0,
Q <- ZQ, K <- ZKZ, Z = aI + bK + cK². Everything in it is a polynomial in K_0, so the products commute and are symmetric, and
on the CPU only their lower block triangle is computed. K squares the condition number, so bfloat16 stays with the direct
form; in float32 the result is within about 5e-4 of it in the spectral norm (where bfloat16 is within a few 1e-2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients: the steepest slope at zero that keeps singular values near one."""
LOOPED = frozenset({"cpu"})
"""Devices where a product per matrix is faster than a batched one."""
SLIM = 1.25
"""Longer side over shorter from which the Gram form costs less than the direct one, counted in multiplications."""
BLOCK = 144
"""Rows of a block of a symmetric product: small enough to skip nearly half, large enough for the CPU's matrix product."""


def orthogonalise(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Sequence[float] = QUINTIC,
    dtype: torch.dtype = torch.float32,
    floor: Tensor | None = None,
) -> Tensor:
    """`x` [..., m, n] with its singular values driven to about one, in `dtype`; the scale of `x` does not matter.

    A matrix whose Frobenius norm is at most `floor` [...] becomes zero: with floor=None that is the zero matrix alone.
    A batch is one product per step, but for devices in LOOPED.
    """
    if x.ndim > 2 and x.device.type in LOOPED:
        floors = [None] * math.prod(x.shape[:-2]) if floor is None else floor.flatten()
        done = [
            orthogonalise(one, steps=steps, coefficients=coefficients, dtype=dtype, floor=least)
            for one, least in zip(x.flatten(0, -3), floors, strict=True)
        ]
        if len(done) == 1:
            return done[0].view(x.shape)
        return torch.stack(done).view(x.shape) if done else x.to(dtype)
    tall = x.size(-2) > x.size(-1)
    x = _normalised(x.mT if tall else x, dtype, floor)
    slim = dtype in (torch.float32, torch.float64) and x.size(-1) >= SLIM * x.size(-2)
    x = (_gram if slim else _direct)(x, steps, *coefficients)
    return x.mT if tall else x


def flops(m: int, n: int, steps: int = 5) -> int:
    """Of the direct form, per matrix: what owners are balanced by."""
    p, q = sorted((m, n))
    return steps * (4 * p * p * q + 2 * p**3)


def _normalised(x: Tensor, dtype: torch.dtype, floor: Tensor | None) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    least = 0.0 if floor is None else floor[..., None, None]
    return (x * torch.where(norm > least, 1 / norm, 0.0)).to(dtype)


def _direct(x: Tensor, steps: int, a: float, b: float, c: float) -> Tensor:
    for _ in range(steps):
        k = symmetric(x, x.mT)
        x = _product(symmetric(k, k, plus=k, beta=b, alpha=c), x, plus=x, beta=a)
    return x


def _gram(x: Tensor, steps: int, a: float, b: float, c: float) -> Tensor:
    k, q = symmetric(x, x.mT), None
    for left in reversed(range(steps)):
        z = symmetric(k, k, plus=k, beta=b, alpha=c)
        z.diagonal(dim1=-2, dim2=-1).add_(a)
        q = z if q is None else symmetric(z, q)
        if left:
            k = symmetric(z, symmetric(k, z))
    return x if q is None else q @ x


def _product(x: Tensor, y: Tensor, *, plus: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """alpha XY + beta `plus`, without a temporary."""
    if plus is None:
        return x @ y
    if x.ndim == 2:
        return torch.addmm(plus, x, y, beta=beta, alpha=alpha)
    lead = x.shape[:-2]
    done = torch.baddbmm(plus.flatten(0, -3), x.flatten(0, -3), y.flatten(0, -3), beta=beta, alpha=alpha)
    return done.unflatten(0, lead)


def symmetric(
    x: Tensor,
    y: Tensor,
    *,
    plus: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """alpha XY + beta `plus`, which is known to be symmetric: on the CPU its upper blocks are copied, not computed. Into
    `out` if given, which may be `plus`."""
    p = x.size(-2)
    if x.ndim > 2 or x.device.type != "cpu" or p < 2 * BLOCK:
        made = _product(x, y, plus=plus, beta=beta, alpha=alpha)
        return made if out is None else out.copy_(made)
    out = x.new_empty(p, p) if out is None else out
    for start in range(0, p, BLOCK):
        end = min(start + BLOCK, p)
        below = out[start:end, :end]
        if plus is None:
            torch.mm(x[start:end], y[:, :end], out=below)
        else:
            torch.addmm(plus[start:end, :end], x[start:end], y[:, :end], beta=beta, alpha=alpha, out=below)
        out[:start, start:end] = below[:, :start].mT
    return out
