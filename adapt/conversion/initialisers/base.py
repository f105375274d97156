"""What an initialiser of new embedding rows sees, and what it gives.

R old rows, N new tokens, d width; T: the rows of old tokens that have learned something
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from adapt.data.noise import generator

if TYPE_CHECKING:
    from adapt.conversion.texts import Extension


@dataclass(frozen=True, eq=False)
class Table:
    """One matrix before it grows: the embedding (tied to the head or not), or the head that is not tied to it."""

    rows: Tensor
    """[R, d] fp32."""
    trained: Tensor
    """[R] bool: T."""
    pieces: Sequence[tuple[int, ...]]
    """[N] old ids of each new token's text, in reading order; () of a token whose text says nothing (a new marker)."""
    side: Literal["input", "output"]
    """`output`: the rows of an untied head."""
    seed: int = 0
    """Of whatever is drawn."""
    extension: Extension | None = None
    """The recipe, the new tokens' ids, and through them texts: for what learns how new tokens are used. The same object
    for both matrices of an untied model."""

    @cached_property
    def mean(self) -> Tensor:
        """[d]: mu, the mean over T."""
        return self.rows[self.trained].mean(0)

    def means(self) -> Tensor:
        """[N, d]: mu for every new token."""
        return self.mean.expand(len(self.pieces), -1).clone()

    def normal(self) -> Tensor:
        """[N, d] independent standard normal numbers, the same wherever they are drawn."""
        drawn = generator(self.seed, int(self.side == "output")).standard_normal((len(self.pieces), len(self.mean)))
        return torch.from_numpy(drawn).to(self.rows)

    def weighted(self, weights: Callable[[int], Sequence[float]]) -> Tensor:
        """[N, d]: sums of the rows of each token's pieces; `weights(k)` are those of k pieces, in reading order, and
        add up to 1. A token without pieces gets mu."""
        owners = [i for i, pieces in enumerate(self.pieces) if pieces]
        found = self.means()
        if owners:
            chosen = [self.pieces[i] for i in owners]
            found[owners] = torch.nn.functional.embedding_bag(
                torch.tensor([p for pieces in chosen for p in pieces], device=self.rows.device),
                self.rows,
                torch.tensor([0, *accumulate(len(p) for p in chosen[:-1])], device=self.rows.device),
                mode="sum",
                per_sample_weights=torch.tensor(
                    [w for pieces in chosen for w in weights(len(pieces))], device=self.rows.device
                ).to(self.rows),
            )
        return found


class Initialiser(Protocol):
    def __call__(self, table: Table) -> Tensor:
        """[N, d] fp32: the rows of the new tokens."""


def gaussian(table: Table, mean: Tensor, rows: Tensor, scale: float) -> Tensor:
    """[N, d] from N(mean, scale * covariance of `rows` [n, d]); the covariance may be singular."""
    centred = (rows - rows.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    root = vectors * (scale * values.clamp(min=0)).sqrt()  # root @ root.T is the covariance
    return mean + table.normal() @ root.T.to(table.rows)


def rescaled(table: Table, rows: Tensor) -> Tensor:
    """`rows` [N, d] as far from mu as trained rows usually are (averages of many rows are near it); a row that is mu
    stays."""
    usual = (table.rows[table.trained] - table.mean).norm(dim=1).median()
    away = rows - table.mean
    size = away.norm(dim=1, keepdim=True)
    return torch.where(size > 1e-6 * usual, table.mean + away * usual / size.clamp(min=1e-30), rows)
