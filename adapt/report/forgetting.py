"""What a run gained on its domain and what it forgot elsewhere, from its logged evaluations.

F_i(t) = BPB_i(t) - BPB_i(0)    forgetting of a guard i (the metric `forgetting/<i>`)
G(t)   = BPB(0) - BPB(t)        adaptation gain, the mean over the held-out sets that are no guards
"""

from __future__ import annotations

from dataclasses import dataclass

from adapt.report.data import RunData, is_number

EPSILON = 1e-3
"""Bits per byte: forgetting below this counts as this in the efficiency, which would be boundless otherwise."""
RECOVERED = 0.1
"""A stability gap is over where no more than this share of its depth is left."""

Points = list[tuple[int, float]]


def guards(run: RunData) -> list[str]:
    found = dict.fromkeys(k for line in run.evaluations for k in line if k.startswith("eval/forgetting/"))
    return [key.removeprefix("eval/forgetting/") for key in found if key != "eval/forgetting/worst"]


def domains(run: RunData) -> list[str]:
    """Held-out sets that are no guards."""
    found = dict.fromkeys(k for line in run.evaluations for k in line if k.startswith("eval/bpb/"))
    return [label for label in (key.removeprefix("eval/bpb/") for key in found) if label not in guards(run)]


def forgetting(run: RunData, guard: str) -> Points:
    return run.points(f"eval/forgetting/{guard}")


def gain(run: RunData, label: str) -> Points:
    points = run.points(f"eval/bpb/{label}")
    return [(step, points[0][1] - value) for step, value in points if points[0][0] == 0]


@dataclass(frozen=True)
class Gap:
    depth: float
    """max_t F(t); 0 where nothing was ever forgotten."""
    deepest: int
    """Step of it."""
    recovered: int | None
    """First step after it with at most RECOVERED of the depth left; None where that did not come."""
    final: float

    @staticmethod
    def of(points: Points) -> Gap:
        deepest, depth = max(points, key=lambda point: point[1])
        later = [step for step, value in points if step > deepest and value <= RECOVERED * depth]
        return Gap(depth, deepest, later[0] if later and depth > 0 else None, points[-1][1])


@dataclass(frozen=True)
class Outcome:
    gain: float
    """G, bits per byte."""
    forgetting: float
    """The worst guard's F."""

    @property
    def efficiency(self) -> float:
        """G / max(F, EPSILON)."""
        return self.gain / max(self.forgetting, EPSILON)


def outcome(run: RunData) -> Outcome | None:
    """At the last evaluation; None for a run that measured no guard or no domain."""
    gains = [points[-1][1] for label in domains(run) if (points := gain(run, label))]
    forgotten = [points[-1][1] for guard in guards(run) if (points := forgetting(run, guard))]
    return Outcome(sum(gains) / len(gains), max(forgotten)) if gains and forgotten else None


def sweep(run: RunData) -> list[tuple[float, Outcome]]:
    """(alpha, outcome) of the run's interpolation between start and end."""
    start = run.evaluations[0] if run.evaluations else {}
    found = []
    for point in run.interpolation.get("points") or []:
        results = point.get("results") or {}
        before = [start.get(f"eval/bpb/{label}") for label in domains(run)]
        after = [results.get(f"bpb/{label}") for label in domains(run)]
        worst = results.get("forgetting/worst")
        if before and all(is_number(x) for x in (*before, *after, worst)):
            gained = sum(b - a for b, a in zip(before, after, strict=True)) / len(before)
            found.append((point["alpha"], Outcome(gained, worst)))
    return found


def front(outcomes: list[Outcome]) -> list[bool]:
    """Whether each is on the Pareto front: no other gains as much and forgets as little, and one of them strictly."""

    def beaten(one: Outcome) -> bool:
        return any(
            other.gain >= one.gain
            and other.forgetting <= one.forgetting
            and (other.gain > one.gain or other.forgetting < one.forgetting)
            for other in outcomes
        )

    return [not beaten(one) for one in outcomes]


def replay_fraction(run: RunData) -> float:
    """Share of the training tokens that is marked `replay`."""
    entries = [d for d in run.setting("data.train") or [] if isinstance(d, dict)]
    weights = [(d.get("weight", 1.0), bool(d.get("replay"))) for d in entries if is_number(d.get("weight", 1.0))]
    total = sum(w for w, _ in weights)
    return sum(w for w, old in weights if old) / total if total else 0.0
