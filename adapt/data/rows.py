"""Token shards -> packed rows of fixed length, any of them at once. Legend: T tokens per row.

Plain text and conversations (`windows`): documents in a seed-shuffled order end to end, cut every T tokens; a row costs
O(log documents). Preference pairs: a sequence per row, chosen and rejected next to each other.
"""

from __future__ import annotations

import numpy as np

from adapt.data.batch import PAD, TARGET
from adapt.data.permute import Permutation, shuffled
from adapt.data.shards import TokenShards
from adapt.errors import UserError

Row = dict[str, np.ndarray]
"""input_ids, labels, doc_ids, position_ids [T] int64; role [T] int8; loss_weight [T] float32; pair_index scalar."""


class Rows:
    def __init__(self, shards: TokenShards, seq_len: int, seed: int):
        self.shards, self.seq_len, self.seed = shards, seq_len, seed
        offsets = np.asarray(shards.document_offsets)
        self.unit = 2 if shards.has_pairs else 1
        """Rows that only make sense together."""
        self.num_too_long = 0
        """Pairs left out because one of their sequences is longer than a row."""
        if shards.has_pairs:
            fits = (np.diff(offsets) <= seq_len).reshape(-1, 2).all(axis=1)
            self.num_too_long = int((~fits).sum())
            pairs = np.flatnonzero(fits)
            self._order = (2 * pairs[:, None] + np.arange(2)).ravel()
            if not len(pairs):
                raise UserError(f"{shards.label}: no preference pair fits into data.seq_len={seq_len:,d} tokens")
        else:
            self._order = shuffled(shards.num_documents, seed)
        self._first = offsets[:-1][self._order]
        """Offset in the shards of the k-th document of the order."""
        self._ends = np.cumsum(offsets[1:][self._order] - self._first)
        """Where that document ends when the order is laid out end to end."""

    def __len__(self) -> int:
        return len(self._order) if self.unit == 2 else -(-int(self._ends[-1]) // self.seq_len)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        segments = self._segments(index)
        row = padding(self.seq_len, self.shards.pad_id)
        at = 0
        for number, (_, start, stop) in enumerate(segments):
            size = stop - start
            here = slice(at, at + size)
            role = self.shards.roles(start, stop)
            row["input_ids"][here] = self.shards.tokens(start, stop)
            row["labels"][here] = np.where(role == TARGET, row["input_ids"][here], -100)
            row["labels"][at] = -100  # nothing before it in this row predicts it
            row["doc_ids"][here] = number
            row["position_ids"][here] = np.arange(size)
            row["role"][here] = role
            row["loss_weight"][here] = 1.0
            at += size
        row["doc_ids"][at:] = len(segments)
        row["position_ids"][at:] = np.arange(self.seq_len - at)
        if self.unit == 2:
            row["pair_index"] = self._order[index] // 2
        return row

    def shuffled(self, position: int) -> tuple[int, int]:
        """(epoch, row) of the `position`-th row of an endless reading, each epoch in an order of its own."""
        unit, member = divmod(position, self.unit)
        epoch, index = divmod(unit, len(self) // self.unit)
        return epoch, self._permutation(epoch)[index] * self.unit + member

    def _segments(self, index: int) -> list[tuple[int, int, int]]:
        """(document, start, stop) of the pieces of documents in a row, as offsets in the shards."""
        if self.unit == 2:
            begin = int(self._ends[index - 1]) if index else 0
            end = int(self._ends[index])
        else:
            begin = index * self.seq_len
            end = min(begin + self.seq_len, int(self._ends[-1]))
        segments = []
        k = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            document_end = int(self._ends[k])
            document_start = int(self._ends[k - 1]) if k else 0
            stop = min(end, document_end)
            shift = int(self._first[k]) - document_start
            segments.append((int(self._order[k]), begin + shift, stop + shift))
            begin, k = stop, k + 1
        return segments

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(len(self) // self.unit, self.seed, epoch)


def padding(seq_len: int, pad_id: int) -> Row:
    """A row with nothing in it."""
    return {
        "input_ids": np.full(seq_len, pad_id, np.int64),
        "labels": np.full(seq_len, -100, np.int64),
        "doc_ids": np.zeros(seq_len, np.int64),
        "position_ids": np.arange(seq_len, dtype=np.int64),
        "role": np.full(seq_len, PAD, np.int8),
        "loss_weight": np.zeros(seq_len, np.float32),
        "pair_index": np.int64(-1),
    }
