"""Block sizes by the square root of the progress: small blocks pass quickly, large ones stay (Fast-dVLM)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapt.components import block_sizes
from adapt.errors import Problem


@dataclass(frozen=True, kw_only=True)
class SqrtConfig:
    sizes: tuple[int, ...] = (4, 8, 16, 32)
    """Block sizes in the order of their use; the last one is the target `block_size`."""
    over: int
    """Optimizer steps until the progress counts as 1. Size k of n begins where sqrt(step / over) reaches k / n."""

    def problems(self, recipe) -> Iterator[Problem]:
        target = getattr(recipe.objective.config, "block_size", None)
        if self.over < 1:
            yield Problem("objective.growth.over", f"{self.over} must be 1 or more optimizer steps")
        if not self.sizes or min(self.sizes) < 1:
            yield Problem("objective.growth.sizes", f"{list(self.sizes)} must be one or more sizes of 1 or more")
        elif target is not None and self.sizes[-1] != target:
            yield Problem(
                "objective.growth.sizes", f"ends with {self.sizes[-1]}, and the target block_size is {target}"
            )


@dataclass(frozen=True)
class Sqrt:
    config: SqrtConfig

    def at(self, step: int) -> int:
        sizes = self.config.sizes
        done = math.isqrt(step * len(sizes) ** 2 // self.config.over)  # floor(n sqrt(step / over)), in whole numbers
        return sizes[min(done, len(sizes) - 1)]

    def largest_step(self) -> int:
        return next(s for s in range(self.config.over + 1) if self.at(s) == max(self.config.sizes))


@block_sizes.register("sqrt")
def sqrt(config: SqrtConfig, target: int) -> Sqrt:
    return Sqrt(config)
