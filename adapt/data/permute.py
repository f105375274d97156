"""Orders that are functions of a key: the same on every machine, with nothing to store or to save.

Written out here, because numpy does not promise that its generators' permutations stay the same between versions.
"""

from __future__ import annotations

import numpy as np

MASK64 = 0xFFFF_FFFF_FFFF_FFFF
ROUNDS = 6


def mix(x: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit integers that looks random."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def key_of(*words: int) -> int:
    key = 0
    for word in words:
        key = mix((key + (word & MASK64) + 0x9E3779B97F4A7C15) & MASK64)
    return key


class Permutation:
    """A permutation of range(n), in O(1) time and memory per element.

    A Feistel network permutes the next power of four; indices that leave range(n) walk on along their cycle until they
    are back (fewer than four steps on average).
    """

    def __init__(self, n: int, *key: int):
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        self._keys = [key_of(*key, n, r) for r in range(ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(i)
        while True:
            i = self._network(i)
            if i < self.n:
                return i

    def _network(self, i: int) -> int:
        left, right = i >> self._half, i & self._low
        for key in self._keys:
            left, right = right, left ^ (mix((right + key) & MASK64) & self._low)
        return (left << self._half) | right


def shuffled(n: int, *key: int) -> np.ndarray:
    """[n] int64, another permutation of range(n), all of it at once, by sorting hashes."""
    return np.argsort(_hashes(n, *key), kind="stable").astype(np.int64)


def uniform(n: int, *key: int) -> np.ndarray:
    """[n] float64 in [0, 1), a function of the key and of each one's number."""
    return (_hashes(n, *key) >> np.uint64(11)) * 2.0**-53


def _hashes(n: int, *key: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key_of(*key, n))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
