"""Texts -> words as SentencePiece sees them: normalised by the model itself, cut where white space begins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from adapt.components import CleanerChoice
from adapt.tokenization.sentencepiece_rules import NEVER, SPACE
from adapt.tokenization.words import WordWork

_INNER = f"[^{SPACE}{re.escape(''.join(sorted(NEVER)))}]+"
PREFIX, SUFFIX = re.compile(f"{SPACE}*{_INNER}"), re.compile(f"{_INNER}{SPACE}*")
ANYWHERE = re.compile(f"[^{re.escape(''.join(sorted(NEVER)))}]+")


class PieceWork(WordWork):
    """Pickled for workers. A run of white space stays with the word beside it, for the pieces that it is in."""

    def __init__(
        self, model: bytes, added: Iterable[str], cleaners: tuple[CleanerChoice, ...], *, suffix: bool, split: bool
    ):
        super().__init__("", added, cleaners)
        self.model, self.suffix, self.split = model, suffix, split

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in ("model", "suffix", "split")}

    @cached_property
    def _processor(self):
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self.model)

    def _words(self, text: str) -> Iterator[str]:
        pattern = ANYWHERE if not self.split else SUFFIX if self.suffix else PREFIX
        return (match.group() for match in pattern.finditer(self._processor.normalize(text)))
