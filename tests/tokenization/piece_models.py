"""Small SentencePiece models in the styles there are, trained on English, and folders of them."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

from adapt.data.documents import Document
from adapt.tokenization.sentencepiece_bpe import PieceFilter, learn_pieces
from adapt.tokenization.sentencepiece_model import Pieces, SentencePiece
from tests.tiny import CHAT_TEMPLATE
from tests.tokenization.byte_level import ENGLISH, PORTUGUESE

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
STYLES: dict[str, dict[str, Any]] = {
    "llama": IDENTITY | {"byte_fallback": True, "split_digits": True, "vocab_size": 420},
    "whitespace": IDENTITY | {"byte_fallback": True, "allow_whitespace_only_pieces": True, "vocab_size": 420},
    "no_bytes": {"vocab_size": 160, "remove_extra_whitespaces": True},
    "no_prefix": IDENTITY | {"byte_fallback": True, "add_dummy_prefix": False, "vocab_size": 420},
    "user": IDENTITY | {"byte_fallback": True, "user_defined_symbols": ["<sep>", "[INST]"], "vocab_size": 420},
    "control": IDENTITY | {"byte_fallback": True, "control_symbols": ["<mask>"], "pad_id": 3, "vocab_size": 420},
    "suffix": IDENTITY | {"byte_fallback": True, "treat_whitespace_as_suffix": True, "vocab_size": 420},
}
"""nmt_nfkc and the removal of spaces are SentencePiece's own defaults (`no_bytes`)."""
SPACES = "x  y   z    def f(a):\n        return a\n"


@cache
def trained(style: str = "llama", kind: str = "bpe", text: str = ENGLISH + SPACES) -> bytes:
    from sentencepiece import SentencePieceTrainer

    options = {"hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1, "character_coverage": 1.0} | STYLES[style]
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=written, model_type=kind, **options
    )
    return written.getvalue()


def folder_of(style: str, path: Path, kind: str = "bpe", *, fast: bool = True, added: tuple[str, ...] = ()) -> Path:
    """As Llama-2's: tokenizer.model, tokenizer_config.json and, unless `fast` is off, tokenizer.json."""
    path.mkdir(parents=True)
    (path / "tokenizer.model").write_bytes(trained(style, kind))
    config = {"tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer", "model_max_length": 77}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if fast:
        from tokenizers import AddedToken, processors

        raw = read(path).tokenizer()
        raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
        (path / "tokenizer.json").write_text(raw.to_str())
    return path


def read(path: Path) -> SentencePiece:
    found = SentencePiece.read(path)
    assert found is not None
    return found


@cache
def base(style: str = "llama", kind: str = "bpe") -> SentencePiece:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return read(folder_of(style, Path(folder) / "base", kind, fast=False))


def words(model: SentencePiece, *texts: str):
    documents = [Document(id=str(i), text=text) for i, text in enumerate(texts or (PORTUGUESE,))]
    return model.work(()).clean_and_count(documents, 0)[0]


def filter_of(model: SentencePiece) -> PieceFilter:
    return PieceFilter(model, 32, False)


def learned(model: SentencePiece, num_tokens: int = 50, *texts: str) -> Pieces:
    return learn_pieces(words(model, *texts), model, num_tokens, filter_of(model))


@cache
def extended(style: str = "llama", num_tokens: int = 50) -> SentencePiece:
    found = learned(base(style), num_tokens)
    assert len(found.tokens) == num_tokens
    return base(style).grown(found)
