"""For comparison: a tokenizer learned from scratch on the new texts, whose missing tokens and merges are appended.

So Cabrita (22-hours/open_cabrita, src/merge_tokenizer.py) and Chinese-LLaMA extended LLaMA's tokenizer; here for byte-level
BPE, where merges take the place of scores. The old merges come first and take words apart differently from the fresh
tokenizer, so that many of the appended tokens are never reached (spec B.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapt.components import tokenizer_methods
from adapt.tokenization.byte_bpe import ByteBpe
from adapt.tokenization.continued_bpe import Filter, Learned, learn


@dataclass(frozen=True, kw_only=True)
class AppendConfig:
    fresh_tokens: int | None = None
    """Tokens of the fresh tokenizer; the first of them that the base lacks are appended. null: twice as many as are
    wanted, Cabrita's proportion."""
    max_token_bytes: int = 32
    """Longer tokens are not made."""

    def __post_init__(self) -> None:
        if self.fresh_tokens is not None and self.fresh_tokens < 1:
            raise ValueError(f"fresh_tokens={self.fresh_tokens} must be 1 or more")


class Append:
    kinds = (ByteBpe.kind,)
    coarsens = False
    reaches = False

    def __init__(self, config: AppendConfig):
        self.config = config

    def __call__(self, base: ByteBpe, words: Mapping[str, int], num_tokens: int) -> Learned:
        allowed = Filter(self.config.max_token_bytes, False, frozenset(base.added))
        fresh = learn(words, base.letters(), self.config.fresh_tokens or 2 * num_tokens, allowed)
        known, ranked = set(base.vocab), set(base.merges)
        appended = Learned()
        for merge, count in zip(fresh.merges, fresh.counts, strict=True):
            if len(appended.tokens) == num_tokens:
                break
            if merge not in ranked:
                appended.merges.append(merge)
                appended.counts.append(count)
                if (made := "".join(merge)) not in known:
                    known.add(made)
                    appended.tokens.append(made)
        return appended


@tokenizer_methods.register("append")
def append(config: AppendConfig) -> Append:
    return Append(config)
