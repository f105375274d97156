"""A declared corpus (`adapt.data.corpora`): the documents of all its sources that fall into one part of its split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from adapt.components import CleanerChoice, sources
from adapt.config.decode import encode
from adapt.data.corpora import CorpusPart, load_corpus
from adapt.data.documents import BadRecord, Document, Source
from adapt.data.splits import place, share
from adapt.errors import Problem, UserError, nearest

VERSION = 1
"""Part of the fingerprint: raise it when other documents are chosen."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    id: str
    """Name of a shipped corpus (see adapt/corpora), or the path of a .yaml file like those."""
    split: Literal["train", "val", "test", "all"] = "train"
    """Which part; they share no text. `all` is the three together."""
    only: tuple[str, ...] | None = None
    """Names of those of its sources that are read; null: all."""


class CorpusSource:
    def __init__(self, config: CorpusConfig):
        self.config = config
        corpus, opened = load_corpus(config.id)
        self._split = corpus.split
        labels = [part.name or source.label for part, source in opened]
        unknown = [name for name in config.only or () if name not in labels]
        if unknown:
            raise UserError(
                f"only: the corpus has no source {unknown[0]!r}.{nearest(unknown[0], labels)} It has: {', '.join(labels)}"
            )
        self.parts_of_corpus: list[tuple[str, CorpusPart, Source]] = [
            (label, part, source)
            for label, (part, source) in zip(labels, opened, strict=True)
            if config.only is None or label in config.only
        ]
        self.clean: tuple[CleanerChoice, ...] = corpus.clean
        self.where = f"corpus {config.id}"
        name = Path(config.id).stem
        self.label = name if config.split == "all" else f"{name}-{config.split}"
        self.licence = "; ".join(f"{label}: {part.licence}" for label, part, _ in self.parts_of_corpus)

    @property
    def remote(self) -> bool:
        return any(getattr(source, "remote", False) for _, _, source in self.parts_of_corpus)

    def use_cache(self, folder: Path) -> None:
        for _, _, source in self.parts_of_corpus:
            if hasattr(source, "use_cache"):
                source.use_cache(folder)

    def check(self) -> None:
        """What can be said about its sources without fetching them."""
        self._of_all(lambda source: getattr(source, "check", source.fingerprint)())

    def fetch(self) -> None:
        """Brings the packages of all its sources into the cache."""
        self._of_all(lambda source: source.fetch() if hasattr(source, "fetch") else None)

    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        prints = self._of_all(lambda source: source.fingerprint())
        parts = [
            (label, part.licence, part.fraction, part.max_documents, fingerprint)
            for (label, part, _), fingerprint in zip(self.parts_of_corpus, prints, strict=True)
        ]
        facts = [VERSION, self.config.split, encode(self._split), encode(self.clean), parts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _of_all(self, ask) -> list:
        """What each source answers; all problems at once."""
        answers, problems, kind = [], [], UserError
        for label, _, source in self.parts_of_corpus:
            try:
                answers.append(ask(source))
            except UserError as error:
                kind = type(error)
                problems += [Problem(p.where, f"{self.where}, {label}: {p.what}") for p in error.problems]
        if problems:
            raise kind(problems)
        return answers

    def documents(self) -> Iterator[Document | BadRecord]:
        """The source that has given the fewest characters so far gives next (ties: the first): whatever is cut off the
        end (`max_tokens`, an evaluation's `limit`), the beginning has a bit of everything."""
        streams = [self._documents(*part) for part in self.parts_of_corpus]
        given = dict.fromkeys(range(len(streams)), 0)
        while given:
            number = min(given, key=given.get)
            item = next(streams[number], None)
            if item is None:
                del given[number]
                continue
            given[number] += 0 if isinstance(item, BadRecord) else sum(map(len, item.strings()))
            yield item

    def _documents(self, label: str, part: CorpusPart, source: Source) -> Iterator[Document | BadRecord]:
        taken = 0
        for item in source.documents():
            if isinstance(item, BadRecord):
                yield item
                continue
            if part.fraction < 1 and share(item) >= part.fraction:
                continue
            if part.max_documents is not None and taken >= part.max_documents:
                break
            taken += 1
            which = self._split.part(place(item))
            if self.config.split in (which, "all"):
                facts = {"part": label, "licence": part.licence, "split": which}
                yield dataclasses.replace(item, meta=item.meta | facts)


@sources.register("corpus")
def corpus(config: CorpusConfig) -> CorpusSource:
    return CorpusSource(config)
