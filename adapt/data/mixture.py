"""Which source the n-th row comes from: exact fractions, no sampling, and no state.

Weights become integers q_i of sum P, and a pattern of P rows with q_i of source i repeats for ever. Within it each row
has a window: the j-th row of source i may come once it is due, at floor(j P / q_i), and must have come by
ceil((j + 1) P / q_i). Taking the earliest deadline among those due keeps every window, and with it

    |c_i(n) - w_i n| < 1   for every source i and every prefix n.

(Always taking the source furthest behind its share, argmax w_i (n + 1) - c_i, is often used and looks the same for two
sources, but with many of them strays by more than a row.)
"""

from __future__ import annotations

import heapq
from fractions import Fraction
from math import lcm

import numpy as np

LONGEST = 100_000
"""Longest pattern. Weights that would need a longer one are rounded to multiples of 1 / LONGEST."""


class Mixture:
    def __init__(self, weights: list[float]):
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"weights must be non-negative and not all zero, got {weights}")
        self.quotas = quotas(weights)
        self.period = sum(self.quotas)
        self._pattern = pattern(self.quotas)
        """[period] source of each row."""
        self._earlier = np.empty(self.period, np.int64)
        """[period] how many rows of the same source come before it in the pattern."""
        for source, quota in enumerate(self.quotas):
            self._earlier[self._pattern == source] = np.arange(quota)

    def __getitem__(self, n: int) -> tuple[int, int]:
        """(source, how many rows of that source came before) of row n."""
        cycle, place = divmod(n, self.period)
        source = int(self._pattern[place])
        return source, cycle * self.quotas[source] + int(self._earlier[place])

    def counts(self, n: int) -> list[int]:
        """Rows of each source among the first n."""
        cycles, rest = divmod(n, self.period)
        begun = np.bincount(self._pattern[:rest], minlength=len(self.quotas))
        return [cycles * quota + int(more) for quota, more in zip(self.quotas, begun, strict=True)]

    def position(self, source: int, j: int) -> int:
        """n of the j-th row (from 0) of a source that has a weight: what `[n]` undoes."""
        cycle, rest = divmod(j, self.quotas[source])
        return cycle * self.period + int(np.flatnonzero(self._pattern == source)[rest])


def quotas(weights: list[float]) -> list[int]:
    """Small integers in the proportion of the weights; decimal numbers are meant as they are written."""
    exact = [Fraction(str(w)) for w in weights]
    scale = lcm(*(f.denominator for f in exact))
    whole = [int(f * scale) for f in exact]
    divisor = int(np.gcd.reduce(np.array(whole, dtype=object)))
    whole = [w // divisor for w in whole]
    if sum(whole) <= LONGEST:
        return whole
    total = sum(exact)
    shares = [f / total * LONGEST for f in exact]
    rounded = [int(s) for s in shares]
    behind = sorted(range(len(shares)), key=lambda i: (rounded[i] - shares[i], i))
    for i in behind[: LONGEST - sum(rounded)]:
        rounded[i] += 1
    return [max(r, 1) if w > 0 else 0 for r, w in zip(rounded, weights, strict=True)]


def pattern(quotas: list[int]) -> np.ndarray:
    """[sum of quotas] source of each row of one period, by earliest deadline among the rows that are due."""
    period = sum(quotas)
    arrivals = [(0, source, 0) for source, quota in enumerate(quotas) if quota]
    heapq.heapify(arrivals)
    due: list[tuple[int, int, int]] = []
    out = np.empty(period, np.int64)
    for n in range(period):
        while arrivals and arrivals[0][0] <= n:
            _, source, j = heapq.heappop(arrivals)
            heapq.heappush(due, (-(-(j + 1) * period // quotas[source]), source, j))
        _, source, j = heapq.heappop(due)
        out[n] = source
        if j + 1 < quotas[source]:
            heapq.heappush(arrivals, ((j + 1) * period // quotas[source], source, j + 1))
    return out
