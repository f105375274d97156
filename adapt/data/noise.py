"""Noise as a function of who asks, not of when: the same on any world size and after any resume."""

from __future__ import annotations

import numpy as np


def generator(seed: int, *key: int) -> np.random.Generator:
    """A counter-based generator keyed by (seed, *key), e.g. (run seed, source, epoch, sample index).

    Philox with a hashed 128-bit key: no state is kept anywhere, so nothing needs saving.
    """
    words = np.random.SeedSequence([_unsigned(seed), *map(_unsigned, key)]).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=words))


def _unsigned(value: int) -> int:
    return value & 0xFFFF_FFFF_FFFF_FFFF
