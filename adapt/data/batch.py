"""The batch every objective reads. Legend: B rows, T clean tokens per row."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from adapt.data.roles import CONTEXT, PAD, TARGET

__all__ = ["CONTEXT", "PAD", "TARGET", "Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    input_ids: Tensor
    """[B, T] int64, clean tokens."""
    labels: Tensor
    """[B, T] int64, aligned with `input_ids`: the token itself where it is supervised, else -100. The first token of a
    document is -100: nothing before it predicts it."""
    doc_ids: Tensor
    """[B, T] int64, number of the document within its row, from 0; padding has ids of its own. With
    `data.cross_document_attention` the documents of a row are one document, to every objective."""
    position_ids: Tensor
    """[B, T] int64, position in the document, from 0 in every row (a document cut at a row's end starts anew)."""
    role: Tensor
    """[B, T] int8, PAD, CONTEXT or TARGET."""
    loss_weight: Tensor
    """[B, T] float32, factor of each token's loss (objective weight of the source, weight of the document); 0 in
    padding. The number that a loss is divided by counts targets, whatever their factors."""
    sample_index: Tensor
    """[B] int64, row number within its dataset (before shuffling); with `epoch` and the seed it keys the noise."""
    epoch: Tensor
    """[B] int64, how often the dataset was gone through before this row."""
    source: Tensor
    """[B] int64, index into `data.train` (or `data.eval`)."""
    pair_index: Tensor
    """[B] int64, for preference data the pair a row belongs to (chosen first, rejected second); else -1."""

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    def rows(self, start: int, stop: int) -> Batch:
        return Batch(**{f.name: getattr(self, f.name)[start:stop] for f in fields(self)})

    @staticmethod
    def cat(batches: list[Batch]) -> Batch:
        return Batch(**{f.name: torch.cat([getattr(b, f.name) for b in batches]) for f in fields(Batch)})
