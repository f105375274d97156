"""Where the blocks of a packed row begin. Legend: B rows, T clean tokens of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapt.data.batch import TARGET, Batch
from adapt.data.noise import generator

Phase = Literal["zero", "random", "response"]
PHASE, FINE = 1, 2
"""Last words of noise keys: draws for the phase and for the annealed mask, apart from those of the masks."""


@dataclass(frozen=True)
class Blocks:
    number: Tensor
    """[B, T] int64, growing along the row; tokens of one number (and document) are a block."""
    first: Tensor
    """[B, T] bool, the lowest position of each block."""

    @staticmethod
    def of(batch: Batch, size: int | None, phase: Phase, seed: int) -> Blocks:
        """Blocks of `size` tokens (None: a document is one block); they restart at each document, and the last one of
        a document is simply shorter.

        `zero` counts from the document's start. `random` shifts each document's grid by its own phase in [0, size), so
        that decoding may start at any offset. `response` starts a block wherever given and learned tokens meet, as
        decoding will at the end of a prompt; text without a prompt is as with `zero`.
        """
        position = batch.position_ids
        first = position == 0
        if size is not None:
            if phase == "random":
                counted = position + phases(batch, size, seed)
            elif phase == "response":
                counted = position - anchors(batch)
            else:
                counted = position
            first = first | (counted % size == 0)
        return Blocks(first.long().cumsum(1), first)


def anchors(batch: Batch) -> Tensor:
    """[B, T] position (in its document) of the last change between given and learned tokens at or before each."""
    learned = batch.role == TARGET
    change = batch.position_ids == 0
    change[:, 1:] |= learned[:, 1:] != learned[:, :-1]
    column = torch.arange(change.shape[1]).expand_as(change)
    last = torch.where(change, column, 0).cummax(1).values
    return batch.position_ids.gather(1, last)


def phases(batch: Batch, size: int, seed: int) -> Tensor:
    """[B, T] phase of each token's document: a function of (seed, source, epoch, sample, document of the row)."""
    documents = int(batch.doc_ids.max()) + 1
    drawn = [torch.from_numpy(generator(seed, *key, PHASE).integers(0, size, documents)) for key in noise_keys(batch)]
    return torch.stack(drawn).gather(1, batch.doc_ids)


def noise_keys(batch: Batch) -> list[tuple[int, int, int]]:
    """(source, epoch, sample index) of each row."""
    return list(zip(batch.source.tolist(), batch.epoch.tolist(), batch.sample_index.tolist(), strict=True))
