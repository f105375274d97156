"""The infinite schedule (Ibrahim et al. 2024, arXiv 2403.08763, section 7): warm-up, half a cosine down to a constant
rate, that rate for as long as data comes, and an annealing at the end.

The constant phase needs no re-warming to go on from. With all spans given in steps, the run does not know its length
before the annealing begins: resume it with another `trainer.steps` to branch off an annealed model, or to go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from adapt.components import schedules
from adapt.errors import Problem
from adapt.optim.schedules.warmup import (
    cosine_down,
    share_problems,
    span,
    span_problems,
    tail,
    warmup_factor,
    warmup_problems,
)


@dataclass(frozen=True, kw_only=True)
class InfiniteConfig:
    warmup: float = 0.01
    """Share of the steps (below 1) or number of steps (1 and above) of linear warm-up."""
    cooldown: float = 0.6
    """Share of the steps (below 1) or number of steps (1 and above) from the peak down to the constant rate."""
    constant: float = 0.55
    """The constant rate, as a share of the peak (the paper's 1.65e-4 of 3e-4)."""
    decay: float = 0.15
    """Share of the steps (below 1) or number of steps (1 and above) of the annealing at the end."""
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    shape: Literal["linear", "sqrt"] = "linear"
    """Of the annealing: `linear`, or 1 - sqrt(progress)."""

    def problems(self, recipe):
        yield from warmup_problems(self.warmup, recipe)
        yield from span_problems({"warmup": self.warmup, "cooldown": self.cooldown, "decay": self.decay}, recipe)
        yield from share_problems("constant", self.constant)
        yield from share_problems("final", self.final)
        if self.final > self.constant:
            yield Problem(
                "schedule.final", f"{self.final} is above schedule.constant={self.constant}, so the end would go up"
            )


@schedules.register("infinite")
def infinite(config: InfiniteConfig) -> Callable[[int, int], float]:
    def multiplier(step: int, total: int) -> float:
        warm, cool = span(total, config.warmup), span(total, config.cooldown)
        start = total - span(total, config.decay)
        if step >= total:
            return config.final
        if step < warm:
            return warmup_factor(step, total, config.warmup)
        if step >= start:
            low = config.final / config.constant if config.constant else 0.0
            return config.constant * tail((step - start) / (total - start), low, config.shape)
        return cosine_down(min(1.0, (step - warm) / cool) if cool else 1.0, config.constant)

    return multiplier
