"""Blocks multiply at the end of every plateau (NBDiff, arXiv 2512.06776, eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapt.components import block_sizes
from adapt.errors import Problem


@dataclass(frozen=True, kw_only=True)
class GeometricConfig:
    start: int = 1
    """First block size. 1 trains the AR loss alone (nothing can be masked); without AR loss start at 2."""
    factor: int = 2
    """Each plateau multiplies the block size by this."""
    every: int = 500
    """Optimizer steps per plateau."""
    after: int = 0
    """Steps before the first plateau begins to count."""

    def problems(self, recipe) -> Iterator[Problem]:
        for key, least in (("start", 1), ("factor", 2), ("every", 1), ("after", 0)):
            value = getattr(self, key)
            if value < least:
                yield Problem(f"objective.growth.{key}", f"{value} must be {least} or more")
        target = getattr(recipe.objective.config, "block_size", None)
        if target is not None and self.start > target:
            yield Problem(
                "objective.growth.start",
                f"{self.start} is already beyond the target block_size={target}; blocks only grow",
            )


@dataclass(frozen=True)
class Geometric:
    """b(s) = min(target, start * factor ^ floor(max(0, s - after) / every))."""

    config: GeometricConfig
    target: int

    def at(self, step: int) -> int:
        config, size = self.config, self.config.start
        plateaus = max(0, step - config.after) // config.every
        while plateaus > 0 and size < self.target:  # no overflow after a long plateau
            size, plateaus = size * config.factor, plateaus - 1
        return min(size, self.target)

    def largest_step(self) -> int:
        plateaus = math.ceil(math.log(max(1, self.target / self.config.start), self.config.factor)) + 1
        return self.config.after + self.config.every * plateaus


@block_sizes.register("geometric")
def geometric(config: GeometricConfig, target: int) -> Geometric:
    return Geometric(config, target)
