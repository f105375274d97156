"""Warm-up, then half a cosine down to a share of the peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from adapt.components import schedules
from adapt.errors import Problem
from adapt.optim.schedules.warmup import warmup_factor, warmup_problems, warmup_steps


@dataclass(frozen=True, kw_only=True)
class CosineConfig:
    warmup: float = 0.05
    """Share of the steps (below 1) or number of steps (1 and above) of linear warm-up."""
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""

    def problems(self, recipe):
        yield from warmup_problems(self.warmup, recipe)
        if not 0 <= self.final <= 1:
            yield Problem("schedule.final", f"{self.final} must be between 0 and 1 (a share of the peak)")


@schedules.register("cosine")
def cosine(config: CosineConfig) -> Callable[[int, int], float]:
    def multiplier(step: int, total: int) -> float:
        warm = warmup_steps(total, config.warmup)
        if step < warm:
            return warmup_factor(step, total, config.warmup)
        progress = min(1.0, (step - warm) / max(1, total - 1 - warm))
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))

    return multiplier
