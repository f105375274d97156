"""Linear warm-up, shared by all schedules. Steps count from 0; the first step is never at zero."""

from __future__ import annotations

import math
from collections.abc import Iterator

from adapt.errors import Problem


def warmup_steps(total: int, warmup: float) -> int:
    return round(warmup if warmup >= 1 else warmup * total)


def warmup_factor(step: int, total: int, warmup: float) -> float:
    steps = warmup_steps(total, warmup)
    return min(1.0, (step + 1) / (steps + 1)) if steps else 1.0


def warmup_problems(warmup: float, recipe) -> Iterator[Problem]:
    if not (warmup >= 0 and math.isfinite(warmup)):
        yield Problem("schedule.warmup", f"{warmup} must be 0 or more: a share of the steps below 1, or a step count")
        return
    trainer = recipe.trainer
    steps = trainer.steps
    if steps is None and trainer.tokens is not None and trainer.batch_tokens > 0:
        steps = -(-trainer.tokens // trainer.batch_tokens)
    if warmup >= 1 and steps and warmup_steps(steps, warmup) > steps:
        yield Problem(
            "schedule.warmup",
            f"{warmup:g} steps of warm-up are more than the {steps:,} step(s) of training, which would never reach "
            "their learning rate; give fewer, or a share below 1 (0.05)",
        )
