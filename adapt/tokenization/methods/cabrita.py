"""For comparison: Cabrita's merge of two SentencePiece models (Larcher et al. 2023, arXiv 2308.11878; 22-hours/open_cabrita,
src/merge_tokenizer.py): a BPE model is trained on the new texts, and its missing pieces are appended with their own scores.

Those scores rank the new merges among the old ones, where they take words apart that the old pieces made; equal scores have
no order in tokenizer.json (spec B.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapt.components import tokenizer_methods
from adapt.tokenization.sentencepiece_fresh import trained
from adapt.tokenization.sentencepiece_model import BPE, Pieces, SentencePiece


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    fresh_tokens: int | None = None
    """Pieces of the model trained on the new texts; the first of them that the base lacks are appended. null: twice as
    many as are wanted, Cabrita's proportion."""

    def __post_init__(self) -> None:
        if self.fresh_tokens is not None and self.fresh_tokens < 1:
            raise ValueError(f"fresh_tokens={self.fresh_tokens} must be 1 or more")


class Merge:
    kinds = (BPE,)
    coarsens = False
    reaches = False

    def __init__(self, config: MergeConfig, score: float | None):
        """`score`: of every new piece; null: the one it has in the model that was trained."""
        self.config, self.score = config, score

    def __call__(self, base: SentencePiece, words: Mapping[str, int], num_tokens: int) -> Pieces:
        if not num_tokens:
            return Pieces()
        size = self.config.fresh_tokens or 2 * num_tokens
        missing = [(p, s) for p, s in trained(words, "bpe", size) if p not in base.taken][:num_tokens]
        scores = [score if self.score is None else self.score for _, score in missing]
        return Pieces(tokens=[piece for piece, _ in missing], scores=scores)


@tokenizer_methods.register("cabrita")
def cabrita(config: MergeConfig) -> Merge:
    return Merge(config, None)
