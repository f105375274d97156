"""Warm-up, then half a cosine down to a share of the peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adapt.components import schedules
from adapt.optim.schedules.warmup import cosine_down, share_problems, warmed, warmup_problems


@dataclass(frozen=True, kw_only=True)
class CosineConfig:
    warmup: float = 0.05
    """Share of the steps (below 1) or number of steps (1 and above) of linear warm-up."""
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""

    def problems(self, recipe):
        yield from warmup_problems(self.warmup, recipe)
        yield from share_problems("final", self.final)


@schedules.register("cosine")
def cosine(config: CosineConfig) -> Callable[[int, int], float]:
    return warmed(config.warmup, config.final, lambda progress: cosine_down(progress, config.final))
