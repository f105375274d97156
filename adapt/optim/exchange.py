"""Whole matrices from row shards and back: every matrix has one owner, and one all-to-all per direction serves a bucket.

Under FSDP2 a rank holds rows of every matrix, and some algorithms need all rows at once (Newton-Schulz, SOAP). Instead of
gathering every matrix on every rank, rank i sends its rows of matrix j to the owner of j, who sends rows of the result
back. A rank then holds, besides its shards, k/W of a bucket's matrices and works on them alone, exactly as one process
would. With HSDP the replicas share the work: an owner is one of replica x shard ranks, rows are gathered within its
replica only, and the rows of the result go to the other replicas in an all-gather.

Rows travel as they are, neither padded to a common height nor to a multiple of W matrices: all_to_all_single takes uneven
and empty parts, on NCCL and, as of torch 2.13, on gloo for every floating dtype.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


class Traffic(Counter[str]):
    """Bytes this rank has sent, by collective: an all-reduce counts 2(W-1)/W of its tensor (a ring), the others what
    leaves. Host integers: counting waits for nothing."""


traffic = Traffic()
"""Of this process, since it started or since somebody cleared it."""


@dataclass(frozen=True)
class Grid:
    """The replica x shard ranks that hold a parameter, its rows over the shards: contiguous chunks of ceil(m / shards) rows, the last ones short or empty."""

    shards: int = 1
    shard: int = 0
    replicas: int = 1
    replica: int = 0
    across_shards: dist.ProcessGroup | None = None
    across_replicas: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, parameter: Tensor) -> Grid:
        """Of a plain tensor or a DTensor that FSDP2 made: Shard(0) over one mesh axis, Replicate over at most one more.

        Raises NotImplementedError for other placements (tensor parallelism, strided shards).
        """
        if not isinstance(parameter, DTensor):
            return cls()
        mesh, given = parameter.device_mesh, parameter.placements
        rows = [axis for axis, placement in enumerate(given) if type(placement) is Shard and placement.dim == 0]
        copies = [axis for axis, placement in enumerate(given) if placement == Replicate()]
        if len(rows) + len(copies) != len(given) or len(rows) > 1 or len(copies) > 1:
            raise NotImplementedError(
                f"matrix optimizers handle parameters sharded by rows over one mesh axis and replicated over at most one "
                f"more; this one lies as {tuple(given)} on {mesh}"
            )
        found = cls()
        if rows:
            group = mesh.get_group(rows[0])
            found = cls(shards=group.size(), shard=group.rank(), across_shards=group)
        if copies:
            group = mesh.get_group(copies[0])
            found = cls(
                found.shards, found.shard, group.size(), group.rank(), found.across_shards, across_replicas=group
            )
        return found

    @property
    def ranks(self) -> int:
        return self.shards * self.replicas

    @property
    def rank(self) -> int:
        """Among `ranks`, as owners are numbered."""
        return self.replica * self.shards + self.shard

    def rows(self, m: int) -> list[int]:
        """Rows of each shard of a matrix of `m`."""
        chunk = -(-m // self.shards)
        return [max(0, min(chunk, m - chunk * shard)) for shard in range(self.shards)]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor over the shards in place (replicas hold the same); bitwise the same on each of them."""
        if self.shards > 1:
            traffic["all_reduce"] += 2 * (self.shards - 1) * values.numel() * values.element_size() // self.shards
            dist.all_reduce(values, group=self.across_shards)
        return values


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """An owner for each piece of work: the longest first, to whoever has least so far. The same on every rank."""
    loads = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        owners[piece] = rank
        heapq.heappush(loads, (load + costs[piece], rank))
    return owners


def share(work: Sequence[tuple[Grid, float]]) -> list[int]:
    """An owner for each matrix, given where it lies and what it costs: among the ranks of its own grid."""
    owners = [0] * len(work)
    for grid in dict.fromkeys(grid for grid, _ in work):
        places = [i for i, (of, _) in enumerate(work) if of == grid]
        for i, owner in zip(places, assign([work[i][1] for i in places], grid.ranks), strict=True):
            owners[i] = owner
    return owners


@dataclass(frozen=True)
class Exchange:
    """Of one bucket: k matrices of the same shape."""

    grid: Grid
    owners: tuple[int, ...]
    """Of each matrix, one of `grid.ranks`."""
    heights: tuple[int, ...]
    """Rows that each shard has of every matrix; any numbers (a fused weight's blocks start anywhere)."""
    n: int

    @property
    def mine(self) -> list[int]:
        """The matrices this rank owns."""
        return [i for i, owner in enumerate(self.owners) if owner == self.grid.rank]

    def to_owners(self, rows: list[Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
        """Start sending this rank's `rows` of all k matrices, k x [rows, n], cast to `dtype`. The call of what is returned
        waits for them and gives the whole matrices of `mine`, [len(mine), sum(heights), n]; with one rank perhaps the
        rows themselves."""
        if self.grid.ranks == 1:
            return lambda: (rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)).to(dtype)
        heights, held = self.heights, self._held
        order = [i for shard in held for i in shard]
        own = heights[self.grid.shard]
        outgoing = rows[0].new_empty(len(order), own, self.n, dtype=dtype)
        for place, i in enumerate(order):
            outgoing[place].copy_(rows[i])
        count = len(self.mine)
        arrived, work = self._all_to_all(
            outgoing, [len(shard) * own * self.n for shard in held], [count * height * self.n for height in heights]
        )

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            parts = arrived.split([count * height * self.n for height in heights])
            return torch.cat([p.view(count, h, self.n) for p, h in zip(parts, heights, strict=True)], dim=1)

        finish.sending = outgoing  # kept alive until it has left
        return finish

    def to_rows(self, whole: Tensor) -> list[Tensor]:
        """The way back: results of `mine` [len(mine), sum(heights), n] to this rank's rows of all k, k x [rows, n]."""
        if self.grid.ranks == 1:
            return list(whole.unbind())
        heights, held = self.heights, self._held
        own, count = heights[self.grid.shard], len(self.mine)
        outgoing = torch.cat([part.reshape(-1) for part in whole.split(heights, dim=1)])
        arrived, work = self._all_to_all(
            outgoing, [count * height * self.n for height in heights], [len(shard) * own * self.n for shard in held]
        )
        if work is not None:
            work.wait()
        order = [i for shard in held for i in shard]
        rows = dict(zip(order, arrived.view(len(order), own, self.n).unbind(), strict=True))
        if self.grid.replicas > 1:
            rows = self._from_replicas(arrived, own)
        return [rows[i] for i in range(len(self.owners))]

    @property
    def _held(self) -> list[list[int]]:
        """The matrices owned by each shard of this replica."""
        first = self.grid.replica * self.grid.shards
        return [
            [i for i, owner in enumerate(self.owners) if owner == first + shard] for shard in range(self.grid.shards)
        ]

    def _all_to_all(self, outgoing: Tensor, out: list[int], into: list[int]):
        arrived = outgoing.new_empty(sum(into))
        if self.grid.shards == 1:
            return arrived.copy_(outgoing.view(-1)), None
        leaving = sum(out) - out[self.grid.shard]
        traffic["all_to_all"] += leaving * outgoing.element_size()
        group = self.grid.across_shards
        return arrived, dist.all_to_all_single(arrived, outgoing.view(-1), into, out, group=group, async_op=True)

    def _from_replicas(self, arrived: Tensor, own: int) -> dict[int, Tensor]:
        """Rows that other replicas' owners have worked out: an all-gather, padded to the most any replica has."""
        shards, replicas = self.grid.shards, self.grid.replicas
        order = [
            [i for rank in range(r * shards, (r + 1) * shards) for i, owner in enumerate(self.owners) if owner == rank]
            for r in range(replicas)
        ]
        most = max(map(len, order))
        padded = arrived.new_zeros(most * own * self.n)
        padded[: arrived.numel()] = arrived
        gathered = arrived.new_empty(replicas, most, own, self.n)
        traffic["all_gather"] += (replicas - 1) * padded.numel() * padded.element_size()
        dist.all_gather_single(gathered.view(-1), padded, group=self.grid.across_replicas)
        return {i: gathered[r, place] for r in range(replicas) for place, i in enumerate(order[r])}
