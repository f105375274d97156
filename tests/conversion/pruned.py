"""A base with its special tokens behind the vocabulary (as Llama 3 has them), and its tokenizer without what a text lacks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adapt.tokenization.byte_bpe import ByteBpe
from adapt.tokenization.pruning import Closure, choose, occurrences, pruned
from tests import tiny
from tests.tokenization.byte_level import SPECIALS, base, words

TEXT = "the quick brown fox jumps over the lazy dog in the documentation"
WHOLE = base("gpt2", 340)
ROWS = len(WHOLE.ids)
EOS, BOS, PAD = (WHOLE.added[s] for s in SPECIALS)


def save_base(folder: Path, family: str = "llama", **over) -> Path:
    ids = {"eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": PAD}
    tiny.tiny_model(family, **({"vocab_size": ROWS} | ids | over)).save_pretrained(folder)
    return save_tokenizer(WHOLE, folder)


def save_tokenizer(bpe: ByteBpe, folder: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    end, start, pad = SPECIALS
    made = PreTrainedTokenizerFast(tokenizer_object=bpe.tokenizer(), eos_token=end, bos_token=start, pad_token=pad)
    made.chat_template = tiny.CHAT_TEMPLATE
    made.save_pretrained(folder)
    return folder


def small(text: str = TEXT, keep: Iterable[str] = ()) -> ByteBpe:
    return pruned(WHOLE, choose(Closure(WHOLE, keep), occurrences(WHOLE, words(WHOLE, text)), 1, None))


def save_pruned(folder: Path, text: str = TEXT, keep: Iterable[str] = ()) -> Path:
    return save_tokenizer(small(text, keep), folder)
