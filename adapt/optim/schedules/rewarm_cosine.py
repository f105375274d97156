"""Re-warm a trained model, then re-decay (Ibrahim et al. 2024, arXiv 2403.08763, section 4): with W steps of warm-up,

    eta(s) = eta_min + (eta_max - eta_min) / 2 * (1 + cos(pi (s - W) / (T - W)))

The same curve as `cosine`, with the paper's numbers: 1 % of the steps up, down to a tenth. They find the length of the
warm-up (0 to 2 %) to make no difference in the end; the peak does: a larger one adapts more and forgets more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adapt.components import schedules
from adapt.optim.schedules.cosine import CosineConfig, cosine


@dataclass(frozen=True, kw_only=True)
class RewarmCosineConfig(CosineConfig):
    warmup: float = 0.01
    """Share of the steps (below 1) or number of steps (1 and above) of linear re-warming."""
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""


@schedules.register("rewarm_cosine")
def rewarm_cosine(config: RewarmCosineConfig) -> Callable[[int, int], float]:
    return cosine(config)
