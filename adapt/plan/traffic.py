"""Collectives of one microbatch, in bytes of their full buffers: what FSDP2 does with our wrapping.

A layer is gathered in the forward pass and again for its backward; the root (embedding, norm, head) stays whole in between.
The layer before the first one that a gradient reaches is gathered once more for nothing: FSDP2 prefetches it. Gradients
leave in float32. With HSDP every reduced shard is summed over the replicas. FSDP2 cuts dimension 0 into runs of
ceil(rows / shards), so that uneven weights travel with padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from adapt.plan.cluster import Cluster, Grid
from adapt.plan.model import PlannedModel
from adapt.plan.shapes import Weight

REDUCED = 4
"""Bytes of an element on its way through a reduce-scatter (adapt.distributed.shard)."""


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind: how many, and their full buffers in bytes."""

    kind: str
    across: str
    """`shard` or `replicate`."""
    count: int
    bytes: int

    def wire(self, grid: Grid) -> float:
        """Bytes that each rank sends, on a ring."""
        size = grid.shards if self.across == "shard" else grid.replicas
        return self.bytes * (size - 1) / size * (2 if self.kind == "all_reduce" else 1)


def padded(weight: Weight, grid: Grid) -> int:
    """Elements of a weight in a gathered buffer."""
    return rows_of(weight, grid) * grid.shards * prod(weight.shape[1:])


def rows_of(weight: Weight, grid: Grid) -> int:
    """Rows of the largest shard."""
    return -(-weight.shape[0] // grid.shards)


def local(weights: Iterable[Weight], grid: Grid) -> int:
    """Elements of the largest shard (rank 0's)."""
    return sum(rows_of(w, grid) * prod(w.shape[1:]) for w in weights)


def gathers(model: PlannedModel) -> Counter[int | None]:
    """Group -> how often it is gathered."""
    found: Counter[int | None] = Counter([None, *model.runs])
    found.update(model.backward | ({i - 1 for i in model.backward} & model.runs))
    return found


def microbatch(models: Iterable[PlannedModel], grid: Grid, compute: int) -> list[Sent]:
    """All collectives of one microbatch; `compute` is the bytes of an element in the compute dtype."""
    count: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for model in models:
        often = gathers(model)
        for group in model.groups:
            whole = sum(padded(w, grid) for w in group.weights)
            learning = sum(padded(w, grid) for w in model.learning(group))
            if often[group.layer]:
                _add(count, total, ("all_gather", "shard"), often[group.layer], compute * whole)
            if learning:
                _add(count, total, ("reduce_scatter", "shard"), 1, REDUCED * learning)
                if grid.replicas > 1:
                    _add(count, total, ("all_reduce", "replicate"), 1, REDUCED * learning // grid.shards)
    return [Sent(*key, count[key], total[key]) for key in count]


def _add(count: Counter, total: Counter, key: tuple[str, str], times: int, size: int) -> None:
    count[key] += times
    total[key] += times * size


def seconds(sent: Iterable[Sent], grid: Grid, cluster: Cluster) -> float:
    return sum(one.wire(grid) / cluster.rate(grid, one.across) for one in sent)
