"""The global sequence of training rows, and held-out rows in a fixed order. Position n is a function of n."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial

import numpy as np
import torch

from adapt.data.batch import PAD, Batch
from adapt.data.plan import Plan
from adapt.data.rows import Row, Rows, padding
from adapt.data.shards import TokenShards
from adapt.errors import Problem, UserError

EVAL_SEED = 0
"""Held-out documents are shuffled once and for all: the first rows are a sample of all of them. They are always whole
windows of isolated documents, each read once: what is measured does not depend on how training rows are made."""


class TrainStream:
    def __init__(self, rows: list[Rows], plan: Plan):
        """Rows of each source, and the plan in whose order they are read."""
        if len({r.unit for r in rows}) > 1:
            pairs = ", ".join(r.shards.label for r in rows if r.unit == 2)
            raise UserError(f"data.train mixes preference pairs ({pairs}) with other data; train on them apart")
        self.rows, self.plan = rows, plan
        self.unit = rows[0].unit
        """Consecutive positions that belong together (2 for preference pairs)."""

    @property
    def fingerprint(self) -> str:
        """Of everything that decides which tokens stand at which position."""
        facts = [self.plan.facts(), [r.fingerprint for r in self.rows]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def locate(self, position: int) -> tuple[int, int, int]:
        """(source, epoch, row) at a position."""
        return self._locate(position)[:3]

    def _locate(self, position: int) -> tuple[int, int, int, float]:
        unit, member = divmod(position, self.unit)
        try:
            source, earlier, factor = self.plan.locate(unit)
        except IndexError:
            raise UserError(
                f"the training data ends at row {position:,d}: what is left may not be read again "
                "(data.train[i].max_epochs). Rewinds leave data out; go on with --resume, which plans what is left"
            ) from None
        return source, *self.rows[source].shuffled(earlier * self.unit + member), factor

    def batch(self, positions: Iterable[int]) -> Batch:
        rows = []
        for source, epoch, index, factor in map(self._locate, positions):
            row = self.rows[source][index]
            row["loss_weight"] *= np.float32(factor)
            rows.append((row, source, epoch, index))
        return collate(rows)

    def step_batch(
        self, step: int, rows_per_step: int, rank: int = 0, world: int = 1, stride: int | None = None
    ) -> Batch:
        """This rank's rows of an optimizer step.

        Step s is positions [s R, (s + 1) R) on any world size, dealt out `stride` rows at a time (1, or 2 for pairs):
        rank r of W takes rows r, r + W, ...
        """
        stride = stride or self.unit
        if rows_per_step <= 0 or rows_per_step % (world * stride):
            pairs = ", each with whole pairs" if stride > 1 else ""
            what = f"{rows_per_step} rows a step cannot be dealt out to {world} rank(s){pairs}"
            raise UserError(Problem("trainer.batch_tokens", f"{what}; give a multiple of {world * stride} rows"))
        first = step * rows_per_step
        return self.batch(first + deal(place, rank, world, stride) for place in range(rows_per_step // world))


def eval_batches(
    shards: TokenShards,
    seq_len: int,
    rows_per_batch: int,
    limit: int | None,
    rank: int = 0,
    world: int = 1,
    source: int = 0,
    *,
    row_bytes: int | None = None,
    byte_lengths: np.ndarray | None = None,
    row_tokens: int | None = None,
    joined: bool = False,
) -> Iterator[Batch]:
    """The first `limit` rows of a held-out set, dealt out to the ranks. Every rank gets the same number of batches of
    the same size, filled up with rows of padding (`sample_index` -1), so that collectives in the model meet.
    `row_bytes`, `byte_lengths`: see Rows; batches are then as long as their longest row. `row_tokens`: rows of so many
    tokens instead of `seq_len`; `joined`: documents of a row are one text."""
    rows = Rows(
        shards,
        row_tokens or seq_len,
        EVAL_SEED,
        cross_document_attention=joined,
        row_bytes=row_bytes,
        byte_lengths=byte_lengths,
    )
    count = num_eval_rows(rows, limit)
    per_rank = -(-count // (world * rows.unit)) * rows.unit
    for start in range(0, per_rank, rows_per_batch):
        batch = []
        for place in range(start, min(start + rows_per_batch, per_rank)):
            index = deal(place, rank, world, rows.unit)
            if index < count:
                batch.append((rows[index], source, 0, index))
            else:
                batch.append((padding(rows.seq_len, shards.pad_id), source, 0, -1))
        yield collate(batch) if row_bytes is None else _trimmed(collate(batch))


EVAL_ROWS = 4
"""Rows of a batch in evaluations: whole preference pairs."""
Passes = dict[str, Callable[..., Iterator[Batch]]]


def eval_passes(
    sets: Mapping[str, TokenShards], seq_len: int, limit: int | None, rank: int = 0, world: int = 1
) -> tuple[Passes, Passes]:
    """By label, what goes over the held-out sets of text, and those of preference pairs."""
    text, pairs = (
        {
            label: partial(eval_batches, shards, seq_len, EVAL_ROWS, limit, rank, world)
            for label, shards in sets.items()
            if shards.has_pairs == has_pairs
        }
        for has_pairs in (False, True)
    )
    return text, pairs


def _trimmed(batch: Batch) -> Batch:
    """Without the columns at the end that hold nothing in any row (one is left where none holds anything)."""
    used = int((batch.role != PAD).any(dim=0).sum()) or 1
    shorter = {f.name: value[:, :used] for f in fields(Batch) if (value := getattr(batch, f.name)).ndim == 2}
    return replace(batch, **shorter)


def num_eval_rows(rows: Rows, limit: int | None) -> int:
    count = len(rows) if limit is None else min(limit, len(rows))
    return max(rows.unit, count - count % rows.unit)


def deal(place: int, rank: int, world: int, unit: int) -> int:
    """The `place`-th row of a rank when rows are dealt out to the ranks, `unit` at a time."""
    turn, member = divmod(place, unit)
    return (turn * world + rank) * unit + member


def collate(rows: list[tuple[Row, int, int, int]]) -> Batch:
    """(row, source, epoch, sample index) of each row -> Batch."""
    row, source, epoch, sample = zip(*rows, strict=True)
    stacked = {name: torch.from_numpy(np.stack([r[name] for r in row])) for name in row[0]}
    return Batch(
        **stacked,
        source=torch.tensor(source, dtype=torch.int64),
        epoch=torch.tensor(epoch, dtype=torch.int64),
        sample_index=torch.tensor(sample, dtype=torch.int64),
    )
