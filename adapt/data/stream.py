"""The global sequence of training rows, and held-out rows in a fixed order. Position n is a function of n."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from adapt.data.batch import Batch
from adapt.data.mixture import Mixture
from adapt.data.rows import Row, Rows, padding
from adapt.data.shards import TokenShards
from adapt.errors import Problem, UserError

EVAL_SEED = 0
"""Held-out documents are shuffled once and for all: the first rows are a sample of all of them."""


class TrainStream:
    def __init__(self, rows: list[Rows], weights: list[float], seed: int, offset: int = 0):
        """`weights` are fractions of tokens, relative to each other. `seed` has a place in the fingerprint; the rows
        were made with it. Step 0 begins at position `offset`."""
        if len({r.unit for r in rows}) > 1:
            pairs = ", ".join(r.shards.label for r in rows if r.unit == 2)
            raise UserError(f"data.train mixes preference pairs ({pairs}) with other data; train on them apart")
        self.rows, self.seed, self.offset = rows, seed, offset
        self.unit = rows[0].unit
        """Consecutive positions that belong together (2 for preference pairs)."""
        self.mixture = Mixture(weights)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides which tokens stand at which position."""
        facts = [
            self.seed,
            self.mixture.quotas,
            [(r.shards.fingerprint, r.seq_len, r.seed) for r in self.rows],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def locate(self, position: int) -> tuple[int, int, int]:
        """(source, epoch, row) at a position."""
        unit, member = divmod(position, self.unit)
        source, earlier = self.mixture[unit]
        return source, *self.rows[source].shuffled(earlier * self.unit + member)

    def batch(self, positions: Iterable[int]) -> Batch:
        places = [self.locate(n) for n in positions]
        return collate([(self.rows[source][row], source, epoch, row) for source, epoch, row in places])

    def step_batch(
        self, step: int, rows_per_step: int, rank: int = 0, world: int = 1, stride: int | None = None
    ) -> Batch:
        """This rank's rows of an optimizer step.

        Step s is positions [s R, (s + 1) R) from the offset on any world size, dealt out `stride` rows at a time (1, or 2 for pairs):
        rank r of W takes rows r, r + W, ...
        """
        stride = stride or self.unit
        if rows_per_step <= 0 or rows_per_step % (world * stride):
            pairs = ", each with whole pairs" if stride > 1 else ""
            what = f"{rows_per_step} rows a step cannot be dealt out to {world} rank(s){pairs}"
            raise UserError(Problem("trainer.batch_tokens", f"{what}; give a multiple of {world * stride} rows"))
        first = self.offset + step * rows_per_step
        return self.batch(first + deal(place, rank, world, stride) for place in range(rows_per_step // world))


def eval_batches(
    shards: TokenShards,
    seq_len: int,
    rows_per_batch: int,
    limit: int | None,
    rank: int = 0,
    world: int = 1,
    source: int = 0,
) -> Iterator[Batch]:
    """The first `limit` rows of a held-out set, dealt out to the ranks. Every rank gets the same number of batches of
    the same size, filled up with rows of padding (`sample_index` -1), so that collectives in the model meet."""
    rows = Rows(shards, seq_len, EVAL_SEED)
    count = num_eval_rows(rows, limit)
    per_rank = -(-count // (world * rows.unit)) * rows.unit
    for start in range(0, per_rank, rows_per_batch):
        batch = []
        for place in range(start, min(start + rows_per_batch, per_rank)):
            index = deal(place, rank, world, rows.unit)
            if index < count:
                batch.append((rows[index], source, 0, index))
            else:
                batch.append((padding(seq_len, shards.pad_id), source, 0, -1))
        yield collate(batch)


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
