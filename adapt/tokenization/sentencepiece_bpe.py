"""Continued BPE for SentencePiece (tokenizer-extension: Purason et al. 2025, arXiv 2512.03989; scores: see below).

New pieces get scores below all old ones. Then every old pair is merged before any new one, and a text keeps the old
boundaries but for those that new pieces remove. With scores among the old ones (copied, as Cabrita did; 0, as
Chinese-LLaMA did) new pieces take text away from old ones, in the old languages too.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapt.tokenization.continued_bpe import SHIFT, Words, merge_pairs
from adapt.tokenization.scripts import Scripts
from adapt.tokenization.sentencepiece_model import NORMAL, Pieces, SentencePiece
from adapt.tokenization.sentencepiece_rules import NEVER, SPACE


@dataclass(frozen=True)
class PieceFilter:
    """Which pieces may be made."""

    base: SentencePiece
    max_token_bytes: int
    digits: bool
    scripts: Scripts | None = None
    """null: all."""

    def __call__(self, piece: str) -> bool:
        if len(piece.encode()) > self.max_token_bytes or piece in self.base.taken:
            return False
        if not self.digits and any(letter in "0123456789" for letter in piece):
            return False
        if "<|" in piece or "|>" in piece:  # half of a special token, as chat templates write them
            return False
        if self.scripts is not None and not self.scripts(piece.encode()):
            return False
        return self.base.rules.allows(piece)


def learn_pieces(
    words: Mapping[str, int],
    base: SentencePiece,
    num_tokens: int,
    allowed: Callable[[str], bool],
    min_frequency: int = 2,
    min_character: int = 2,
) -> Pieces:
    """Up to `num_tokens` new pieces from word counts: first characters that have no piece and occur `min_character`
    times, the most frequent first, then merges of neighbours, as in byte-level BPE."""
    letters = [(c, n) for c, n in missing_characters(words, base, min_character) if allowed(c)][:num_tokens]
    started = base.grown(_below(base, [("", letter) for letter, _ in letters], [n for _, n in letters]))
    state = pieces_of(words, started)
    learned = merge_pairs(state, num_tokens - len(letters), allowed, min_frequency)
    merges = [("", letter) for letter, _ in letters] + learned.merges
    return _below(base, merges, [n for _, n in letters] + learned.counts)


def _below(base: SentencePiece, merges: list[tuple[str, str]], counts: list[int]) -> Pieces:
    tokens = [a + b for a, b in merges]
    return Pieces(merges=merges, tokens=tokens, counts=counts, scores=base.next_scores(len(tokens)))


def missing_characters(words: Mapping[str, int], base: SentencePiece, at_least: int) -> list[tuple[str, int]]:
    """(character, occurrences) of those that fall to bytes or to the unknown token, the most frequent first."""
    counts: Counter[str] = Counter()
    for word, times in words.items():
        for letter in word:
            if letter not in base.vocab:
                counts[letter] += times
    found = [(c, n) for c, n in counts.items() if n >= at_least and c not in NEVER and c != SPACE]
    return sorted(found, key=lambda item: (-item[1], item[0]))


def groups(words: Mapping[str, int], base: SentencePiece) -> Counter[tuple[int, ...]]:
    """Pieces that stand side by side in a word and that the trainer would have let into one piece -> occurrences."""
    counts: Counter[tuple[int, ...]] = Counter()
    pieces = [piece.piece for piece in base.proto.pieces]
    normal = [kind == NORMAL for kind in base.types]
    rules, joined = base.rules, {}
    ordered = list(words)
    for word, ids in zip(ordered, base.bare().encode(ordered, out_type=int), strict=True):
        group: list[int] = []
        for a, b in itertools.pairwise([*ids, None]):
            if normal[a]:
                group.append(a)
            if b is not None and normal[a] and normal[b]:
                together = joined.get((a, b))
                if together is None:
                    together = joined[a, b] = rules.joins(pieces[a] + pieces[b])
                if together:
                    continue
            if len(group) > 1:
                counts[tuple(group)] += words[word]
            group = []
    return counts


def pieces_of(words: Mapping[str, int], base: SentencePiece) -> Scored:
    """The groups of these words, ready to be merged."""
    counted = groups(words, base)
    mergeable = {p: i for p, i in base.vocab.items() if base.types[i] == NORMAL}
    return Scored(
        map(list, counted),
        counted.values(),
        ids=mergeable,
        pieces={i: p for p, i in base.vocab.items()},
        next_id=base.next_id,
        ranks=Scores({i: -base.scores[i] for i in mergeable.values()}),
    )


class Scores:
    """Pair -> (rank, piece) as SentencePiece has it: by the score of what the two make, whichever two they are."""

    def __init__(self, rank: dict[int, float]):
        self.rank = rank
        self.words: Words | None = None

    def __contains__(self, pair: int) -> bool:
        return self._made(pair) in self.words.ids

    def __getitem__(self, pair: int) -> tuple[float, int]:
        token = self.words.ids[self._made(pair)]
        return self.rank[token], token

    def _made(self, pair: int) -> str:
        pieces = self.words.pieces
        return pieces[pair >> SHIFT] + pieces[pair & ((1 << SHIFT) - 1)]


class Scored(Words):
    """Words in which all pairs that make the same piece are merged together."""

    def __init__(self, *args: Any, ranks: Scores, **kwargs: Any):
        ranks.words = self
        self.alike: dict[str, set[int]] = {}
        self.lowest = max(ranks.rank.values(), default=0.0)
        super().__init__(*args, ranks=ranks, **kwargs)

    def _enter(self, number: int, symbols: list[int], frequency: int) -> list[int]:
        for a, b in itertools.pairwise(symbols):
            if (pair := a << SHIFT | b) not in self.counts:
                self.alike.setdefault(self.pieces[a] + self.pieces[b], set()).add(pair)
        return super()._enter(number, symbols, frequency)

    def merge_into_new(self, pair: int, made: str) -> set[int]:
        new = self.next_id
        self.next_id += 1
        self.ids[made], self.pieces[new] = new, made
        self.lowest += 1
        self.ranks.rank[new] = self.lowest
        numbers: set[int] = set()
        for other in self.alike.pop(made):
            numbers |= self.where.pop(other)
        return {other for other in self._merge_again(numbers) if self.counts[other] > 0}
