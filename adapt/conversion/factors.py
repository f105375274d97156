"""Low-rank factors of a projection, best for its weights or for its outputs (x-ecomla spec, section 2).

The left singular vectors come from the eigenvectors of the Gram matrix M C Mᵀ, in float64. The down matrix is Uᵀ M, so
that up @ down = U Uᵀ M is a projection: exact at full rank whatever the conditioning, and with `covariance` no inverse
root of it is ever formed.

Legend: m outputs, d inputs, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Sigma = Literal["down", "up", "sqrt"]


@dataclass(frozen=True)
class Spectrum:
    """The whole decomposition of M [m, d]; `factors` cuts it."""

    basis: Tensor
    """[m, k] float64, orthonormal columns, the most important first; k = min(m, d)."""
    down: Tensor
    """[k, d] float64: basisᵀ M."""
    values: Tensor
    """[k] float64, descending: singular values of M (with `covariance`: of M C^1/2)."""

    def factors(self, rank: int, sigma: Sigma = "down") -> tuple[Tensor, Tensor]:
        """(up [m, rank], down [rank, d]), float64. Their product is the best approximation of M of that rank: in the
        Frobenius norm, with `covariance` in the mean squared error of the outputs (Eckart-Young). `sigma` says which of
        the two carries the singular values."""
        up, down = self.basis[:, :rank], self.down[:rank]
        if sigma == "down":
            return up, down
        scale = self.values[:rank].clamp_min(self.values[0] * 1e-12)  # null directions are zero in `down` anyway
        scale = scale if sigma == "up" else scale.sqrt()
        return up * scale, down / scale[:, None]

    def rank_of_energy(self, share: float) -> int:
        """Smallest R whose first R squared values are `share` of all."""
        energy = self.values.square()
        wanted = share * energy.sum() * (1 - 1e-6)  # the last one is not worth a rounding error
        return min(len(energy), int(torch.searchsorted(energy.cumsum(0), wanted)) + 1)


def spectrum(matrix: Tensor, covariance: Tensor | None = None) -> Spectrum:
    """matrix [m, d]; covariance [d, d] of its inputs, or None for plain weights."""
    matrix = matrix.double()
    tall = matrix.shape[0] > matrix.shape[1]
    frame, core = torch.linalg.qr(matrix) if tall else (None, matrix)  # the same Gram matrix, but [d, d]
    gram = core @ core.T if covariance is None else core @ covariance.double() @ core.T
    energy, basis = _eigh((gram + gram.T) / 2)
    basis = _signed(basis.flip(1))
    down = basis.T @ core
    return Spectrum(basis if frame is None else frame @ basis, down, energy.flip(0).clamp_min(0).sqrt())


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """On CPUs by numpy's LAPACK: the same divide and conquer as torch's, in two thirds of the time."""
    if gram.device.type != "cpu":
        return torch.linalg.eigh(gram)
    energy, basis = np.linalg.eigh(gram.detach().numpy())
    return torch.from_numpy(energy), torch.from_numpy(basis)


def _signed(basis: Tensor) -> Tensor:
    """Eigenvectors are defined up to their sign: the largest entry is positive, so that all ranks agree."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0)
