"""An orthonormal basis of a matrix's leading right singular directions, for a batch [k, ...] of matrices at once.

`total` sums a tensor over the ranks that hold the rows; every function returns bitwise the same basis on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

EXTRA = 16
"""Directions the range finder carries beyond those that are kept (Halko, Martinsson and Tropp 2011, section 4)."""
PASSES = 2
"""Power passes of the range finder."""
INERTIA = 1e-3
"""Of the old basis in what Cholesky QR factors, relative to each column: keeps a rank-deficient product regular."""
SHIFT = 1e-6
"""Added to the diagonal of the first Gram matrix, whose columns have norm one."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Products in float32 proper: TF32 loses small eigenvalues and, after a spike, turns a basis by 90 degrees."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def orth(y: Tensor, old: Tensor, how: str) -> Tensor:
    """Orthonormal columns with the span of `y` [k, n, r]; `old`, an orthonormal basis, where `y` is zero.

    `qr` is Householder's, its signs fixed so that diag(R) >= 0. `cholesky` is three passes of batched Cholesky QR, the
    first one shifted: on accelerators many times faster, and regular for any rank of `y` because a little of `old` is
    mixed in.
    """
    if how == "qr":
        q, r = torch.linalg.qr(y)
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(y.dtype)
        return torch.where(y.abs().amax(dim=(-2, -1), keepdim=True) > 0, q * signs.unsqueeze(-2), old)
    largest = y.abs().amax(dim=-2, keepdim=True)
    y = y / torch.where(largest > 0, largest, 1.0)  # or the squares of small gradients' products are zero
    size = torch.linalg.vector_norm(y, dim=-2, keepdim=True)
    y = y / torch.where(size > 0, size, 1.0) + INERTIA * old
    y = y / torch.linalg.vector_norm(y, dim=-2, keepdim=True)
    for shift in (SHIFT, 0.0, 0.0):
        gram = y.mT @ y
        gram.diagonal(dim1=-2, dim2=-1).add_(shift)
        upper = torch.linalg.cholesky_ex(gram, upper=True).L
        y = torch.linalg.solve_triangular(upper, y, upper=True, left=False)
    return y


def from_svd(g: Tensor, r: int) -> Tensor:
    """The first r right singular vectors [k, n, r] of whole matrices `g` [k, m, n]."""
    return torch.linalg.svd(g, full_matrices=False).Vh[..., :r, :].mT.contiguous()


def from_range(g: Tensor, r: int, total: Callable[[Tensor], Tensor], how: str) -> Tensor:
    """About the same from any rows of `g` [k, rows, n], without the whole: r + 16 directions that are the same on every
    rank, two power passes, and the leading r of what they span. A zero `g` gives an orthonormal basis too."""
    k, n = g.size(0), g.size(-1)
    start = torch.randn(n, min(n, r + EXTRA), generator=torch.Generator().manual_seed(0), dtype=g.dtype)
    q = torch.linalg.qr(start)[0].to(g.device).expand(k, -1, -1)
    for _ in range(PASSES):
        q = orth(total(g.mT @ (g @ q)), q, how)
    image = g @ q
    vectors = torch.linalg.eigh(total(image.mT @ image)).eigenvectors
    return orth(q @ vectors[..., -r:].flip(-1), q[..., :r], how)
