"""What all schedules share: linear warm-up, spans given as shares or counts, and where a run ends.

eta(s) is the rate of the update that follows s updates, as a share of the peak. Of T updates with W of warm-up:

    eta(0) = 1 / W      eta(W) = 1      eta(s) = final for every s >= T

No update uses eta(T), so the first update is not at zero, and neither is the last one of a schedule that ends there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from adapt.errors import Problem


def span(total: int, length: float) -> int:
    """Steps of a span given as a share of the steps (below 1) or as their number (1 and above)."""
    return round(length if length >= 1 else length * total)


def warmup_steps(total: int, warmup: float) -> int:
    return span(total, warmup)


def warmup_factor(step: int, total: int, warmup: float) -> float:
    steps = warmup_steps(total, warmup)
    return min(1.0, (step + 1) / steps) if steps else 1.0


def cosine_down(progress: float, final: float) -> float:
    """From 1 at 0 to `final` at 1, half a cosine (Ibrahim et al. 2024, arXiv 2403.08763, section 4)."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def tail(progress: float, final: float, shape: str) -> float:
    """From 1 at 0 to `final` at 1: `linear`, or `sqrt`, which is 1 - sqrt(progress)."""
    return 1 - (1 - final) * (progress if shape == "linear" else math.sqrt(progress))


def warmed(warmup: float, final: float, down: Callable[[float], float]) -> Callable[[int, int], float]:
    """Linear warm-up, then `down(progress)` over all that is left of the run; `final` from its end on."""

    def multiplier(step: int, total: int) -> float:
        warm = warmup_steps(total, warmup)
        if step >= total:
            return final
        if step < warm:
            return warmup_factor(step, total, warmup)
        return down((step - warm) / (total - warm))

    return multiplier


def warmup_problems(warmup: float, recipe) -> Iterator[Problem]:
    if not (warmup >= 0 and math.isfinite(warmup)):
        yield Problem("schedule.warmup", f"{warmup} must be 0 or more: a share of the steps below 1, or a step count")
        return
    steps = _steps(recipe)
    if warmup >= 1 and steps and warmup_steps(steps, warmup) > steps:
        yield Problem(
            "schedule.warmup",
            f"{warmup:g} steps of warm-up are more than the {steps:,} step(s) of training, which would never reach "
            "their learning rate; give fewer, or a share below 1 (0.05)",
        )


def share_problems(key: str, value: float) -> Iterator[Problem]:
    """Of a learning rate given as a share of the peak."""
    if not 0 <= value <= 1:
        yield Problem(f"schedule.{key}", f"{value} must be between 0 and 1 (a share of the peak)")


def span_problems(spans: dict[str, float], recipe) -> Iterator[Problem]:
    """Of phases that follow each other, the warm-up first, and must fit into the run together."""
    wrong = {k: v for k, v in spans.items() if not (v >= 0 and math.isfinite(v))}
    for key, value in wrong.items():
        if key != "warmup":  # that one has its own letter
            yield Problem(
                f"schedule.{key}", f"{value} must be 0 or more: a share of the steps below 1, or a step count"
            )
    steps = _steps(recipe)
    if wrong or not steps:
        return
    lengths = {key: span(steps, value) for key, value in spans.items()}
    if lengths.get("warmup", 0) <= steps < sum(lengths.values()):
        parts = " + ".join(f"{key} {length:,}" for key, length in lengths.items())
        yield Problem(
            f"schedule.{max(lengths, key=lengths.__getitem__)}",
            f"{parts} steps do not fit into the {steps:,} step(s) of training; give fewer, or train longer",
        )


def _steps(recipe) -> int | None:
    trainer = recipe.trainer
    if trainer.steps is None and trainer.tokens is not None and trainer.batch_tokens > 0:
        return -(-trainer.tokens // trainer.batch_tokens)
    return trainer.steps
