"""Warm-up, stable, decay: constant at the peak, then down over the last part of the run.

Until the decay begins, a run does not know how long it will be if warm-up and decay are given in steps: stop it there
and resume it with another `trainer.steps` to branch off the decay, or to go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from adapt.components import schedules
from adapt.optim.schedules.warmup import share_problems, span, span_problems, tail, warmup_factor, warmup_problems


@dataclass(frozen=True, kw_only=True)
class WsdConfig:
    warmup: float = 0.05
    """Share of the steps (below 1) or number of steps (1 and above) of linear warm-up."""
    decay: float = 0.2
    """Share of the steps (below 1) or number of steps (1 and above) spent going down, at the end."""
    final: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    shape: Literal["linear", "sqrt"] = "linear"
    """`linear`, or 1 - sqrt(progress)."""

    def problems(self, recipe):
        yield from warmup_problems(self.warmup, recipe)
        yield from span_problems({"warmup": self.warmup, "decay": self.decay}, recipe)
        yield from share_problems("final", self.final)


@schedules.register("wsd")
def wsd(config: WsdConfig) -> Callable[[int, int], float]:
    def multiplier(step: int, total: int) -> float:
        start = total - span(total, config.decay)
        if step >= total:
            return config.final
        if step < start:
            return warmup_factor(step, total, config.warmup)
        return tail((step - start) / (total - start), config.final, config.shape)

    return multiplier
