"""Updates far outside of what the run is used to: found by the norm of the gradient, which all ranks have alike."""

from __future__ import annotations

from statistics import median

WINDOW, LEAST = 64, 16
"""Steps that are looked back on, and how few of them say nothing yet."""


def spike(norm: float, recent: list[float], above: float) -> str:
    """What is wrong with a gradient norm after `recent` ones, in words; "" where it is at most `above` times their
    median. A median, unlike a mean, does not follow the spikes it has let through."""
    if len(recent) < LEAST or norm <= above * (usual := median(recent)):
        return ""
    return f"the gradient norm is {norm:.4g}, {norm / usual if usual else float('inf'):.3g} times the usual {usual:.4g} (trainer.spike={above:g})"


def remember(norm: float, recent: list[float]) -> None:
    """Keep the newest; in place, because they are part of the run's state."""
    recent.append(norm)
    del recent[:-WINDOW]
