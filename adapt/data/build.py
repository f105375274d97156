"""Build one set of token shards: read, drop what was seen before, tokenise, write; everything counted."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.dedup import Deduplicator
from adapt.data.documents import BadRecord, Document, Source
from adapt.data.encode import Encoded, Encoder
from adapt.data.shards import ShardWriter, TokenShards
from adapt.errors import UserError

LISTED = 100
"""Bad records and parts that the manifest lists one by one."""
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 2**20


@dataclass(frozen=True)
class Options:
    exact_dedup: bool
    near_dedup: float | None
    max_tokens: int | None
    max_bad_lines: float

    def key(self) -> list[Any]:
        """What the shards depend on: not the tolerance, which is checked again whenever they are opened."""
        return [self.exact_dedup, self.near_dedup, self.max_tokens]


@dataclass
class Counts:
    read: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    num_bad: int = 0
    dropped: Counter = field(default_factory=Counter)
    empty: int = 0
    words: int = 0
    documents: int = 0
    licences: Counter = field(default_factory=Counter)
    parts: Counter = field(default_factory=Counter)

    def add_bad(self, record: BadRecord) -> None:
        self.num_bad += 1
        if len(self.bad) < LISTED:
            self.bad.append(record)

    def keep(self, document: Document) -> None:
        self.documents += 1
        self.words += sum(len(s.split()) for s in document.strings())
        self.licences[document.meta.get("licence")] += 1
        self.parts[document.meta.get("part")] += 1

    def steps(self) -> list[dict[str, Any]]:
        deduplicated = self.read - self.num_bad - self.dropped.total()
        return [
            {"step": "read", "in": self.read, "out": self.read - self.num_bad, "dropped": {"malformed": self.num_bad}},
            {"step": "deduplicate", "in": self.read - self.num_bad, "out": deduplicated, "dropped": dict(self.dropped)},
            {"step": "tokenise", "in": deduplicated, "out": self.documents,
             "dropped": {"no token": self.empty, "beyond max_tokens": deduplicated - self.documents - self.empty}},
        ]  # fmt: skip


def build(
    source: Source,
    encoder: Encoder,
    options: Options,
    against: Iterable[TokenShards],
    folder: Path,
    facts: dict[str, Any],
    progress: bool,
) -> dict[str, Any]:
    """Write the shards into `folder`. Stops early, with counts up to there, at `max_tokens`."""
    dedup = Deduplicator(options.exact_dedup, options.near_dedup)
    for held_out in against:
        dedup.hold_out(held_out.hashes(), held_out.signatures())
    counts = Counts()
    writer = ShardWriter(folder, encoder.dtype)
    forms: set[bool] = set()
    try:
        with _bar(facts["label"], progress) as show:
            for documents in _batches(source, dedup, counts):
                _write(documents, encoder, writer, counts, options.max_tokens, forms)
                show(counts.documents, writer.num_tokens)
                if options.max_tokens is not None and writer.num_tokens >= options.max_tokens:
                    break
    finally:
        writer.close()
    manifest = _manifest(facts, source, counts, writer) | {"pad_id": encoder.pad_id, "pairs": True in forms}
    check_bad_lines(manifest, options.max_bad_lines)
    if not writer.num_tokens:
        raise UserError(_nothing(source, counts))
    arrays = {"hashes": np.array(dedup.hashes, np.uint64)}
    if options.near_dedup is not None:
        arrays["signatures"] = dedup.own_signatures()
    return writer.finish(manifest, arrays)


def _batches(source: Source, dedup: Deduplicator, counts: Counts) -> Iterable[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for item in source.documents():
        counts.read += 1
        if isinstance(item, BadRecord):
            counts.add_bad(item)
            continue
        reason = dedup.reason(item)
        if reason is not None:
            counts.dropped[reason] += 1
            continue
        batch.append(item)
        characters += sum(map(len, item.strings()))
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write(
    documents: list[Document],
    encoder: Encoder,
    writer: ShardWriter,
    counts: Counts,
    max_tokens: int | None,
    forms: set[bool],
) -> None:
    for document, result in zip(documents, encoder.encode(documents), strict=True):
        if max_tokens is not None and writer.num_tokens >= max_tokens:
            return
        if isinstance(result, BadRecord):
            counts.add_bad(result)
            continue
        if not all(encoded.tokens for encoded in result):
            counts.empty += 1
            continue
        _same_form(document, result, forms)
        for encoded in result:
            writer.add(encoded)
        counts.keep(document)


def _same_form(document: Document, result: list[Encoded], forms: set[bool]) -> None:
    forms.add(len(result) == 2)
    if len(forms) == 2:
        raise UserError(
            f"{document.id}: preference pairs and other records are mixed in one dataset; give each its own entry"
        )


def check_bad_lines(manifest: dict[str, Any], tolerated: float) -> None:
    bad, read = manifest["bad_lines"], manifest["steps"][0]["in"]
    if bad["count"] <= tolerated * read:
        return
    listed = "\n".join(f"  {b['where']}: {b['what']}" for b in bad["listed"][:10])
    more = bad["count"] - min(10, len(bad["listed"]))
    raise UserError(
        f"{manifest['where']}: {bad['count']:,d} of {read:,d} records are malformed, more than the tolerated fraction "
        f"data.max_bad_lines={tolerated:g}:\n{listed}" + (f"\n  and {more:,d} more" if more > 0 else "")
    )


def _manifest(facts: dict[str, Any], source: Source, counts: Counts, writer: ShardWriter) -> dict[str, Any]:
    return {
        **facts,
        "where": source.where,
        "licence": source.licence,
        "licences": _top(counts.licences),
        "parts": _top(counts.parts),
        "steps": counts.steps(),
        "bad_lines": {
            "count": counts.num_bad,
            "listed": [{"where": b.where, "what": b.what} for b in counts.bad],
        },
        "bytes": sum(writer.bytes),
        "words": counts.words,
        "documents": counts.documents,
        "tokens": writer.num_tokens,
        "target_tokens": writer.num_targets,
    }


def _top(counter: Counter) -> dict[str, int]:
    named = Counter({str(k): v for k, v in counter.items() if k is not None})
    top = dict(named.most_common(LISTED))
    rest = named.total() - sum(top.values())
    return top | ({"(others)": rest} if rest else {})


def _nothing(source: Source, counts: Counts) -> str:
    why = {"malformed": counts.num_bad, "without a token": counts.empty, **counts.dropped}
    told = ", ".join(f"{n:,d} {reason}" for reason, n in why.items() if n)
    return f"{source.where}: there is no document in it" + (
        f" to use: {counts.read:,d} read, of them {told}" if told else ""
    )


@contextmanager
def _bar(label: str, progress: bool):
    """Calls with (documents, tokens) move a line on the terminal; nothing is shown where there is none."""
    if not (progress and sys.stderr.isatty()):
        yield lambda documents, tokens: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{label}: reading")

        def show(documents: int, tokens: int) -> None:
            bar.update(task, description=f"{label}: {documents:,d} documents, {tokens:,d} tokens")

        yield show
