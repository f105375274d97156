"""Tokenizers that go on where the tiny one stopped: naive continued BPE, slow and plain."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tests import tiny

TEXT = "a administração comunicação informação é a coração da educação; não são nações sem comunicação " * 3


def extended_tokenizer(count: int = 40, base=None, special: str | None = None):
    """`count` more merges, learned from Portuguese; ids go on after the base's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    base = base or tiny.tiny_tokenizer()
    stored = json.loads(base.backend_tokenizer.to_str())
    split = base.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    words = [[t.value for t in base.backend_tokenizer.model.tokenize(word)] for word, _ in split]
    vocab, size = stored["model"]["vocab"], len(base)
    for token, i in base.get_vocab().items():
        vocab.setdefault(token, i)
    while len(vocab) < size + count:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        stored["model"]["merges"].append([left, right])
        vocab.setdefault(left + right, len(vocab))
        words = [_merged(word, left, right) for word in words]
    raw = Tokenizer.from_str(json.dumps(stored))
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|im_end|>"
    )
    made.chat_template = base.chat_template
    if special:
        made.add_special_tokens({"additional_special_tokens": [special]})
    return made


def save_extended(folder: Path, count: int = 40, **how) -> Path:
    extended_tokenizer(count, **how).save_pretrained(folder)
    return folder


def _merged(word: list[str], left: str, right: str) -> list[str]:
    found: list[str] = []
    for token in word:
        if found and found[-1] == left and token == right:
            found[-1] = left + right
        else:
            found.append(token)
    return found
