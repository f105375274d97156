"""Vectors of tokens from the company they keep: positive PMI of co-occurrences, and a truncated SVD of it.

Levy, Goldberg and Dagan 2015, "Improving Distributional Similarity with Lessons Learned from Word Embeddings": a window
whose nearer tokens count more, contexts smoothed by an exponent of 0.75, and the square root of the singular values.

V tokens in the vocabulary, k dimensions
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**18
"""Tokens whose pairs are in memory at a time."""
PAIRS = 2**23
"""Different pairs that are kept: 16 bytes each, and nine times as much while they are put together (1.2 GB)."""
SMOOTHING = 0.75
"""Exponent of the contexts' counts: a rare context then says less."""
OVERSAMPLING, ITERATIONS = 16, 3


@dataclass(frozen=True, eq=False)
class Pairs:
    """How often two tokens are near each other; each pair once, the lower number first."""

    left: np.ndarray
    right: np.ndarray
    counts: np.ndarray
    """[pairs] int64: the sum of window + 1 - distance, exact in any order."""


def occurrences(documents: Iterable[np.ndarray], size: int) -> np.ndarray:
    """[size] int64: how often each id below `size` occurs."""
    found = np.zeros(size, np.int64)
    for document in documents:
        found += np.bincount(document, minlength=size)[:size]
    return found


def count_pairs(
    documents: Iterable[np.ndarray], vocabulary: np.ndarray, window: int, limit: int | None = None
) -> Pairs:
    """Of the ids in `vocabulary` [V], ascending: pairs up to `window` tokens apart in a document, as numbers below V.
    Other ids are left out but keep their place. Beyond `limit` (PAIRS) different pairs, the rarest so far are dropped."""
    limit = limit or PAIRS
    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    size = len(vocabulary)
    for tokens in _chunks(documents, window):
        waiting.append(_merged(*_near(_places(tokens, vocabulary), size, window)))
        if sum(len(k) for k, _ in waiting) >= limit:
            keys, counts = _frequent(*_together([(keys, counts), *waiting]), limit)
            waiting = []
    keys, counts = _frequent(*_together([(keys, counts), *waiting]), limit)
    return Pairs(keys // max(1, size), keys % max(1, size), counts)


def ppmi(pairs: Pairs, size: int) -> Tensor:
    """[V, V] sparse float64: max(0, log P(i, j) / (P(i) P(j))), with P(j) of the context j from counts ** SMOOTHING
    (equation 3 of the paper)."""
    other = pairs.left != pairs.right  # each pair is seen from both sides, one of a token with itself twice from one
    rows = np.concatenate([pairs.left, pairs.right[other]])
    columns = np.concatenate([pairs.right, pairs.left[other]])
    counts = np.concatenate([np.where(other, pairs.counts, 2 * pairs.counts), pairs.counts[other]]).astype(np.float64)
    sums = np.bincount(rows, counts, size)
    smooth = sums**SMOOTHING
    values = np.log(counts * smooth.sum() / (sums[rows] * smooth[columns]))
    kept = values > 0
    places = torch.from_numpy(np.stack([rows[kept], columns[kept]]))
    return torch.sparse_coo_tensor(
        places, torch.from_numpy(values[kept]), (size, size), check_invariants=True
    ).coalesce()


def truncated_svd(matrix: Tensor, dim: int, noise: np.random.Generator) -> Tensor:
    """[V, k]: U sqrt(S) of the `dim` largest singular values of a sparse [V, V], by a randomised range (Halko, Martinsson
    and Tropp 2011, algorithms 4.4 and 5.1); k is less than dim where the matrix is smaller."""
    start = noise.standard_normal((matrix.shape[1], min(dim + OVERSAMPLING, *matrix.shape)))
    flipped = matrix.t().coalesce()
    span = _orthonormal(matrix @ torch.from_numpy(start))
    for _ in range(ITERATIONS):
        span = _orthonormal(matrix @ _orthonormal(flipped @ span))
    left, values, _ = torch.linalg.svd((flipped @ span).T, full_matrices=False)
    return ((span @ left) * values.sqrt())[:, :dim]


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def _chunks(documents: Iterable[np.ndarray], window: int) -> Iterator[np.ndarray]:
    """Documents end to end, -1 between them as far as a window reaches. (One longer than CHUNK is cut, and misses the
    few pairs there.)"""
    parts: list[np.ndarray] = []
    size = 0
    between = np.full(window, -1, np.int64)
    for document in documents:
        for start in range(0, len(document), CHUNK):
            piece = document[start : start + CHUNK].astype(np.int64)
            parts += [piece, between]
            size += len(piece)
            if size >= CHUNK:
                yield np.concatenate(parts)
                parts, size = [], 0
    if parts:
        yield np.concatenate(parts)


def _places(tokens: np.ndarray, vocabulary: np.ndarray) -> np.ndarray:
    """Number of each token in the vocabulary; -1: it is not there."""
    found = np.searchsorted(vocabulary, tokens)
    found[found == len(vocabulary)] = 0
    return np.where(vocabulary[found] == tokens, found, -1)


def _near(places: np.ndarray, size: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """(keys left * size + right, weights) of all pairs."""
    keys, weights = [], []
    for distance in range(1, window + 1):
        one, other = places[:-distance], places[distance:]
        both = (one >= 0) & (other >= 0)
        one, other = one[both], other[both]
        keys.append(np.minimum(one, other) * size + np.maximum(one, other))
        weights.append(np.full(len(one), window + 1 - distance, np.int64))
    return np.concatenate(keys), np.concatenate(weights)


def _together(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return _merged(np.concatenate([k for k, _ in parts]), np.concatenate([c for _, c in parts]))


def _merged(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, ascending, with the sum of its counts."""
    if not len(keys):
        return keys, counts
    order = np.argsort(keys)
    keys = keys[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(counts[order], first)


def _frequent(keys: np.ndarray, counts: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` keys: those above the count that would be the first too many."""
    if len(keys) <= limit:
        return keys, counts
    kept = counts > np.partition(counts, len(counts) - limit - 1)[len(counts) - limit - 1]
    return keys[kept], counts[kept]
