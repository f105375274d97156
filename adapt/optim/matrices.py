"""The matrices inside a parameter: its blocks of rows if it is fused, its experts if it has three dimensions, and of each
the rows that this rank holds.

FSDP2 cuts dimension 0 into runs of ceil(rows / ranks); the last ranks may have fewer, or none. For a 2-D weight these are
rows of the matrix, for experts whole matrices, for a weight stored [in, out] columns. The first two are stepped where they
lie; whatever else a mesh may hold is gathered, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from adapt.optim.algorithms import local
from adapt.optim.exchange import Grid


@dataclass(frozen=True)
class Parts:
    """What a parameter is made of, by its global shape: the same on every rank."""

    experts: int | None
    """Matrices in dimension 0; None for a 2-D weight."""
    blocks: tuple[int, ...]
    """Rows (outputs) of each fused matrix."""
    n: int
    """Inputs."""
    transposed: bool
    place: str
    """`whole` here, `rows` of it here, whole `experts` here, or to `gather`."""

    @classmethod
    def of(cls, parameter: Tensor, split: Sequence[int] = (), transposed: bool = False) -> Parts:
        m, n = parameter.shape[-2:] if not transposed else parameter.shape[:-3:-1]
        experts = parameter.shape[0] if parameter.ndim == 3 else None
        return cls(experts, tuple(split) or (m,), n, transposed, _place(parameter, transposed))

    @property
    def m(self) -> int:
        return sum(self.blocks)

    def leading(self) -> tuple[int, ...]:
        """Dimensions of a state that each matrix has one of."""
        return (() if self.experts is None else (self.experts,)) + ((len(self.blocks),) if len(self.blocks) > 1 else ())

    def count(self) -> int:
        return prod(self.leading())


def _place(parameter: Tensor, transposed: bool) -> str:
    if not hasattr(parameter, "placements") or parameter.device_mesh.size() == 1:
        return "whole"
    from torch.distributed.tensor import Shard

    cuts = [p for p in parameter.placements if not p.is_replicate()]
    if not cuts:
        return "whole"
    if len(cuts) == 1 and type(cuts[0]) is Shard and cuts[0].dim == 0:
        if parameter.ndim == 3:
            return "experts"
        if not transposed and parameter.device_mesh.ndim <= 2:
            return "rows"
    return "gather"


@dataclass(frozen=True)
class Piece:
    """One m x n matrix of a parameter: where it lies in the local tensors."""

    m: int
    n: int
    index: tuple[int, ...]
    """Of its entry in states that every matrix has one of."""
    rows: slice
    """Among this rank's rows."""
    expert: int | None
    heights: tuple[int, ...]
    """Rows of it on every shard: a fused weight's blocks start anywhere in the shards."""
    grid: Grid


def pieces(parts: Parts, parameter: Tensor) -> Iterator[Piece]:
    """The matrices that this rank has a part in: the same ones, in the same order, on all ranks that share rows."""
    grid = Grid.of(parameter) if parts.place == "rows" else Grid()
    spans = _spans(grid.rows(parts.m))
    experts = [None] if parts.experts is None else range(local(parameter).shape[0])
    for expert in experts:
        start = 0
        for number, height in enumerate(parts.blocks):
            stop = start + height
            heights = tuple(max(0, min(b, stop) - max(a, start)) for a, b in spans)
            first = max(0, start - spans[grid.shard][0]) if heights[grid.shard] else 0
            index = (() if expert is None else (expert,)) + ((number,) if len(parts.blocks) > 1 else ())
            rows = slice(first, first + heights[grid.shard])
            yield Piece(height, parts.n, index, rows, expert, heights, grid)
            start = stop


def _spans(heights: list[int]) -> list[tuple[int, int]]:
    spans, start = [], 0
    for height in heights:
        spans.append((start, start + height))
        start += height
    return spans


def view(tensor: Tensor, piece: Piece, transposed: bool) -> Tensor:
    """This rank's rows [m_local, n] of one matrix, of a local tensor that is laid out as the parameter is."""
    one = tensor if piece.expert is None else tensor[piece.expert]
    return (one.mT if transposed else one)[piece.rows]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor, *, sharded: bool) -> Tensor:
    """Zeros of a global `shape` on the device of `like`; `sharded`: with dimension 0 cut as that of `like` is."""
    here = local(like)
    if not sharded or not hasattr(like, "placements"):
        return torch.zeros(shape, dtype=dtype, device=here.device)
    from torch.distributed.tensor import DTensor

    mine = torch.zeros((here.shape[0], *shape[1:]), dtype=dtype, device=here.device)
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(mine, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def gathered(tensor: Tensor) -> Tensor:
    """All of it on every rank. Collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def put_back(full: Tensor, tensor: Tensor) -> None:
    """This rank's part of `full` into `tensor`, without communication."""
    if not hasattr(tensor, "placements"):
        if full is not tensor:
            tensor.copy_(full)
        return
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh
    everywhere = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    local(tensor).copy_(local(everywhere.redistribute(placements=tensor.placements)))
