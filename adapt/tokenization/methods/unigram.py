"""Unigram as a recipe's `method`; the algorithm is in adapt/tokenization/sentencepiece_unigram.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapt.components import tokenizer_methods
from adapt.tokenization.sentencepiece_model import UNIGRAM, Pieces, SentencePiece


@dataclass(frozen=True, kw_only=True)
class UnigramConfig:
    fresh_tokens: int | None = None
    """Pieces of the model trained on the new texts; the most probable of them that the base lacks are appended. null:
    twice as many as are wanted."""

    def __post_init__(self) -> None:
        if self.fresh_tokens is not None and self.fresh_tokens < 1:
            raise ValueError(f"fresh_tokens={self.fresh_tokens} must be 1 or more")


class Unigram:
    kinds = (UNIGRAM,)
    coarsens = False
    reaches = True

    def __init__(self, config: UnigramConfig):
        self.config = config

    def __call__(self, base: SentencePiece, words: Mapping[str, int], num_tokens: int) -> Pieces:
        from adapt.tokenization.sentencepiece_unigram import extend_unigram

        return extend_unigram(words, base, num_tokens, self.config.fresh_tokens or 2 * num_tokens)


@tokenizer_methods.register("unigram")
def unigram(config: UnigramConfig) -> Unigram:
    return Unigram(config)
