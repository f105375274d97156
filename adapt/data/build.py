"""Build one set of token shards: read, clean, compare, tokenise, write; everything counted.

The order is that of the source throughout, so the shards are the same bytes for any number of workers and after any
interruption. Work on single documents is done by `Workers`; what remembers earlier documents (sequential cleaning
steps, deduplication, writing) is done here.
"""

from __future__ import annotations

import logging
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adapt.components import CleanerChoice
from adapt.data.batches import Batch, batches
from adapt.data.counts import Counts, Tally
from adapt.data.dedup import Deduplicator
from adapt.data.documents import BadRecord, Document, Source
from adapt.data.encode import Encoded, Encoder
from adapt.data.growing import Damaged
from adapt.data.held_out import HeldOut
from adapt.data.journal import Journal
from adapt.data.shards import ShardWriter
from adapt.data.work import CONTAMINATED, Cleaned, Work, apply
from adapt.data.workers import Workers
from adapt.errors import UserError

log = logging.getLogger("adapt.data")


@dataclass(frozen=True, kw_only=True)
class Options:
    clean: tuple[CleanerChoice, ...] = ()
    exact_dedup: bool = True
    near_dedup: float | None = None
    decontaminate: int | None = None
    is_held_out: bool = False
    """A held-out set: its n-grams are kept, for training data to be compared with."""
    document_weight: str | None = None
    max_tokens: int | None = None
    max_bad_lines: float = 0.001
    workers: int | Literal["auto"] = 1

    def key(self) -> list[Any]:
        """What the shards depend on: not the tolerance, which is checked again whenever they are opened."""
        from adapt.config.decode import encode

        return [
            encode(self.clean),
            self.exact_dedup,
            self.near_dedup,
            self.decontaminate,
            self.is_held_out,
            self.document_weight,
            self.max_tokens,
        ]


def build(
    source: Source,
    encoder: Encoder,
    options: Options,
    against: Iterable[HeldOut],
    folder: Path,
    facts: dict[str, Any],
    progress: bool,
) -> dict[str, Any]:
    """Write the shards into `folder`, or go on where an interrupted run left it. Stops early, with counts up to there,
    at `max_tokens`."""
    task = _Preparation(source, encoder, options, tuple(against), folder, facts["config_fingerprint"])
    with Workers(options.workers, task.work) as workers, _bar(facts["label"], progress) as show:
        try:
            for batch, (results, weights) in () if task.is_full else task.tokenised(workers):
                task.write(batch, results, weights)
                show(task.counts.documents, task.writer.num_tokens, task.counts.steps[-1].bytes_in)
                if task.is_full:
                    break
        finally:
            task.writer.close()
    return task.finish(facts)


class _Preparation:
    """The state of one: what remembers, what is written, what is counted."""

    def __init__(
        self, source: Source, encoder: Encoder, options: Options, against: tuple[HeldOut, ...], folder: Path, key: str
    ):
        self.source, self.encoder, self.options = source, encoder, options
        grams = tuple((h.label, h.ngrams) for h in against if h.ngrams is not None)
        self.work = Work(
            cleaners=options.clean,
            near=options.near_dedup is not None,
            n=options.decontaminate if grams or options.is_held_out else None,
            own_grams=options.is_held_out,
            held_out=grams,
            weight=options.document_weight,
            encoder=encoder,
        )
        self.dedup = Deduplicator(options.exact_dedup, options.near_dedup)
        for held_out in against:
            if held_out.hashes is not None:
                self.dedup.hold_out(held_out.label, held_out.hashes, held_out.signatures)
        self.sequential = [i for i in range(len(options.clean)) if getattr(self.work.step(i), "sequential", False)]
        names = [
            "read",
            *(c.name for c in options.clean),
            *([CONTAMINATED] if grams else []),
            "deduplicate",
            "tokenise",
        ]
        last_changing = len(options.clean)
        steps = [Tally(name, changes=0 < i <= last_changing) for i, name in enumerate(names)]
        self.counts = Counts(steps)
        self.journal = Journal(folder, key)
        self.read = 0
        """Records of the source that were dealt with."""
        self.written: dict[str, int] = {}
        """How much of what each step remembers is in the columns."""
        self.writer = self._writer(folder)

    def _writer(self, folder: Path) -> ShardWriter:
        """A new one; or that of an interrupted run, and everything else as it was then."""
        state = self.journal.read()
        if state is not None:
            try:
                writer = ShardWriter(folder, self.encoder.dtype, state=state["writer"])
            except (Damaged, KeyError, TypeError) as error:
                log.warning("%s: an interrupted preparation left it damaged (%s); starting afresh", folder, error)
            else:
                self._restore(writer, state)
                return writer
        for file in folder.iterdir():
            file.unlink()
        return ShardWriter(folder, self.encoder.dtype)

    def _restore(self, writer: ShardWriter, state: dict[str, Any]) -> None:
        self.read, self.written = state["read"], state["written"]
        self.counts.restore(state["counts"])
        hashes = writer.column("hashes")
        if hashes is not None:
            self.dedup.restore(hashes, writer.column("signatures"))
        for place in self.sequential:
            memory = writer.column(_memory(place))
            if memory is not None:
                self.work.step(place).restore(array("Q", memory.tobytes()))
        log.info("%s: going on after %s records of an interrupted preparation", self.source.where, f"{self.read:,d}")

    def tokenised(self, workers: Workers) -> Iterator[tuple[Batch, Any]]:
        """Every batch with the ids of what is left of it."""
        flow: Iterator[Batch] = batches(self.source, self.read)
        ends = [*self.sequential, len(self.options.clean)]
        first = 0
        for place in ends:
            is_last = place == len(self.options.clean)
            if is_last or place > first or first == 0:
                flow = self._cleaned(flow, workers, first, place, is_last)
            if not is_last:
                flow = self._in_sequence(flow, place)
            first = place + 1
        return workers.map("tokenise", self._deduplicated(flow), lambda b: (b.documents,), lambda b: b.characters)

    def _cleaned(self, flow: Iterable[Batch], workers: Workers, first: int, last: int, finish: bool) -> Iterator[Batch]:
        def arguments(batch: Batch) -> tuple:
            return batch.documents, batch.sizes, first, last, finish

        done: Cleaned
        for batch, done in workers.map("clean", flow, arguments, lambda b: b.characters):
            batch.absorb(done)
            yield batch

    def _in_sequence(self, flow: Iterable[Batch], place: int) -> Iterator[Batch]:
        step = self.work.step(place)
        for batch in flow:
            tally = Tally(self.options.clean[place].name, changes=True)
            results = [apply(step, d, s, tally) for d, s in zip(batch.documents, batch.sizes, strict=True)]
            left = [r for r in results if r is not None]
            batch.documents, batch.sizes = [d for d, _ in left], [s for _, s in left]
            batch.tallies.append(tally)
            batch.marks[_memory(place)] = len(step.memory)
            yield batch

    def _deduplicated(self, flow: Iterable[Batch]) -> Iterator[Batch]:
        for batch in flow:
            tally = Tally("deduplicate")
            signatures = batch.keys.signatures or [None] * len(batch.documents)
            left = []
            for i, (key, signature) in enumerate(zip(batch.keys.hashes, signatures, strict=True)):
                tally.enter(batch.sizes[i])
                reason = self.dedup.reason(key, signature)
                if reason is None:
                    left.append(i)
                    tally.leave(batch.sizes[i])
                else:
                    tally.dropped[reason] += 1
            batch.keep(left)
            batch.keys.grams = [batch.keys.grams[i] for i in left] if batch.keys.grams else []
            batch.tallies.append(tally)
            batch.marks["hashes"] = len(self.dedup.hashes)
            yield batch

    def write(self, batch: Batch, results: list[list[Encoded] | BadRecord], weights: list[float] | None) -> None:
        """Append what is left of a batch, and its counts."""
        tally = Tally("tokenise")
        if batch.bad:
            batch.tallies[0].num_in += len(batch.bad)
            batch.tallies[0].dropped["malformed"] += len(batch.bad)
        for i, (document, result, size) in enumerate(zip(batch.documents, results, batch.sizes, strict=True)):
            tally.enter(size)
            reason = self._refused(document, result)
            if isinstance(result, BadRecord):
                batch.bad.append(result)
            if reason is not None:
                tally.dropped[reason] += 1
                continue
            self._add(result, None if weights is None else weights[i])
            if batch.keys.grams:
                self.writer.append("ngrams", batch.keys.grams[i])
            self.counts.keep(document, size[1])
            tally.leave(size)
        for into, more in zip(self.counts.steps, [*batch.tallies, tally], strict=True):
            into.add(more)
        self.counts.add_bad(batch.bad)
        self.read = batch.read
        self._remember(batch.marks)
        if self.journal.is_due:
            self.commit()

    @property
    def is_full(self) -> bool:
        """Whether there are enough tokens: of an interrupted run, from the start."""
        limit = self.options.max_tokens
        return limit is not None and self.writer.num_tokens >= limit

    def _refused(self, document: Document, result: list[Encoded] | BadRecord) -> str | None:
        if self.is_full:
            return "beyond max_tokens"
        if isinstance(result, BadRecord):
            return "malformed"
        if not all(len(encoded.tokens) for encoded in result):
            return "no token"
        forms = self.counts.forms
        forms.add(len(result) == 2)
        if len(forms) == 2:
            raise UserError(
                f"{document.id}: preference pairs and other records are mixed in one dataset; give each its own entry"
            )
        return None

    def _add(self, sequences: list[Encoded], weight: float | None) -> None:
        for encoded in sequences:
            self.writer.add(encoded)
            if weight is not None:
                self.writer.append("weights", np.array([weight], np.float32))

    def _remember(self, marks: dict[str, int]) -> None:
        """What the sequential steps learned from the batches written so far goes into columns."""
        for name, stop in marks.items():
            start = self.written.get(name, 0)
            if name == "hashes":
                hashes, signatures = self.dedup.kept(start, stop)
                self.writer.append("hashes", hashes)
                if signatures is not None:
                    self.writer.append("signatures", signatures)
            else:
                step = self.work.step(int(name.rpartition("-")[2]))
                self.writer.append(name, np.array(step.memory[start:stop], np.uint64))
            self.written[name] = stop

    def commit(self) -> None:
        self.journal.write(
            {"writer": self.writer.commit(), "read": self.read, "written": self.written, "counts": self.counts.state()}
        )

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        writer, counts = self.writer, self.counts
        manifest = {
            **facts,
            "where": self.source.where,
            "licence": self.source.licence,
            **counts.manifest(),
            "bytes": writer.num_bytes,
            "tokens": writer.num_tokens,
            "target_tokens": writer.num_targets,
            "pad_id": self.encoder.pad_id,
            "bos_id": self.encoder.tokenizer.bos_token_id,
            "pairs": True in counts.forms,
        }
        check_bad_lines(manifest, self.options.max_bad_lines)
        if not writer.num_tokens:
            raise UserError(_nothing(self.source, counts))
        arrays = {}
        if self.options.is_held_out and self.options.decontaminate is not None:
            grams = writer.column("ngrams")
            arrays["ngrams"] = np.unique(np.empty(0, np.uint64) if grams is None else grams)
        if self.options.document_weight is not None and not writer.column("weights").any():
            raise UserError(
                f"{self.source.where}: document_weight {self.options.document_weight!r} gives every document 0"
            )
        for place in self.sequential:
            writer.forget(_memory(place))
        manifest = writer.finish(manifest, arrays)
        self.journal.remove()
        return manifest


def _memory(place: int) -> str:
    """Name of the column with what the cleaning step at `place` remembers."""
    return f"memory-{place}"


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


def _nothing(source: Source, counts: Counts) -> str:
    told = ", ".join(f"{n:,d} {reason}" for tally in counts.steps for reason, n in tally.dropped.items() if n)
    return f"{source.where}: there is no document in it" + (
        f" to use: {counts.steps[0].num_in:,d} read, of them {told}" if told else ""
    )


@contextmanager
def _bar(label: str, progress: bool):
    """Calls with (documents, tokens, bytes) move a line on the terminal; nothing is shown where there is none."""
    if not (progress and sys.stderr.isatty()):
        yield lambda documents, tokens, num_bytes: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{label}: reading")
        started, before = time.monotonic(), None

        def show(documents: int, tokens: int, num_bytes: int) -> None:
            nonlocal before
            before = num_bytes if before is None else before  # what an interrupted run had done was not done now
            speed = (num_bytes - before) / 1e6 / max(1e-9, time.monotonic() - started)
            text = f"{label}: {documents:,d} documents, {tokens:,d} tokens, {speed:.1f} MB/s"
            bar.update(task, description=text)

        yield show
