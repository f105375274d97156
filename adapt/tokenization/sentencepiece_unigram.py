"""Extension of a Unigram model (Kudo 2018, arXiv 1804.10959): the missing pieces of a model trained on the new texts.

A text is taken apart so that the log-probabilities of its pieces have the greatest sum. A piece is reached if its own is
greater than the best sum of any other way to write it; where it is not, it is raised to a little more than that. New
pieces may be better than old ones anywhere, so that texts of the old languages change too: prefer few, frequent ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adapt.tokenization.sentencepiece_fresh import flags, trained
from adapt.tokenization.sentencepiece_model import NORMAL, USER_DEFINED, Pieces, SentencePiece

UNKNOWN_PENALTY = 10.0
"""A character without a piece costs so much more than the least probable piece (sentencepiece's kUnkPenalty)."""
MARGIN = 1e-3
"""Above the bound: sums of float32 scores are not exact."""


def extend_unigram(words: Mapping[str, int], base: SentencePiece, num_tokens: int, fresh_tokens: int) -> Pieces:
    """Up to `num_tokens` pieces, the most probable first, with the log-probabilities that they have on the new texts, or
    raised ones."""
    if not num_tokens:
        return Pieces()
    symbols = [p for p, i in base.vocab.items() if base.types[i] == USER_DEFINED]
    missing = [
        (piece, score)
        for piece, score in sorted(trained(words, "unigram", fresh_tokens, **flags(base)), key=lambda x: (-x[1], x[0]))
        if piece not in base.taken and not any(symbol in piece for symbol in symbols)
    ][:num_tokens]
    scores = {p: base.scores[i] for p, i in base.vocab.items() if base.types[i] == NORMAL}
    reached = raised(scores, dict(missing))
    return Pieces(tokens=[piece for piece, _ in missing], scores=[reached[piece] for piece, _ in missing])


def raised(old: Mapping[str, float], new: Mapping[str, float]) -> dict[str, float]:
    """The scores of the new pieces, high enough that each is reached. Shorter ones first: what is raised can only be a part
    of longer pieces."""
    scores = {**old, **new}
    unknown = min(scores.values()) - UNKNOWN_PENALTY
    longest = max(map(len, scores))
    for piece in sorted(new, key=lambda piece: (len(piece), piece)):
        bound = best_split(piece, scores, unknown, longest)
        if scores[piece] <= bound + MARGIN / 2:
            scores[piece] = float(np.float32(bound + max(MARGIN, abs(bound) * 1e-6)))
    return {piece: scores[piece] for piece in new}


def best_split(piece: str, scores: Mapping[str, float], unknown: float, longest: int) -> float:
    """The greatest sum of scores over all ways to write `piece` with at least two others; `unknown` for a character
    without a piece."""
    best = [0.0] + [-np.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for start in range(max(0, end - longest), end):
            if end - start == len(piece):
                continue
            score = scores.get(piece[start:end], unknown if end - start == 1 else None)
            if score is not None:
                best[end] = max(best[end], best[start] + score)
    return best[-1]
