"""A SentencePiece model trained from scratch on the counted words of the new texts, by the sentencepiece library."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from typing import Any

from adapt.errors import Problem, UserError
from adapt.tokenization.sentencepiece_model import SentencePiece, processor
from adapt.tokenization.sentencepiece_rules import SPACE

WORD_BYTES = 4096
"""Longer words, which are no words, are left out."""
FLAGS = (
    "max_sentencepiece_length",
    "split_by_unicode_script",
    "split_by_number",
    "split_by_whitespace",
    "split_digits",
    "treat_whitespace_as_suffix",
)
"""Of the trainer: what it lets into one piece."""


def trained(words: Mapping[str, int], kind: str, vocab_size: int, **options: Any) -> list[tuple[str, float]]:
    """(piece, score) of a new model's ordinary pieces, in its own order: the first are the first merges of a BPE, or the
    most probable of a Unigram. `words` are normalised already. The same words in any order give the same model."""
    from sentencepiece import SentencePieceTrainer

    counts: Counter[str] = Counter()
    for word, times in words.items():
        if (bare := _one_space(word)) and len(bare.encode()) <= WORD_BYTES:
            counts[bare] += times
    written = io.BytesIO()
    how = {"character_coverage": 1.0, "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2} | options
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter([f"{word}\t{times}" for word, times in sorted(counts.items())]),
            input_format="tsv",
            model_writer=written,
            model_type=kind,
            vocab_size=vocab_size,
            max_sentence_length=2 * WORD_BYTES,
            normalization_rule_name="identity",  # the words went through the base's own
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            **how,
        )
    except RuntimeError as error:
        why = " ".join(str(error).split())[-200:]
        what = f"sentencepiece cannot train a {kind} model of {vocab_size:,d} pieces on these texts ({why})"
        raise UserError(Problem("method.fresh_tokens", f"{what}; say how many it shall have")) from None
    model = processor(written.getvalue())
    return [
        (model.id_to_piece(i), model.get_score(i))
        for i in range(model.get_piece_size())
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    ]


def flags(base: SentencePiece) -> dict[str, Any]:
    """The base's own limits on a piece."""
    return {name: getattr(base.proto.trainer_spec, name) for name in FLAGS}


def _one_space(word: str) -> str:
    """A run of white space before (or after) a word is one."""
    inner = word.strip(SPACE)
    return f"{SPACE * word.startswith(SPACE)}{inner}{SPACE * word.endswith(SPACE)}" if inner else ""
