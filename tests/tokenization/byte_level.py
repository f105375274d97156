"""Small byte-level BPE tokenizers in the styles there are, learned from English, and Portuguese to extend them by."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache

from adapt.data.documents import Document
from adapt.tokenization.byte_bpe import ByteBpe
from adapt.tokenization.continued_bpe import Filter, Learned, learn
from adapt.tokenization.words import WordWork
from tests.tiny import TEXT

STYLES = ("gpt2", "roberta", "llama3", "qwen", "smollm2")
PORTUGUESE = """A configuração do sistema não é difícil: a administração das aplicações está na documentação em português.
Você não precisa de autorização para a instalação; a atualização da documentação também não é difícil.
As informações sobre a programação, a compilação e a execução estão na seção de configuração das aplicações.
São 1234 informações em 2026, e a publicação da informação não está na administração. Coração, coração, corações!
"""
ENGLISH = (
    TEXT
    + "the configuration of the system is not difficult: the information is in the documentation of 1234 systems.\n"
)
SPECIALS = ("<|end|>", "<|start|>", "<|pad|>")


@cache
def base(style: str = "smollm2", vocab: int = 340) -> ByteBpe:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel
    groups = {"llama3": r"\p{N}{1,3}", "qwen": r"\p{N}"}
    if style in groups:
        pattern = Regex(rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{groups[style]}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s+(?!\S)|\s+")
        split = pre_tokenizers.Split(pattern, "isolated")
        raw.pre_tokenizer = pre_tokenizers.Sequence([split, level(add_prefix_space=False, use_regex=False)])
    elif style == "smollm2":
        digits = pre_tokenizers.Digits(individual_digits=True)
        raw.pre_tokenizer = pre_tokenizers.Sequence([digits, level(add_prefix_space=False)])
    else:
        raw.pre_tokenizer = level(add_prefix_space=style == "roberta")
    if style == "qwen":
        raw.normalizer = normalizers.NFC()
    raw.decoder = decoders.ByteLevel()
    inside = style == "smollm2"  # its specials are the first of the vocabulary; those of the others lie above it
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS) if inside else [],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([ENGLISH], trainer)
    data = json.loads(raw.to_str())
    data["model"]["ignore_merges"] = style == "llama3"
    raw = Tokenizer.from_str(json.dumps(data))
    raw.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return ByteBpe.parse(raw.to_str())


def words(bpe: ByteBpe, *texts: str) -> Counter[str]:
    documents = [Document(id=str(i), text=text) for i, text in enumerate(texts or (PORTUGUESE,))]
    return WordWork(bpe.text, bpe.added).clean_and_count(documents, 0)[0]


def filter_of(bpe: ByteBpe) -> Filter:
    return Filter(max_token_bytes=32, digits=False, forbidden=frozenset(bpe.added))


def learned(bpe: ByteBpe, num_tokens: int = 50, *texts: str) -> Learned:
    return learn(words(bpe, *texts), bpe, num_tokens, filter_of(bpe))


@cache
def extended(style: str = "smollm2", num_tokens: int = 50) -> ByteBpe:
    found = learned(base(style), num_tokens)
    assert len(found.tokens) == num_tokens
    return base(style).extended(found.merges, found.tokens)
