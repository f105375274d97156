"""What SentencePiece's trainer lets into one piece, by the flags that a model carries (`trainer_spec`).

Its rules, from `TrainerInterface::IsValidSentencePiece` of google/sentencepiece: white space (`▁`) only where a word begins
(or ends), no digits beside anything under `split_digits`, one script under `split_by_unicode_script`, a greatest length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

SPACE = "▁"
NEVER = frozenset("\0\t\n\r \u2585")
"""Characters in no piece: ends of lines and fields, and what the trainer uses as marks."""
INHERITED = "\u0301"


@dataclass(frozen=True)
class PieceRules:
    max_length: int
    """Characters."""
    split_digits: bool
    split_by_number: bool
    split_by_script: bool
    split_by_whitespace: bool
    suffix: bool
    """White space ends a word instead of beginning one."""

    @staticmethod
    def of(spec: Any) -> PieceRules:
        return PieceRules(
            spec.max_sentencepiece_length,
            spec.split_digits,
            spec.split_by_number,
            spec.split_by_unicode_script,
            spec.split_by_whitespace,
            spec.treat_whitespace_as_suffix,
        )

    def allows(self, piece: str) -> bool:
        """Whether it may be a piece. One of white space alone may not: it says nothing about a language."""
        return len(piece) <= self.max_length and self.joins(piece)

    def joins(self, piece: str) -> bool:
        """The same for any length."""
        if not NEVER.isdisjoint(piece) or not piece.strip(SPACE):
            return False
        if self._space(piece) or (self.split_digits and len(piece) > 1 and any(map(str.isdecimal, piece))):
            return False
        return not self.split_by_script or self._one_script(piece)

    def _space(self, piece: str) -> bool:
        """White space where none may be."""
        inner = piece[:-1] if self.suffix else piece[1:]
        if self.split_by_whitespace:
            return SPACE in inner
        return piece.startswith(SPACE) if self.suffix else piece.endswith(SPACE)

    def _one_script(self, piece: str) -> bool:
        before = None
        for letter in piece:
            if letter == SPACE or (letter.isdecimal() and not self.split_by_number):
                script = before if letter == SPACE else None
            elif (script := SCRIPTS.of(letter)) == SCRIPTS.inherited:
                script = before
            if None not in (script, before) and script != before:
                return False
            before = script
        return True


class _Scripts:
    """Scripts as numbers, told apart by the `UnicodeScripts` pre-tokenizer (Kana counts as Han there, as it should)."""

    def __init__(self) -> None:
        self._known: list[str] = []
        self.of = lru_cache(maxsize=None)(self._of)

    @cached_property
    def _splitter(self) -> Any:
        from tokenizers.pre_tokenizers import UnicodeScripts

        return UnicodeScripts()

    @cached_property
    def inherited(self) -> int:
        """Combining marks, which belong to any script."""
        return self.of(INHERITED)

    def _of(self, letter: str) -> int:
        for number, known in enumerate(self._known):
            if len(self._splitter.pre_tokenize_str(known + letter)) == 1:
                return number
        self._known.append(letter)
        return len(self._known) - 1


SCRIPTS = _Scripts()
