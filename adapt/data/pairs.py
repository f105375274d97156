"""Preference pairs in rows: each sequence has one, so a pair that is too long loses the beginning of its prompt.

Answers are never cut: a likelihood of half an answer compares nothing. Both sequences of a pair lose equally many tokens, so
that they still answer the same prompt; a begin-of-text token stays where it was, first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from adapt.data.roles import TARGET
from adapt.data.shards import TokenShards
from adapt.errors import UserError

LEAST = 32
"""Tokens of a prompt that must be left of it, or the pair is left out: an answer to next to nothing teaches nothing."""


@dataclass(frozen=True)
class Fitted:
    order: np.ndarray
    """[sequences] int64, documents of the shards whose pair fits, chosen and rejected in turn."""
    cut: np.ndarray
    """[documents] int64, tokens that each document of the shards loses at its beginning."""
    num_too_long: int
    """Pairs left out because their answers leave no room for a prompt."""
    num_cut: int
    """Pairs whose prompt lost its beginning."""

    @staticmethod
    def of(shards: TokenShards, seq_len: int) -> Fitted:
        """Raises UserError if no pair fits into a row of `seq_len` tokens."""
        offsets = np.asarray(shards.document_offsets)
        over = (np.diff(offsets) - seq_len).reshape(-1, 2).max(axis=1).clip(0)
        cut, fits = over.copy(), np.ones(len(over), bool)
        for pair in np.flatnonzero(over):
            spans = pairwise(offsets[2 * pair : 2 * pair + 3].tolist())
            room = min(_prompt(shards, start, stop) for start, stop in spans)
            fits[pair] = room - over[pair] >= LEAST
        cut[~fits] = 0
        pairs = np.flatnonzero(fits)
        if not len(pairs):
            raise UserError(f"{shards.label}: no preference pair fits into data.seq_len={seq_len:,d} tokens")
        order = (2 * pairs[:, None] + np.arange(2)).ravel()
        return Fitted(order, np.repeat(cut, 2), int((~fits).sum()), int((cut > 0).sum()))


def _prompt(shards: TokenShards, start: int, stop: int) -> int:
    """Tokens before the first that is learned."""
    return int(np.argmax(shards.roles(start, stop) == TARGET))
