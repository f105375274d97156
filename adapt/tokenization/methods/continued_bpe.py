"""Continued BPE as a recipe's `method`; the algorithm is in adapt/tokenization/continued_bpe.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapt.components import tokenizer_methods
from adapt.tokenization.base import Base
from adapt.tokenization.byte_bpe import ByteBpe
from adapt.tokenization.continued_bpe import Filter, Learned, learn
from adapt.tokenization.scripts import Scripts


@dataclass(frozen=True, kw_only=True)
class ContinuedBpeConfig:
    min_frequency: int = 2
    """A pair that occurs less often is not merged."""
    min_character: int = 2
    """SentencePiece: a character without a piece of its own gets one if it occurs so often."""
    max_token_bytes: int = 32
    """Longer tokens are not made."""
    digits: bool = False
    """Make tokens with digits (0-9) in them. Pre-tokenizers that cut numbers up set the limit anyway."""
    scripts: tuple[str, ...] | None = None
    """Unicode scripts of the tokens' letters: `[Latin]`, `[Han, Hiragana, Katakana]`. Spaces, digits and marks that are
    used with every script pass always; part of a character passes where a character of these scripts has it. null: all."""

    def __post_init__(self) -> None:
        if self.min_frequency < 1:
            raise ValueError(f"min_frequency={self.min_frequency} must be 1 or more")
        if self.min_character < 1:
            raise ValueError(f"min_character={self.min_character} must be 1 or more")
        if self.max_token_bytes < 2:
            raise ValueError(f"max_token_bytes={self.max_token_bytes} must be 2 or more: a new token has two parts")
        if self.scripts is not None:
            if not self.scripts:
                raise ValueError("scripts=[] leaves no letters to make tokens of; null allows all scripts")
            Scripts(self.scripts)


class ContinuedBpe:
    kinds = (ByteBpe.kind, "SentencePiece BPE")
    coarsens = True
    reaches = True

    def __init__(self, config: ContinuedBpeConfig):
        self.config = config

    def __call__(self, base: Base, words: Mapping[str, int], num_tokens: int) -> Learned:
        config = self.config
        scripts = None if config.scripts is None else Scripts(config.scripts)
        if isinstance(base, ByteBpe):
            allowed = Filter(config.max_token_bytes, config.digits, frozenset(base.added), scripts)
            return learn(words, base, num_tokens, allowed, config.min_frequency)
        from adapt.tokenization.sentencepiece_bpe import PieceFilter, learn_pieces

        allowed = PieceFilter(base, config.max_token_bytes, config.digits, scripts)
        return learn_pieces(words, base, num_tokens, allowed, config.min_frequency, config.min_character)


@tokenizer_methods.register("continued_bpe")
def continued_bpe(config: ContinuedBpeConfig) -> ContinuedBpe:
    return ContinuedBpe(config)
