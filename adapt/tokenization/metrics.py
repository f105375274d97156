"""How well a tokenizer fits a text (spec C.3): ratios of sums over all documents, not means of ratios."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from adapt.tokenization.byte_bpe import BYTES

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Fit:
    """Of one tokenizer on one set of texts."""

    words: int
    """Separated by white space."""
    characters: int
    bytes: int
    """UTF-8."""
    tokens: int
    """Without what a template or post-processor adds."""
    lone: int
    """Tokens that are no whole characters: byte pieces, parts of a character, and unknown tokens."""
    used: int
    """Different tokens that occur."""

    @property
    def fertility(self) -> float:
        """Tokens per word."""
        return self.tokens / self.words

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def characters_per_token(self) -> float:
        return self.characters / self.tokens

    @property
    def lone_rate(self) -> float:
        return self.lone / self.tokens

    def facts(self) -> dict[str, Any]:
        names = ("fertility", "bytes_per_token", "characters_per_token", "lone_rate")
        return asdict(self) | {name: getattr(self, name) for name in names}


def fit(tokenizer: Any, texts: Sequence[str]) -> Fit:
    """`tokenizer` is a `tokenizers.Tokenizer`. Raises ValueError where there is no word in the texts."""
    words = sum(len(text.split()) for text in texts)
    if not words:
        raise ValueError("there is no word in these texts")
    lone, used = _lone(tokenizer), np.zeros(_size(tokenizer), bool)
    tokens = broken = 0
    for encoded in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        ids = np.asarray(encoded.ids, np.int64)
        tokens += len(ids)
        broken += int(lone[ids].sum())
        used[ids] = True
    size = sum(len(text.encode()) for text in texts)
    return Fit(words, sum(map(len, texts)), size, tokens, broken, int(used.sum()))


@dataclass(frozen=True)
class Change:
    """What an extension did to a text, line by line: a model that keeps its old weights sees the changed lines anew."""

    lines: int
    """Lines with something in them."""
    changed: int
    """Of these, lines whose ids are others than before."""
    new_used: int
    """Different new tokens that occur."""
    broken: int
    """Lines that decode to something else with the new tokenizer, and came back with the old one."""

    @property
    def changed_rate(self) -> float:
        return self.changed / self.lines


def change(old: Any, new: Any, first_new: int, texts: Sequence[str]) -> Change:
    """Between two `tokenizers.Tokenizer`; ids from `first_new` on are new."""
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    changed = broken = 0
    used: set[int] = set()
    sides = [t.encode_batch_fast(lines, add_special_tokens=False) for t in (old, new)]
    for line, before, after in zip(lines, *sides, strict=True):
        if before.ids != after.ids:
            changed += 1
            used.update(i for i in after.ids if i >= first_new)
            came_back = [t.decode(e.ids, skip_special_tokens=False) == line for t, e in ((old, before), (new, after))]
            broken += came_back == [True, False]
    return Change(len(lines), changed, len(used), broken)


def unreachable_pieces(tokenizer: Any) -> list[str] | None:
    """Pieces of the vocabulary that their own letters do not give; null for models where a piece is not simply text.

    Added tokens are cut out of the text, and byte pieces stand for what has no piece: neither counts."""
    from tokenizers import Tokenizer

    data = json.loads(tokenizer.to_str())
    model = data["model"]
    if (
        model["type"] not in ("BPE", "Unigram")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        return None
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = model | ({"ignore_merges": False, "dropout": None} if model["type"] == "BPE" else {})
    bare = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model, **parts}))
    added = {token["content"] for token in data["added_tokens"]}
    vocab = bare.get_vocab()
    unknown = _unknown(model)
    pieces = [p for p in vocab if p and p not in added and p != unknown and not BYTE_PIECE.fullmatch(p)]
    encoded = bare.encode_batch_fast(pieces, add_special_tokens=False)
    return sorted(p for p, e in zip(pieces, encoded, strict=True) if e.ids != [vocab[p]])


def _size(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def _lone(tokenizer: Any) -> np.ndarray:
    """[largest id + 1] bool: tokens that do not stand for whole characters."""
    data = json.loads(tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps([data["pre_tokenizer"], data["normalizer"]])
    added = {token["content"] for token in data["added_tokens"]}
    lone = np.zeros(_size(tokenizer), bool)
    for piece, i in tokenizer.get_vocab().items():
        if byte_level:
            lone[i] = piece not in added and not _whole(piece)
        else:
            lone[i] = bool(BYTE_PIECE.fullmatch(piece)) or piece == _unknown(data["model"])
    return lone


def _unknown(model: dict[str, Any]) -> str | None:
    """The token that stands for what the vocabulary lacks; Unigram models say it by its place."""
    if model["type"] == "Unigram":
        return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _whole(piece: str) -> bool:
    try:
        bytes(BYTES.get(letter, 0) for letter in piece).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def table(title: str, rows: Iterable[tuple[str, str, Fit]]) -> Any:
    """A rich table of (tokenizer, text, fit)."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title or None, title_justify="left", box=SIMPLE, padding=0)
    for name in ("text", "tokenizer"):
        shown.add_column(name, overflow="fold", min_width=min(16, len(name) + 6))
    for name in ("tokens/word", "bytes/token", "chars/token", "lone", "used"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.caption = "lone: tokens that are no whole character; used: different tokens that occur"
    for tokenizer, text, one in rows:
        shown.add_row(
            Text(text),
            Text(tokenizer),
            f"{one.fertility:.3f}",
            f"{one.bytes_per_token:.3f}",
            f"{one.characters_per_token:.3f}",
            f"{one.lone_rate:.2%}",
            f"{one.used:,d}",
        )
    return shown
