"""A source's documents in batches, and what travels with each batch through preparation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from adapt.data.counts import Size, Tally
from adapt.data.documents import BadRecord, Document, Source
from adapt.data.work import Cleaned, Keys

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 2**20


@dataclass
class Batch:
    documents: list[Document] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    characters: int = 0
    read: int = 0
    """Records that the source had yielded up to the end of this batch."""
    sizes: list[Size] | None = None
    keys: Keys | None = None
    tallies: list[Tally] = field(default_factory=list)
    """Of the steps so far."""
    marks: dict[str, int] = field(default_factory=dict)
    """How much each step that remembers knew after this batch: what goes into the journal with it."""

    def absorb(self, done: Cleaned) -> None:
        """What a worker made of the documents."""
        self.documents = [done.changed.get(i) or self.documents[i] for i in done.kept]
        self.sizes, self.keys = done.sizes, done.keys
        self.tallies += done.tallies

    def keep(self, places: list[int]) -> None:
        """Only these documents are left."""
        self.documents = [self.documents[i] for i in places]
        self.sizes = [self.sizes[i] for i in places]


def batches(source: Source, skip: int = 0) -> Iterator[Batch]:
    """Batches of about a MB, after the first `skip` records. The cut depends on the records alone, so that a run that
    goes on makes the same batches as one that was never interrupted."""
    batch = Batch(read=skip)
    for item in itertools.islice(source.documents(), skip, None):
        batch.read += 1
        if isinstance(item, BadRecord):
            batch.bad.append(item)
        else:
            batch.documents.append(item)
            batch.characters += sum(map(len, item.strings()))
        if len(batch.documents) + len(batch.bad) >= BATCH_DOCUMENTS or batch.characters >= BATCH_CHARACTERS:
            yield batch
            batch = Batch(read=batch.read)
    if batch.documents or batch.bad:
        yield batch
