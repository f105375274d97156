"""Texts -> how often each word occurs, in the tokenizer's own sense: normalised and pre-tokenised by itself.

Words are counted by worker processes; what they send back is one table per batch, so memory holds the distinct words and
not the texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Literal

from adapt.components import CleanerChoice
from adapt.data.documents import BadRecord, Document, Source
from adapt.data.workers import Workers
from adapt.errors import UserError
from adapt.tokenization.byte_bpe import added_pattern

BATCH = 2**18
"""Characters that a worker is given at a time."""


class WordWork:
    """Pickled for workers: cleans documents and counts their words."""

    def __init__(self, tokenizer_json: str, added: Iterable[str], cleaners: tuple[CleanerChoice, ...] = ()):
        self.tokenizer_json, self.added, self.cleaners = tokenizer_json, tuple(added), cleaners

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("tokenizer_json", "added", "cleaners")}

    @cached_property
    def _tokenizer(self):
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer_json)

    @cached_property
    def steps(self) -> list[Any]:
        return [choice.build() for choice in self.cleaners]

    @cached_property
    def _added(self):
        return added_pattern(self.added)

    def clean(self, documents: list[Document], first: int, last: int) -> list[Document]:
        """What is left of them after the cleaning steps `first` to `last` (not included)."""
        kept = []
        for document in documents:
            for step in self.steps[first:last]:
                document = step(document)
                if isinstance(document, str):
                    break
            else:
                kept.append(document)
        return kept

    def clean_and_count(self, documents: list[Document], first: int) -> tuple[Counter[str], int]:
        """(word -> occurrences, UTF-8 bytes of the text) of the documents, the steps from `first` on being done."""
        counts: Counter[str] = Counter()
        num_bytes = 0
        for document in self.clean(documents, first, len(self.steps)):
            for text in document.strings():
                text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no text
                num_bytes += len(text.encode())
                for part in self._added.split(text) if self._added else (text,):
                    counts.update(self._words(part))
        return counts, num_bytes

    def _words(self, text: str) -> Iterator[str]:
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        return (word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text))


def count_words(
    source: Source,
    work: WordWork,
    workers: int | Literal["auto"] = "auto",
    max_bytes: int | None = None,
    bad: list[BadRecord] | None = None,
) -> tuple[Counter[str], int]:
    """(word -> occurrences, UTF-8 bytes counted) of all documents of a source, after `work`'s cleaning steps.

    Steps that remember earlier documents run here, in the order of the source, and those before them in workers.
    `max_bytes`: stop after about that much, at the end of a batch. Records that cannot be read are put into `bad`."""
    bad = [] if bad is None else bad
    counts: Counter[str] = Counter()
    num_bytes = 0
    remember = [i for i, step in enumerate(work.steps) if getattr(step, "sequential", False)]
    first = remember[-1] + 1 if remember else 0
    with Workers(workers, work, key="workers", resumes=False) as pool:  # type: ignore[arg-type]
        batches = _batches(_documents(source, bad))
        if first:
            batches = _batches(_in_order(work, pool, batches, remember[0], first))
        for _, (table, size) in pool.map("clean_and_count", batches, lambda batch: (batch, first), _characters):
            counts.update(table)
            num_bytes += size
            if max_bytes is not None and num_bytes >= max_bytes:
                break
    if not counts:
        unread = f"; {len(bad):,d} records could not be read, the first: {bad[0].where}: {bad[0].what}" if bad else ""
        raise UserError(f"{source.where}: there is no text in it after cleaning{unread}")
    return counts, num_bytes


def read_texts(
    source: Source, work: WordWork, max_bytes: int | None = None, bad: list[BadRecord] | None = None
) -> Iterator[str]:
    """The texts of a source after `work`'s cleaning steps, up to about `max_bytes` of UTF-8. Records that cannot be read
    are put into `bad`."""
    num_bytes = 0
    for document in _documents(source, [] if bad is None else bad):
        for cleaned in work.clean([document], 0, len(work.steps)):
            for text in cleaned.strings():
                text = text.encode("utf-8", "replace").decode("utf-8")
                num_bytes += len(text.encode())
                yield text
        if max_bytes is not None and num_bytes >= max_bytes:
            return


def _in_order(work: WordWork, pool: Workers, batches, first: int, last: int) -> Iterator[Document]:
    for _, documents in pool.map("clean", batches, lambda batch: (batch, 0, first), _characters):
        yield from work.clean(documents, first, last)


def _documents(source: Source, bad: list[BadRecord]) -> Iterator[Document]:
    for item in source.documents():
        if isinstance(item, BadRecord):
            bad.append(item)
        else:
            yield item


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document.strings()))
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(batch: list[Document]) -> int:
    return sum(len(text) for document in batch for text in document.strings())
