"""n-grams of words as 64-bit hashes: which training documents share a passage with held-out text.

Words are compared without case, punctuation and Unicode composition. A document of fewer than n words has one "n-gram":
all its words, so that a short held-out question is found where it stands alone and does not empty the training data of
every longer document that says the same few words.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterable, Iterator

import numpy as np

WORDS = re.compile(r"\w+")
ASCII_WORDS = bytes(c if chr(c) in string.ascii_letters + string.digits + "_" else 32 for c in range(256))
FACTOR = np.uint64(0x9E3779B97F4A7C15)
REMEMBERED = 2**20
BLOCK = 2**18
"""Words whose n-grams are made at once."""


def words(text: str) -> list[bytes]:
    """The words of a normalised text."""
    if text.isascii():  # three times as fast as the pattern, with the same result
        return text.encode("ascii").translate(ASCII_WORDS).split()
    return [w.encode() for w in WORDS.findall(text)]


class _Hashes(dict):
    """64-bit hash of each word, remembered: a few thousand words are most of any text."""

    def __missing__(self, word: bytes) -> int:
        value = int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")
        if len(self) < REMEMBERED:
            self[word] = value
        return value


_hashes = _Hashes()


def word_hashes(*texts: str) -> np.ndarray:
    """[words] uint64 of normalised texts one after the other."""
    parts = [np.array(list(map(_hashes.__getitem__, words(text))), np.uint64) for text in texts]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint64), *parts])


def ngrams(documents: Iterable[np.ndarray], n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hashes [N] uint64, number of the document of each [N] int64) of documents given as word hashes; block by block,
    so that a huge document costs no more than its words."""
    block: list[np.ndarray] = []
    numbers: list[int] = []
    size = 0
    for number, document in enumerate(documents):
        for start in range(0, max(1, len(document) - n + 1), BLOCK):
            part = document[start : start + BLOCK + n - 1]
            block.append(part)
            numbers.append(number)
            size += len(part)
            if size >= BLOCK:
                yield _of_block(block, np.array(numbers), n)
                block, numbers, size = [], [], 0
    if block:
        yield _of_block(block, np.array(numbers), n)


def _of_block(parts: list[np.ndarray], numbers: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(p) for p in parts], np.int64)
    flat = np.concatenate(parts)
    owner = np.repeat(np.arange(len(parts)), lengths)
    ends = np.cumsum(lengths)
    first = np.arange(max(0, len(flat) - n + 1))
    first = first[first + n <= ends[owner[: len(first)]]]
    grams = np.zeros(len(first), np.uint64)
    for place in range(n):
        grams = grams * FACTOR + flat[first + place]
    short = np.flatnonzero((lengths > 0) & (lengths < n))
    whole = [_whole(flat[ends[d] - lengths[d] : ends[d]]) for d in short]
    return np.concatenate([grams, np.array(whole, np.uint64)]), numbers[np.concatenate([owner[first], short])]


def _whole(hashes: np.ndarray) -> np.uint64:
    value = np.uint64(len(hashes))
    with np.errstate(over="ignore"):
        for h in hashes:
            value = value * FACTOR + h
    return value


class Filter:
    """A sorted table of n-grams, asked for many at once. A bitmap of their high bits answers nearly all."""

    def __init__(self, table: np.ndarray):
        self.table = table
        self.bits = max(10, min(28, len(table).bit_length() + 5))
        self.seen = np.zeros(2**self.bits, bool)
        self.seen[self._slots(table)] = True

    def __call__(self, grams: np.ndarray) -> np.ndarray:
        """bool [N]: which of `grams` are in the table."""
        found = self.seen[self._slots(grams)]
        maybe = np.flatnonzero(found)
        if len(maybe):
            place = np.searchsorted(self.table, grams[maybe])
            place = np.minimum(place, len(self.table) - 1)
            found[maybe] = self.table[place] == grams[maybe]
        return found

    def _slots(self, grams: np.ndarray) -> np.ndarray:
        return (np.asarray(grams) >> np.uint64(64 - self.bits)).astype(np.int64)
