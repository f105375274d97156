"""What a group of parameters is stepped by: one file each, found by the `algorithm` of the group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import prod
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A parameter as the ranks hold it: what a plan knows of it without a tensor."""

    shape: tuple[int, ...]
    itemsize: int
    """Bytes of an element."""
    shards: int = 1
    replicas: int = 1

    def rows(self, m: int) -> int:
        """Of `m`, those of the first rank, which has most."""
        return -(-m // self.shards)

    @property
    def local(self) -> int:
        """Elements of the first rank."""
        return self.rows(self.shape[0]) * prod(self.shape[1:])

    def exchanged(self, elements: float) -> float:
        """Elements that a rank sends on average, where an owner gets all rows of a matrix or gives them back."""
        return elements * (self.shards - 1) / self.shards / (self.shards * self.replicas)

    def shared(self, elements: float) -> float:
        """Elements that a rank sends on average, to take the rows of a result to the other replicas."""
        return elements * (self.replicas - 1) / (self.shards * self.replicas)

    def reduced(self, elements: float) -> float:
        """Elements that a rank sends in an all-reduce over the shards, on a ring."""
        return 2 * elements * (self.shards - 1) / self.shards


@dataclass(frozen=True)
class Footprint:
    state: int
    """Bytes of the first rank, which has most."""
    sent: float = 0.0
    """Bytes that a rank sends in a step, on average over the ranks."""
    chunk: int = 0
    """Bytes of float32 rows that a step stacks at one time, at most; 0 where it works in place."""


class Algorithm(Protocol):
    """The arithmetic of one optimizer, without state of its own. Everything it needs is in the group."""

    def state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """All it will ever keep for `parameter`, as it is before the first step; DTensors where the parameter is one
        and the entry follows its rows."""
        ...

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor | None],
        states: list[dict[str, Tensor]],
        group: dict[str, Any],
    ) -> None:
        """Step in place; gradients are read only. The lists are the group's, on every rank in the same order: an
        algorithm that communicates does so for each of them, a missing gradient counts as zeros."""
        ...

    def footprint(self, held: Shard, group: dict[str, Any], moved: int) -> Footprint:
        """What it will keep and send for one parameter (of a fused one, as if it were one matrix); `moved`: bytes of an
        element that Newton-Schulz computes with."""
        ...


@cache
def named(name: str) -> Algorithm:
    """The algorithm in the file of this name."""
    return import_module(f"{__name__}.{name}").algorithm


def local(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
