"""The whole run's sequence of sources, worked out before it starts: phases of weights, and sources that run dry.

The run is a short list of segments, each an exact mixture (mixture.py) that goes on with the counters of those before
it. A segment ends where a phase does, or where a source has been read as often as it may be. Every end follows from
counts, so any position is found by a bisection and one look-up, and there is nothing to save.

A unit is what a source gives at a time: a row, or the two rows of a preference pair.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from adapt.data.mixture import Mixture


@dataclass(frozen=True)
class Segment:
    start: int
    """Its first unit."""
    mixture: Mixture
    counts: tuple[int, ...]
    """Units each source gave before."""
    factors: tuple[float, ...]
    """Of the token losses of each source."""


class Plan:
    """`plan.locate(n)` is (source, how many of its units came before, factor of its losses) of unit n."""

    def __init__(
        self,
        phases: list[tuple[int, list[float]]],
        *,
        objective: list[float | None] | None = None,
        limits: list[int | None] | None = None,
        read: list[int] | None = None,
        renormalise: bool = False,
    ):
        """phases: (first unit, weights of all sources), the first at unit 0; the last goes on for ever.
        objective: weights o_i of the sources in the loss, relative to each other; None is the source's weight.
        limits: how many units each source may give, with the `read` ones that it gave before this plan began.
        renormalise: a source that has run dry leaves its place to the others, in proportion; otherwise the plan ends.
        """
        size = len(phases[0][1])
        self.limits = limits or [None] * size
        self._objective = objective or [None] * size
        self.segments: list[Segment] = []
        self.dry: list[tuple[int, int]] = []
        """(unit, source) where a source is asked for more than it has."""
        self.end: int | None = None
        """The first unit that no source may give; None: there is always one."""
        self.read = read or [0] * size
        starts = [start for start, _ in phases]
        if starts[0] != 0 or any(b < a for a, b in pairwise(starts)):
            raise ValueError(f"phases must begin at 0 and follow each other, got {starts}")
        counts = list(self.read)
        for (start, weights), stop in zip(phases, [*starts[1:], None], strict=True):
            if start == stop:
                continue
            counts = self._phase(start, stop, weights, counts, renormalise)
            if self.end is not None:
                break

    def _phase(
        self, start: int, stop: int | None, weights: list[float], counts: list[int], renormalise: bool
    ) -> list[int]:
        """Segments of one phase. Returns the counters behind it."""
        while True:
            empty = [limit is not None and n >= limit for n, limit in zip(counts, self.limits, strict=True)]
            active = [0.0 if renormalise and e else w for e, w in zip(empty, weights, strict=True)]
            if renormalise and not any(active):
                self.end = start
                return counts
            mixture = Mixture(active)
            self.segments.append(Segment(start, mixture, tuple(counts), self._factors(active)))
            ends = [
                (start + mixture.position(i, max(0, self.limits[i] - counts[i])), i)
                for i, quota in enumerate(mixture.quotas)
                if quota and self.limits[i] is not None
            ]
            first, source = min(ends, default=(None, -1))
            if first is None or (stop is not None and first >= stop):
                return counts if stop is None else _add(counts, mixture.counts(stop - start))
            self.dry.append((first, source))
            if not renormalise:
                self.end = first
                return counts
            counts, start = _add(counts, mixture.counts(first - start)), first

    def _factors(self, weights: list[float]) -> tuple[float, ...]:
        """o_i / w_i, both with sum 1 over the sources that are read. Exact: o = w gives 1.0, and not nearly so."""
        w = [Fraction(str(x)) for x in weights]
        chosen = [x if o is None else Fraction(str(o)) for o, x in zip(self._objective, w, strict=True)]
        total = sum(o for o, x in zip(chosen, w, strict=True) if x)
        return tuple(float((o / total) / (x / sum(w))) if x else 0.0 for o, x in zip(chosen, w, strict=True))

    def locate(self, unit: int) -> tuple[int, int, float]:
        """Raises IndexError where the plan has ended."""
        if unit < 0 or (self.end is not None and unit >= self.end):
            raise IndexError(unit)
        segment = self._segment(unit)
        source, earlier = segment.mixture[unit - segment.start]
        return source, segment.counts[source] + earlier, segment.factors[source]

    def counts(self, units: int) -> list[int]:
        """Units that each source has given when the plan has been followed for `units` (those in `read` included)."""
        if self.end is not None:
            units = min(units, self.end)
        if not units:
            return list(self.read)
        segment = self._segment(units - 1)
        return _add(segment.counts, segment.mixture.counts(units - segment.start))

    def facts(self) -> list:
        """Plain values that decide the sequence."""
        segments = [[s.start, s.mixture.quotas, list(s.counts), list(s.factors)] for s in self.segments]
        return [segments, self.end]

    def _segment(self, unit: int) -> Segment:
        return self.segments[bisect_right(self.segments, unit, key=lambda s: s.start) - 1]


def _add(a, b) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]


def tempered(weights: list[float], tokens: list[int], alpha: float | None) -> list[float]:
    """w_i n_i^alpha: alpha 1 mixes sources in proportion to their size, 0 by the weights alone."""
    if alpha is None:
        return weights
    largest = max(tokens)  # shares alone matter, and n^alpha may be huge
    return [w * (n / largest) ** alpha for w, n in zip(weights, tokens, strict=True)]


def boundary(until: float, total: int) -> int:
    """A share of the steps (below 1) or a step count -> the first step behind it."""
    return round(until if until >= 1 else until * total)
