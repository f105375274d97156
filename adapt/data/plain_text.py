"""Plain text -> token ids, on the tokenizer's Rust core alone: a worker that sees no conversation needs no more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np

PIECE = 2**20
"""Characters tokenised at once: of a longer document never more than so many are in the tokenizer's memory."""
BETWEEN_WORDS = re.compile(r"(?<=\S)(?= \S)")
AFTER_SPACE = re.compile(r"(?<=\s)(?=\S)")
LOOK_BACK = 4096
PROBES = (
    "The fox's 12 dogs\n\n  über\tall 日本 🙂",
    " leading, and `code(x)` ",
    "x",
)


class PlainText:
    """`split_special_tokens` holds for every text: a document that mentions `<|endoftext|>` does not end there."""

    def __init__(self, tokenizer):
        """`is_fast` is False where the Rust core alone gives other ids than the tokenizer: use the tokenizer then."""
        self.eos = tokenizer.eos_token_id
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._state = backend.to_str() if backend is not None else None
        self.before: list[int] = []
        self.after: list[int] = []
        """Ids that the tokenizer puts around every text."""
        self.is_fast = False
        if self._state is not None:
            plain = self._encode("x", special=False)
            around = self._encode("x", special=True)
            at = next((i for i in range(len(around)) if around[i : i + len(plain)] == plain), None)
            if at is not None:
                self.before, self.after = around[:at], around[at + len(plain) :]
                names = list(tokenizer.added_tokens_decoder.values())[:3]
                probes = [*PROBES, *(f"say {name} or" for name in names)]
                self.is_fast = all(
                    self.ids(probes, special) == through(tokenizer, probes, special) for special in (True, False)
                )

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "_core"}

    @cached_property
    def _core(self):
        from tokenizers import Tokenizer

        core = Tokenizer.from_str(self._state)
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
        return core

    def ids(self, texts: list[str], special: bool = True) -> list:
        """Of each text, list[int]; of one longer than PIECE an array of int32, tokenised piece by piece.

        Pieces are cut where a word ends before a single space, which pre-tokenizers cut at too, so the ids are those of
        the whole; only where 4,096 characters have no such place (and for tokenizers that merge across spaces or put a
        mark before every text) may a token at the cut be another.
        """
        short = [t for t in texts if len(t) <= PIECE]
        encoded = iter(self._core.encode_batch_fast(short, add_special_tokens=special) if short else ())
        return [next(encoded).ids if len(t) <= PIECE else self._long(t, special) for t in texts]

    def ended(self, ids):
        """With the end-of-text token, where there is one and it is not there already."""
        if self.eos is None or not len(ids) or ids[-1] == self.eos:
            return ids
        return np.append(ids, np.int32(self.eos)) if isinstance(ids, np.ndarray) else [*ids, self.eos]

    def _encode(self, text: str, special: bool) -> list[int]:
        return self._core.encode_batch_fast([text], add_special_tokens=special)[0].ids

    def _long(self, text: str, special: bool) -> np.ndarray:
        parts = [np.array(self._encode(piece, special=False), np.int32) for piece in pieces(text)]
        if special:
            parts = [np.array(self.before, np.int32), *parts, np.array(self.after, np.int32)]
        return np.concatenate(parts)


def through(tokenizer, texts: list[str], special: bool = True) -> list[list[int]]:
    """The same by the tokenizer's own call, for those without a Rust core."""
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, split_special_tokens=True)[
        "input_ids"
    ]


def pieces(text: str, size: int | None = None) -> Iterator[str]:
    """`text` in pieces of at most `size` (PIECE) characters, cut between words."""
    size = size or PIECE
    start = 0
    while len(text) - start > size:
        cut = _cut(text, start, start + size)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _cut(text: str, start: int, end: int) -> int:
    begin = max(start + 1, end - LOOK_BACK)
    for pattern in (BETWEEN_WORDS, AFTER_SPACE):
        found = [m.start() for m in pattern.finditer(text, begin, min(end + 2, len(text))) if m.start() <= end]
        if found:
            return found[-1]
    return end
