"""Lines that were seen before, anywhere in the dataset: menus, licence notices, boilerplate that survived the markup.

Exact line deduplication as in Lee et al. 2022's setting of whole repeated spans, but by lines: cheap, and what it removes can
be read. Only plain-text documents are changed: a conversation with a line missing would be another conversation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from array import array
from dataclasses import dataclass

from adapt.components import cleaners
from adapt.data.documents import Document

GAPS = re.compile(r"\n{3,}")


@dataclass(frozen=True, kw_only=True)
class LinesConfig:
    min_length: int = 40
    """Characters a line needs to count: shorter ones (headings) may repeat, and indented ones (code) in any case."""
    min_words: int = 20
    """Documents that lost a line and have fewer words left are dropped."""


class Lines:
    sequential = True

    def __init__(self, config: LinesConfig):
        self.config = config
        self.memory = array("Q")
        self._seen: set[int] = set()

    def restore(self, memory: array) -> None:
        self.memory, self._seen = array("Q", memory), set(memory)

    def __call__(self, document: Document) -> Document | str:
        if document.text is None:
            return document
        lines = document.text.split("\n")
        kept = [line for line in lines if self._is_new(line)]
        if len(kept) == len(lines):
            return document
        text = GAPS.sub("\n\n", "\n".join(kept)).strip("\n")
        if len(text.split()) < self.config.min_words:
            return "only lines seen before"
        return dataclasses.replace(document, text=text)

    def _is_new(self, line: str) -> bool:
        """Whether the line may stay: short, indented, or seen for the first time; then it is remembered. Case and spacing
        make no other line."""
        if line[:1].isspace():
            return True
        normal = " ".join(line.casefold().split())
        if len(normal) < self.config.min_length:
            return True
        key = int.from_bytes(hashlib.blake2b(normal.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        if key in self._seen:
            return False
        self._seen.add(key)
        self.memory.append(key)
        return True


@cleaners.register("lines")
def lines(config: LinesConfig) -> Lines:
    return Lines(config)
