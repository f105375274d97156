"""For comparison: Chinese-LLaMA's merge of two SentencePiece models (Cui et al. 2023, arXiv 2304.08177): as Cabrita's, but
every new piece gets the score 0, above all old merges."""

from __future__ import annotations

from adapt.components import tokenizer_methods
from adapt.tokenization.methods.cabrita import Merge, MergeConfig


@tokenizer_methods.register("chinese_llama")
def chinese_llama(config: MergeConfig) -> Merge:
    return Merge(config, 0.0)
