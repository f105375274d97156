"""Documents too short to learn from, or too long to be one document."""

from __future__ import annotations

from dataclasses import dataclass

from adapt.components import cleaners
from adapt.data.documents import Document


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    min_words: int | None = 5
    """Drop documents with fewer words (pieces between white space); null: none is too short."""
    max_words: int | None = None
    """Drop documents with more words; null: none is too long."""

    def __post_init__(self) -> None:
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise ValueError(f"min_words={self.min_words} is above max_words={self.max_words}: nothing would be kept")


class Length:
    sequential = False

    def __init__(self, config: LengthConfig):
        self.config = config

    def __call__(self, document: Document) -> Document | str:
        words = sum(len(s.split()) for s in document.strings())
        if self.config.min_words is not None and words < self.config.min_words:
            return "too short"
        if self.config.max_words is not None and words > self.config.max_words:
            return "too long"
        return document


@cleaners.register("length")
def length(config: LengthConfig) -> Length:
    return Length(config)
