"""What transformers does by itself when it resizes (since 4.46), for comparison.

N(mean, 1e-9 * covariance) over all old rows, those that never trained included; where that covariance does not count
as positive definite there, the plain mean (which happens often: transformers #35075)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapt.components import initialisers
from adapt.conversion.initialisers.base import Initialiser, Table

SCALE = 1e-9


@dataclass(frozen=True, kw_only=True)
class HfConfig:
    pass


@initialisers.register("hf")
def hf(config: HfConfig) -> Initialiser:
    return _rows


def _rows(table: Table) -> torch.Tensor:
    mean = table.rows.mean(0)
    centred = table.rows - mean
    covariance = SCALE * (centred.T @ centred / len(centred))
    if not torch.distributions.constraints.positive_definite.check(covariance).all():
        return mean.expand(len(table.pieces), -1).clone()
    return mean + table.normal() @ torch.linalg.cholesky(covariance).T
