"""Linear warm-up, shared by all schedules. Steps count from 0; the first step is never at zero."""

from __future__ import annotations

from collections.abc import Iterator

from adapt.errors import Problem


def warmup_steps(total: int, warmup: float) -> int:
    return round(warmup if warmup >= 1 else warmup * total)


def warmup_factor(step: int, total: int, warmup: float) -> float:
    steps = warmup_steps(total, warmup)
    return min(1.0, (step + 1) / (steps + 1)) if steps else 1.0


def warmup_problems(warmup: float) -> Iterator[Problem]:
    if warmup < 0:
        yield Problem("schedule.warmup", f"{warmup} must be 0 or more: a share of the steps below 1, or a step count")
