"""A cluster in numbers, and what its vendors promise of it. Every one of them is printed with the plan."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    flops: float
    """Of dense bf16 matrix products with fp32 accumulation, a second (datasheet)."""
    flops_fp32: float
    """Of fp32 matrix products without TF32."""
    inside: float
    """Bytes a second that a GPU sends to the others of its node, one direction."""
    host: float
    """Bytes a second between a GPU and its host's memory, one direction."""
    memory: float
    """Bytes a second of its own memory."""
    outside: float
    """Bytes a second of the network card that a GPU has to itself, one direction."""


GPUS = {
    "a100": Gpu(312e12, 19.5e12, 300e9, 32e9, 2.0e12, 25e9),
    "h100": Gpu(989e12, 67e12, 450e9, 64e9, 3.35e12, 50e9),
    "h200": Gpu(989e12, 67e12, 450e9, 64e9, 4.8e12, 50e9),
    "b200": Gpu(2250e12, 80e12, 900e9, 64e9, 8.0e12, 50e9),
    "l40s": Gpu(362e12, 91.6e12, 32e9, 32e9, 0.864e12, 12.5e9),
}
"""NVIDIA's datasheets (SXM where there is one); networks of 200 Gbit/s (A100), 400 (H100 and later), 100 (L40S) per GPU."""


@dataclass(frozen=True)
class Grid:
    """Ranks as (replicate, shard), as adapt.distributed.shard lays them out: neighbours share a copy of the model."""

    shards: int
    replicas: int = 1

    @property
    def ranks(self) -> int:
        return self.shards * self.replicas


@dataclass(frozen=True)
class Cluster:
    gpus: int
    memory: float
    """GiB of a GPU."""
    per_node: int
    gpu: str
    efficiency: float
    """Share of the peak arithmetic that a step reaches while it computes."""
    reserve: float
    """GiB that are not planned: CUDA's context, NCCL's buffers, and what the allocator loses in between."""
    network: float
    """Share of the links' rate that collectives reach."""

    @property
    def kind(self) -> Gpu:
        return GPUS[self.gpu]

    def rate(self, grid: Grid, across: str) -> float:
        """Bytes a second that a rank sends on a ring of its collective: across `shard`s, which are neighbours, or
        `replicate`s, which are `grid.shards` apart. A ring over nodes uses the cards of all its ranks in a node."""
        size, step = (grid.shards, 1) if across == "shard" else (grid.replicas, grid.shards)
        in_node = max(1, min(size, self.per_node // step))
        links = self.kind.inside if in_node == size else min(self.kind.inside, in_node * self.kind.outside)
        return links * self.network
