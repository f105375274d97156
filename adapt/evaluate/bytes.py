"""How many bytes of text each token stands for: what makes losses comparable across tokenizers.

Byte-level BPE spells every byte as one printable character. SentencePiece-style vocabularies spell text as
itself, a space as `▁` and bytes outside the vocabulary as `<0xNN>`. Special tokens are no text: 0 bytes.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def byte_lengths(tokenizer: Any) -> Tensor:
    """[V] int64, indexed by token id."""
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
    length = _byte_level if _is_byte_level(tokenizer) else _sentencepiece
    table = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, index in vocabulary.items():
        if index in special:
            continue
        # Added tokens stand in the vocabulary as they are written, not spelled in byte characters.
        table[index] = len(token.encode()) if index in added else length(token)
    return table


def _byte_level(token: str) -> int:
    return len(token)


def _sentencepiece(token: str) -> int:
    return 1 if _BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())


def _is_byte_level(tokenizer: Any) -> bool:
    if not hasattr(tokenizer, "backend_tokenizer"):  # a bare sentencepiece model
        return False
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])
