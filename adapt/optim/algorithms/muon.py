"""Muon (Jordan et al., 2024; at scale: Liu et al., arXiv 2502.16982): momentum made orthogonal.

    M <- b M + (1 - b) G        H = (1 - b) G + b M (nesterov) or M        W <- (1 - lr wd) W - lr s NewtonSchulz(H)

The scale s of an m x n matrix is sqrt(max(1, m/n)) (`original`) or 0.2 sqrt(max(m, n)) (`match_rms_adamw`: updates with
the root mean square of AdamW's, so that its rate and decay carry over). Momentum is kept row by row where the parameter
is; only Newton-Schulz needs whole matrices, which their owners work out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from adapt.optim import matrices, newton_schulz
from adapt.optim.algorithms import Footprint, Shard, local
from adapt.optim.exchange import Exchange, Grid, share, traffic
from adapt.optim.matrices import Parts
from adapt.optim.newton_schulz import flops, orthogonalise

CHUNK_BYTES = 2**28
"""Of float32 rows that one rank sends to owners at once; one such chunk is in flight while the one before is computed."""
SCALES = {
    "original": lambda m, n: sqrt(max(1, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * sqrt(max(m, n)),
}


@dataclass
class Matrix:
    """This rank's rows of one m x n matrix: views of the parameter and of the momentum as it is read out."""

    m: int
    n: int
    heights: tuple[int, ...]
    grid: Grid
    value: Tensor
    momentum: Tensor
    owner: int = 0

    def alike(self) -> tuple:
        return self.m, self.n, self.heights, self.grid, self.value.dtype, self.value.device


class Muon:
    def state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        dtype = getattr(torch, group["momentum_dtype"])
        return {"momentum": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)}

    def footprint(self, held: Shard, group: dict[str, Any], moved: int) -> Footprint:
        size = prod(held.shape)
        sent = moved * (2 * held.exchanged(size) + held.shared(size))
        return Footprint(held.local * getattr(torch, group["momentum_dtype"]).itemsize, sent, CHUNK_BYTES)

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor | None],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
    ) -> None:
        momenta = [local(state["momentum"]) for state in states]
        reads = _read_out(momenta, gradients, group)
        values = [local(parameter) for parameter in parameters]
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        here: list[Matrix] = []
        for parameter, value, read in zip(parameters, values, reads, strict=True):
            parts = Parts.of(parameter, group["split"], group["transposed"])
            if parts.place == "gather" or (parts.place == "rows" and group["sharded"] == "gather"):
                _step_gathered(parameter, read, group)
            else:
                here += _matrices(parts, parameter, value, read)
        _step_all(here, group)


def _read_out(momenta: list[Tensor], gradients: list[Tensor | None], group: dict[str, Any]) -> list[Tensor]:
    """Update the momenta of this rank's rows and read them; a missing gradient counts as zeros."""
    beta = group["momentum"]
    grads = [
        torch.zeros_like(m) if g is None else local(g).to(m.dtype) for m, g in zip(momenta, gradients, strict=True)
    ]
    torch._foreach_lerp_(momenta, grads, 1 - beta)
    if not group["nesterov"]:
        return momenta
    return list(torch._foreach_lerp(grads, momenta, beta))


def _matrices(parts: Parts, parameter: Tensor, value: Tensor, read: Tensor) -> Iterator[Matrix]:
    for piece in matrices.pieces(parts, parameter):
        views = (matrices.view(t, piece, parts.transposed) for t in (value, read))
        yield Matrix(piece.m, piece.n, piece.heights, piece.grid, *views)


def _step_all(here: list[Matrix], group: dict[str, Any]) -> None:
    """Chunk by chunk; the rows of the next one travel while this one is orthogonalised."""
    for one, owner in zip(here, share([(one.grid, flops(one.m, one.n)) for one in here]), strict=True):
        one.owner = owner
    buckets: dict[tuple, list[Matrix]] = {}
    for one in here:
        buckets.setdefault(one.alike(), []).append(one)
    coming = None
    for chunk in [*(chunk for bucket in buckets.values() for chunk in _chunks(bucket)), None]:
        sent, coming = coming, None if chunk is None else _Sent(chunk, group)
        if sent is not None:
            sent.finish()


def _chunks(bucket: list[Matrix]) -> Iterator[list[Matrix]]:
    """On the CPU one whole matrix at a time: batched products are slower there."""
    first = bucket[0]
    size = max(1, CHUNK_BYTES * first.grid.ranks // max(1, 4 * first.m * first.n))
    if first.value.device.type in newton_schulz.LOOPED and first.grid.ranks == 1:
        size = 1
    for start in range(0, len(bucket), size):
        yield bucket[start : start + size]


class _Sent:
    """A chunk on its way to its owners."""

    def __init__(self, items: list[Matrix], group: dict[str, Any]):
        self.items, self.group, first = items, group, items[0]
        self.dtype = ns_dtype(group, first.value.device)
        self.exchange = Exchange(first.grid, tuple(one.owner for one in items), first.heights, first.n)
        moved = self.dtype if first.grid.ranks > 1 else first.momentum.dtype  # what it would be rounded to anyway
        self.whole = self.exchange.to_owners([one.momentum for one in items], moved)

    def finish(self) -> None:
        group, first = self.group, self.items[0]
        done = _orthogonal(self.whole(), group, self.dtype)
        values = [one.value for one in self.items]
        rows = [row.to(v.dtype) for row, v in zip(self.exchange.to_rows(done), values, strict=True)]
        scale = SCALES[group["scale"]](first.m, first.n)
        if isinstance(group["lr"], Tensor):  # as a number it would wait for the device
            torch._foreach_mul_(rows, group["lr"] * -scale)
            torch._foreach_add_(values, rows)
        else:
            torch._foreach_add_(values, rows, alpha=-group["lr"] * scale)


def _orthogonal(x: Tensor, group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    return orthogonalise(x, steps=group["ns_steps"], coefficients=group["ns_coefficients"], dtype=dtype)


def ns_dtype(group: dict[str, Any], device: torch.device) -> torch.dtype:
    """What Newton-Schulz computes in."""
    if group["ns_dtype"] == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, group["ns_dtype"])


def _step_gathered(parameter: Tensor, read: Tensor, group: dict[str, Any]) -> None:
    """Newton-Schulz on every rank, of one parameter at a time: what a sharding without whole rows needs, and what the
    owners' is tested by."""
    spread = torch.zeros_like(parameter, dtype=read.dtype)
    local(spread).copy_(read)
    traffic["all_gather"] += read.nbytes * (parameter.device_mesh.size() - 1)
    whole = matrices.gathered(spread)
    update = torch.zeros_like(whole)
    parts = Parts.of(whole, group["split"], group["transposed"])
    _step_all(list(_matrices(parts, whole, update, whole)), group)
    matrices.put_back(update, spread)
    local(parameter).add_(local(spread))


algorithm = Muon()
