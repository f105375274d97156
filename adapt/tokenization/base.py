"""What a method of extension is: word counts in, merges and tokens out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from adapt.tokenization.byte_bpe import ByteBpe
from adapt.tokenization.continued_bpe import Learned


class Method(Protocol):
    coarsens: bool
    """Whether it promises that token boundaries are only removed and that every new token is reached; a result that
    breaks the promise is not written. One that promises nothing is for comparison."""

    def __call__(self, base: ByteBpe, words: Mapping[str, int], num_tokens: int) -> Learned:
        """Up to `num_tokens` new tokens from the words of the corpus (byte-level pieces -> occurrences)."""
        ...
