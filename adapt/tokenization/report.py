"""Several tokenizers on several texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapt.components import SourceChoice
from adapt.config.decode import decode
from adapt.data.documents import BadRecord
from adapt.errors import Problem, UserError
from adapt.pretrained.bases import parse
from adapt.tokenization.metrics import Fit, fit
from adapt.tokenization.words import WordWork, read_texts


def compare(names: Sequence[str], files: Sequence[str]) -> tuple[dict[str, Any], list[tuple[str, str, Fit]]]:
    """The tokenizers (`tokenizers.Tokenizer`) by name, and (tokenizer, text, fit) of each on each text.

    Raises UserError with every tokenizer that cannot be loaded and every text that cannot be read."""
    problems: list[Problem] = []
    tokenizers: dict[str, Any] = {}
    for name in names:
        try:
            tokenizers[name] = _load(name)
        except UserError as error:
            problems += [Problem(name, p.what) for p in error.problems]
    texts: dict[str, list[str]] = {}
    for file in files:
        try:
            source = decode({"name": "path", "path": file}, SourceChoice).build()
            bad: list[BadRecord] = []
            texts[file] = list(read_texts(source, WordWork("", ()), bad=bad))
            if bad:
                raise UserError(f"{bad[0].where}: {bad[0].what} ({len(bad):,d} such records)")
            if not any(text.split() for text in texts[file]):
                raise UserError("there is no text in it")
        except UserError as error:
            problems += [Problem(f"--text {file}", p.what) for p in error.problems]
    if problems:
        raise UserError(problems)
    return tokenizers, [(name, file, fit(t, found)) for file, found in texts.items() for name, t in tokenizers.items()]


def _load(name: str) -> Any:
    from adapt.pretrained.load import read_tokenizer, tokenizer_folder

    tokenizer = read_tokenizer(tokenizer_folder(parse(name, name)), name)
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} has no fast form; nothing else is measured here")
    return tokenizer.backend_tokenizer
