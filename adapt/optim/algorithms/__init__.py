"""What a group of parameters is stepped by: one file each, found by the `algorithm` of the group."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor


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


@cache
def named(name: str) -> Algorithm:
    """The algorithm in the file of this name."""
    return import_module(f"{__name__}.{name}").algorithm


def local(tensor: Tensor) -> Tensor:
    """This rank's rows."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
