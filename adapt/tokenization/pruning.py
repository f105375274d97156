"""Which tokens of a byte-level BPE tokenizer can go, and the tokenizer without them.

After Tang et al. 2024, "Rethinking Optimization and Architecture for Tiny Language Models" (arXiv 2402.02791, tokenizer
compression): the least frequent tokens of a corpus go, and their rows with them.

What is kept is closed under the merges that its tokens are made by. So text that was tokenised into kept tokens alone
still is: the merges that ran on it are all there, in their old order, and at each step the one that ran was the first
of all, hence is the first of those left.

Other text is cut where a dropped token was, and there the next merges may run differently: with `ab c d` before, and `bc`
and `bcd` kept, `abcd` is now `a bcd`, which is fewer tokens. `strict` keeps those tokens too without which this can
happen: a dropped merge (x, y) needs that no kept one of lower priority begins with y or ends with x. Then x and y stay as
they are for good, so that every text has all boundaries that it had, and no fewer tokens. (It takes that a merge ranks
after those that make its two parts, as learning gives them; what is written is checked on texts in any case.)"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from adapt.errors import Problem, UserError
from adapt.tokenization.byte_bpe import BYTES, ByteBpe, Merge

LETTERS = {byte: letter for letter, byte in BYTES.items()}


def occurrences(bpe: ByteBpe, words: Mapping[str, int]) -> Counter[str]:
    """Token -> how often the words (byte-level pieces -> occurrences) have it, tokenised as the tokenizer does."""
    names = {i: piece for piece, i in bpe.vocab.items()}
    segmenter = bpe.segmenter(bool(bpe.data["model"].get("ignore_merges")))
    counts: Counter[str] = Counter()
    for word, encoded in zip(words, segmenter.encode_batch_fast(list(words), add_special_tokens=False), strict=True):
        for i in encoded.ids:
            counts[names[i]] += words[word]
    return counts


def find(bpe: ByteBpe, wished: Sequence[str]) -> list[str]:
    """The tokens that `keep` names, as text or as the vocabulary writes them. Raises UserError for those there are not."""
    found, problems = [], []
    for number, name in enumerate(wished):
        piece = "".join(LETTERS[byte] for byte in name.encode("utf-8", "replace"))
        token = next((t for t in (name if name in bpe.added else piece, piece, name) if t in bpe.ids), None)
        if token is None:
            parts = bpe.segmenter().encode(piece, add_special_tokens=False).tokens
            what = f"{name!r} is no token of the base, but {len(parts)}: {' '.join(parts)}; name those, or leave it out"
            problems.append(Problem(f"keep[{number}]", what))
        else:
            found.append(token)
    if problems:
        raise UserError(problems)
    return found


class Closure:
    """Tokens -> these, those kept always, and all that their merges need. Monotone: of more tokens, it is no less."""

    def __init__(self, bpe: ByteBpe, always: Iterable[str] = (), strict: bool = False):
        """Kept whatever is asked: the letters for bytes, added tokens, what the post-processor and padding put in, and
        `always`."""
        self.bpe, self.strict = bpe, strict
        self._made: dict[str, tuple[set[str], Merge | None]] = {}
        letters = {piece for piece in bpe.vocab if len(piece) == 1}
        self.always = self._with_parts({*letters, *bpe.added, *_named(bpe), *always})

    def __call__(self, tokens: Iterable[str]) -> set[str]:
        kept = self.always | self._with_parts(tokens)
        while self.strict and (needed := self._with_parts(self._guards(kept)) - kept):
            kept |= needed
        return kept

    def _with_parts(self, tokens: Iterable[str]) -> set[str]:
        return set().union(*(self._way(token)[0] for token in tokens))

    def _way(self, token: str) -> tuple[set[str], Merge | None]:
        """The token and all that is made on the way to it, and the last merge of these: in any text it is made by no
        other. The token alone where its letters do not give it."""
        if token not in self._made:
            self._made[token] = {token}, None
            symbols, made, last = list(token), {token, *token}, None
            while token not in self.bpe.added and len(symbols) > 1:
                pairs = [(self._ranks[p], i, p) for i, p in enumerate(pairwise(symbols)) if p in self._ranks]
                if not pairs:
                    break
                _, i, last = min(pairs)
                symbols[i : i + 2] = ["".join(last)]
                made.add(symbols[i])
            if len(symbols) == 1:
                self._made[token] = made, last
        return self._made[token]

    def _guards(self, kept: set[str]) -> Iterator[str]:
        """What dropped merges make that kept ones of lower priority would otherwise go past."""
        last_left: dict[str, int] = {}
        last_right: dict[str, int] = {}
        dropped = []
        for (left, right), rank in self._used:
            if left + right in kept:  # then so are its parts
                last_left[left] = last_right[right] = rank  # ascending: the last one stays
            else:
                dropped.append((left, right, rank))
        for left, right, rank in dropped:
            if last_left.get(right, -1) > rank or last_right.get(left, -1) > rank:
                yield left + right

    @cached_property
    def _used(self) -> list[tuple[Merge, int]]:
        """(merge, rank) of those that run on some text: a token may have several, of which one does."""
        return [(merge, rank) for merge, rank in self._ranks.items() if self._way("".join(merge))[1] == merge]

    @cached_property
    def _ranks(self) -> dict[Merge, int]:
        return {merge: rank for rank, merge in enumerate(self.bpe.merges)}


def choose(closure: Closure, counts: Mapping[str, int], min_count: int, tokens: int | None) -> set[str]:
    """What is kept: the tokens that occur `min_count` times, or of these the most frequent ones that fit, with all they
    need, into `tokens`. Of those that occur equally often, the smaller id is first. Raises UserError."""
    ids = closure.bpe.ids
    wanted = sorted((t for t, n in counts.items() if n >= min_count), key=lambda t: (-counts[t], ids[t]))
    if tokens is None:
        return closure(wanted)
    least = len(closure(()))
    if least > tokens:
        what = f"{tokens:,d} is too few: {least:,d} are kept always (bytes, added tokens, those of `keep`, and what these need)"
        raise UserError(Problem("tokens", what))
    fits = bisect_right(range(len(wanted) + 1), tokens, key=lambda n: len(closure(wanted[:n]))) - 1
    return closure(wanted[:fits])


def pruned(bpe: ByteBpe, kept: set[str]) -> ByteBpe:
    """Without the other tokens and their merges. Ids are 0, 1, 2, ... in the old order, everywhere in the file; added
    tokens stand in the vocabulary too, so that none is renumbered when it is loaded."""
    ids = {token: i for i, token in enumerate(t for t in sorted(bpe.ids, key=bpe.ids.__getitem__) if t in kept)}
    merges = [list(m) for m in bpe.merges if {*m, "".join(m)} <= kept]
    data = bpe.data | {
        "model": bpe.data["model"] | {"vocab": ids, "merges": merges},
        "added_tokens": [t | {"id": ids[t["content"]]} for t in bpe.data.get("added_tokens") or []],
        "post_processor": _renumbered(bpe.data.get("post_processor"), ids),
    }
    if padding := bpe.data.get("padding"):
        data["padding"] = padding | {"pad_id": ids[padding["pad_token"]]}
    return ByteBpe(data, json.dumps(data, ensure_ascii=False, indent=2))


def _renumbered(processor: Any, ids: Mapping[str, int]) -> Any:
    """A post-processor with the new ids: templates, the pairs of BERT's and RoBERTa's, and sequences of such."""
    if not isinstance(processor, dict):
        return processor
    made = dict(processor)
    if "processors" in made:
        made["processors"] = [_renumbered(p, ids) for p in made["processors"]]
    if isinstance(made.get("special_tokens"), dict):
        made["special_tokens"] = {
            name: entry | {"ids": [ids[t] for t in entry["tokens"]]} for name, entry in made["special_tokens"].items()
        }
    for side in ("sep", "cls"):
        if side in made:
            made[side] = [made[side][0], ids[made[side][0]]]
    return made


def _named(bpe: ByteBpe) -> set[str]:
    """Tokens that other parts of the file put into texts: template, padding, what stands for the unknown."""
    found: set[str | None] = {bpe.data["model"].get("unk_token"), (bpe.data.get("padding") or {}).get("pad_token")}

    def walk(processor: Any) -> None:
        for inner in processor.get("processors") or ():
            walk(inner)
        for entry in (processor.get("special_tokens") or {}).values():
            found.update(entry["tokens"])
        found.update(processor[side][0] for side in ("sep", "cls") if side in processor)

    walk(bpe.data.get("post_processor") or {})
    return {token for token in found if token is not None and token in bpe.ids}
