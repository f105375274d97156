"""The SentencePiece model beside tokenizer.json: transformers does not write it, and some programs read nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def copy_model(tokenizer: Any, folder: Path) -> Path | None:
    """Copy the model of the folder that `tokenizer` was read from, as it is; null where there is none, or where it numbers
    its pieces otherwise than this tokenizer. Special tokens that a conversion added lie above its pieces."""
    from sentencepiece import SentencePieceProcessor

    name = getattr(tokenizer, "name_or_path", None)
    if not name or not (source := Path(name)).is_dir():
        return None
    vocabulary = tokenizer.get_vocab()
    for path in sorted(source.glob("*.model"), key=lambda path: (path.name != "tokenizer.model", path.name)):
        stored = path.read_bytes()
        try:
            model = SentencePieceProcessor(model_proto=stored)
        except RuntimeError:  # a tiktoken file
            continue
        if stored and all(vocabulary.get(model.id_to_piece(i)) == i for i in range(model.get_piece_size())):
            (folder / path.name).write_bytes(stored)
            return folder / path.name
    return None
