"""What the ids of a vocabulary are: text, special, or nothing a text ever contains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Vocabulary:
    special: np.ndarray
    """[n] int64, sorted: ids with a meaning of their own (BOS, EOS, PAD, chat markers, the mask token)."""
    ordinary: np.ndarray
    """[n] int64, sorted: ids that tokenised text contains. Neither special nor added nor reserved, with an embedding
    row, and reachable: a piece of a BPE vocabulary that no merge makes is in no text, and its embedding never trained."""

    @staticmethod
    def of(tokenizer: Any, config: Any) -> Vocabulary:
        """Of a transformers tokenizer and the config of the model it belongs to."""
        from adapt.conversion.mask_token import MASK_NAMES, RESERVED, special_ids

        pieces, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
        named = {getattr(owner, "mask_token_id", None) for owner in (tokenizer, config)} - {None}
        special = {*tokenizer.all_special_ids, *special_ids(config, tokenizer), *named}
        special |= {i for i, token in added.items() if token.special}
        reserved = {i for piece, i in pieces.items() if piece in MASK_NAMES or RESERVED.match(piece)}
        text = {pieces[p] for p in _reachable(tokenizer, pieces)} - special - set(added) - reserved
        return Vocabulary(_sorted(special), _sorted(i for i in text if i < config.vocab_size))


def _reachable(tokenizer: Any, pieces: dict[str, int]) -> set[str]:
    """Pieces that tokenising some text can give. Of BPE: its letters and what its merges make; of other models: all."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    if model.get("type") != "BPE" or model.get("ignore_merges"):
        return set(pieces)
    made = {"".join(m if isinstance(m, list) else m.split(" ")) for m in model["merges"]}
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if prefix or suffix:  # affixes are part of a piece, not of its letters
        return set(pieces)
    byte = {f"<0x{b:02X}>" for b in range(256)} if model.get("byte_fallback") else set()
    return {p for p in pieces if len(p) == 1 or p in made or p in byte}


def _sorted(ids: Any) -> np.ndarray:
    return np.array(sorted(ids), dtype=np.int64)
