"""Continued BPE: learning goes on where the old tokenizer stopped (Purason et al. 2025, arXiv 2512.03989).

Every new token is a merge of two symbols that the old tokenizer really gives, so text reaches it. And since all new
merges rank after the old ones, the old merges run to their end first and the new ones only take boundaries away: no text
gets more tokens than before, and text without a new merge has the ids it had.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapt.tokenization.byte_bpe import ByteBpe, Merge, piece_bytes
from adapt.tokenization.scripts import Scripts

SHIFT = 32
"""A pair of symbols is one integer, `a << SHIFT | b`: it hashes faster than a tuple."""
LOW = (1 << SHIFT) - 1


@dataclass(frozen=True)
class Learned:
    merges: list[Merge] = field(default_factory=list)
    """New merges, in the order in which they were learned."""
    tokens: list[str] = field(default_factory=list)
    """New tokens (byte-level pieces), in that order too. Fewer than merges where two symbols make a token that exists."""
    counts: list[int] = field(default_factory=list)
    """Occurrences of each merge's pair in the corpus when it was learned; none increases on the one before, except after
    merges that make an existing token."""

    def first(self, num_tokens: int) -> Learned:
        """What learning would have given, had it stopped at so many tokens."""
        made = 0
        for end, new in enumerate(self._news()):
            if made == num_tokens:
                return Learned(self.merges[:end], self.tokens[:made], self.counts[:end])
            made += new
        return self

    def _news(self) -> list[bool]:
        """Of each merge, whether it makes a new token."""
        left = set(self.tokens)
        news = []
        for a, b in self.merges:
            news.append(a + b in left)
            left.discard(a + b)
        return news


@dataclass(frozen=True)
class Filter:
    """Which byte-level pieces may become tokens."""

    max_token_bytes: int
    digits: bool
    forbidden: frozenset[str]
    """Texts of added tokens."""
    scripts: Scripts | None = None
    """null: all."""

    def __call__(self, piece: str) -> bool:
        if len(piece) > self.max_token_bytes:
            return False
        text = piece_bytes(piece)
        if not self.digits and any(48 <= byte <= 57 for byte in text):
            return False
        if text.isspace():
            return False
        if b"<|" in text or b"|>" in text:  # half of a special token, as chat templates write them
            return False
        if self.scripts is not None and not self.scripts(text):
            return False
        return text.decode("utf-8", "replace") not in self.forbidden


def learn(
    words: Mapping[str, int],
    base: ByteBpe,
    num_tokens: int,
    allowed: Callable[[str], bool],
    min_frequency: int = 2,
) -> Learned:
    """Up to `num_tokens` new tokens from word counts (byte-level pieces -> occurrences).

    Fewer come back when no allowed pair is left that occurs `min_frequency` times. The same words in any order give the
    same merges: of pairs that occur equally often, the one with the smaller ids is first."""
    vocab = base.vocab
    letters = {piece for piece in vocab if len(piece) == 1}
    known = [word for word in words if letters.issuperset(word)]  # bytes that the vocabulary lacks are lost
    encoded = base.segmenter().encode_batch_fast(known, add_special_tokens=False)
    state = Words(
        (e.ids for e in encoded),
        (words[word] for word in known),
        ids={piece: i for piece, i in vocab.items() if piece not in base.added},  # whose text never comes here
        pieces={i: piece for piece, i in vocab.items()},
        next_id=base.next_id,
        ranks={vocab[a] << SHIFT | vocab[b]: (rank, vocab[a + b]) for rank, (a, b) in enumerate(base.merges)},
    )
    return merge_pairs(state, num_tokens, allowed, min_frequency)


def merge_pairs(state: Words, num_tokens: int, allowed: Callable[[str], bool], min_frequency: int) -> Learned:
    """The most frequent allowed pair again and again, on words that the old tokenizer has taken apart."""
    learned = Learned()
    heap = [(-count, pair) for pair, count in state.counts.items()]
    heapq.heapify(heap)
    rejected: set[int] = set()
    while len(learned.tokens) < num_tokens and heap:
        negative, pair = heapq.heappop(heap)
        count = state.counts.get(pair, 0)
        if pair in rejected or count < min_frequency:
            continue
        if count != -negative:  # it has changed since; where it rose, it was pushed then
            if count < -negative:
                heapq.heappush(heap, (-count, pair))
            continue
        left, right = state.pieces[pair >> SHIFT], state.pieces[pair & LOW]
        made = left + right
        token = state.ids.get(made)
        if token is None and not allowed(made):
            rejected.add(pair)
            continue
        learned.merges.append((left, right))
        learned.counts.append(count)
        if token is None:
            learned.tokens.append(made)
            risen = state.merge_into_new(pair, made)
        else:
            risen = state.merge_into_old(pair, token)
        for other in risen:
            heapq.heappush(heap, (-state.counts[other], other))
    return learned


class Words:
    """Distinct words as symbols, with the counts of adjacent pairs and where each pair is."""

    def __init__(
        self,
        symbols: Iterable[list[int]],
        frequency: Iterable[int],
        *,
        ids: dict[str, int],
        pieces: dict[int, str],
        next_id: int,
        ranks: Any,
    ):
        """`ids`: pieces that a merge may make; `pieces`: what each symbol stands for; `ranks`: pair -> (rank, token)."""
        self.ids, self.pieces, self.next_id, self.ranks = ids, pieces, next_id, ranks
        self.symbols: list[list[int]] = []
        self.frequency: list[int] = []
        for word, occurrences in zip(symbols, frequency, strict=True):
            if len(word) > 1:
                self.symbols.append(word)
                self.frequency.append(occurrences)
        self.counts: dict[int, int] = defaultdict(int)
        self.where: dict[int, set[int]] = defaultdict(set)
        for number, symbols in enumerate(self.symbols):
            self._enter(number, symbols, self.frequency[number])

    def _enter(self, number: int, symbols: list[int], frequency: int) -> list[int]:
        pairs = [a << SHIFT | b for a, b in itertools.pairwise(symbols)]
        for pair in pairs:
            self.counts[pair] += frequency
            self.where[pair].add(number)
        return pairs

    def merge_into_new(self, pair: int, made: str) -> set[int]:
        """Replace the pair by a symbol that is in no merge yet; the pairs that became more frequent."""
        new = self.next_id
        self.next_id += 1
        self.ids[made], self.pieces[new] = new, made
        self.ranks[pair] = (len(self.ranks), new)
        a, b = pair >> SHIFT, pair & LOW
        counts, where = self.counts, self.where
        risen = set()
        for number in where.pop(pair):
            symbols, frequency = self.symbols[number], self.frequency[number]
            i = 0
            while i < len(symbols) - 1:
                if symbols[i] == a and symbols[i + 1] == b:
                    if i:
                        before = symbols[i - 1]
                        counts[before << SHIFT | a] -= frequency
                        other = before << SHIFT | new
                        counts[other] += frequency
                        where[other].add(number)
                        risen.add(other)
                    if i + 2 < len(symbols):
                        after = symbols[i + 2]
                        counts[b << SHIFT | after] -= frequency
                        other = new << SHIFT | after
                        counts[other] += frequency
                        where[other].add(number)
                        risen.add(other)
                    symbols[i : i + 2] = [new]
                i += 1
        del counts[pair]
        return {other for other in risen if counts[other] > 0}

    def merge_into_old(self, pair: int, token: int) -> set[int]:
        """The pair makes a token that exists, and that may be in merges itself: those rank before this one, and run."""
        self.ranks[pair] = (len(self.ranks), token)
        return self._merge_again(self.where.pop(pair))

    def _merge_again(self, numbers: Iterable[int]) -> set[int]:
        """The words of these numbers, merged as far as they can be; the pairs that may have become more frequent."""
        risen = set()
        for number in numbers:
            symbols, frequency = self.symbols[number], self.frequency[number]
            for a, b in itertools.pairwise(symbols):
                self.counts[a << SHIFT | b] -= frequency
            symbols = self.symbols[number] = merged(symbols, self.ranks)
            risen.update(self._enter(number, symbols, frequency))
        return risen


def merged(symbols: list[int], ranks: Mapping[int, tuple[int, int]]) -> list[int]:
    """BPE: as long as two neighbours can be merged, the pair of lowest rank is, from left to right."""
    symbols = list(symbols)
    while True:
        found = [
            (*ranks[pair], i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
            if (pair := a << SHIFT | b) in ranks
        ]
        if not found:
            return symbols
        _, token, i = min(found, key=lambda f: (f[0], f[2]))
        symbols[i : i + 2] = [token]
