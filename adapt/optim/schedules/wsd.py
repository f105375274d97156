"""Warm-up, stable, decay: constant at the peak, then down over the last part of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from adapt.components import schedules
from adapt.errors import Problem
from adapt.optim.schedules.warmup import warmup_factor, warmup_problems


@dataclass(frozen=True, kw_only=True)
class WsdConfig:
    warmup: float = 0.05
    """Share of the steps (below 1) or number of steps (1 and above) of linear warm-up."""
    decay: float = 0.2
    """Share of the steps spent going down."""
    final: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    shape: Literal["linear", "sqrt"] = "linear"
    """`linear`, or 1 - sqrt(progress)."""

    def problems(self, recipe):
        yield from warmup_problems(self.warmup, recipe)
        if not 0 <= self.decay <= 1:
            yield Problem("schedule.decay", f"{self.decay} must be between 0 and 1 (a share of the steps)")
        if not 0 <= self.final <= 1:
            yield Problem("schedule.final", f"{self.final} must be between 0 and 1 (a share of the peak)")


@schedules.register("wsd")
def wsd(config: WsdConfig) -> Callable[[int, int], float]:
    def multiplier(step: int, total: int) -> float:
        steps = max(1, round(config.decay * total))
        progress = min(1.0, max(0.0, (step + 1 - (total - steps)) / steps))
        down = progress if config.shape == "linear" else progress**0.5
        return warmup_factor(step, total, config.warmup) * (1 - (1 - config.final) * down)

    return multiplier
