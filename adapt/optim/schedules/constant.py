"""Constant learning rate after a linear warm-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adapt.components import schedules
from adapt.optim.schedules.warmup import warmup_factor, warmup_problems


@dataclass(frozen=True, kw_only=True)
class ConstantConfig:
    warmup: float = 0.0
    """Share of the steps (below 1) or number of steps (1 and above) of linear warm-up."""

    def problems(self, recipe):
        yield from warmup_problems(self.warmup, recipe)


@schedules.register("constant")
def constant(config: ConstantConfig) -> Callable[[int, int], float]:
    return lambda step, total: warmup_factor(step, total, config.warmup)
