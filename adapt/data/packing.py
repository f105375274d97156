"""Which pieces of documents share a row. Legend: T tokens per row.

`Windows`: documents end to end, cut every T tokens; only the last row has padding. `BestFit`: documents are cut only
where they are longer than T, and pieces are put together so that rows are nearly full (best-fit decreasing; Ding et
al. 2024, "Fewer Truncations Improve Language Modeling"). `Single`: a document per row. `ByteWindows`: like `Windows`, cut
every so many bytes of text instead.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

Segment = tuple[int, int, int]
"""(document, start, stop): a piece of a document, as offsets in the shards."""


class Packing(Protocol):
    def __len__(self) -> int:
        """Rows."""

    def segments(self, row: int) -> list[Segment]:
        """The pieces in a row, in their order."""


class Windows:
    def __init__(self, order: np.ndarray, offsets: np.ndarray, seq_len: int):
        """order: documents as they are laid out; one that occurs twice is read twice. offsets [documents + 1]."""
        self._order, self._seq_len = order, seq_len
        self._first = offsets[:-1][order]
        """Offset in the shards of the k-th document of the order."""
        self._ends = np.cumsum(offsets[1:][order] - self._first)
        """Where that document ends when the order is laid out end to end."""

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._seq_len)

    def segments(self, row: int) -> list[Segment]:
        begin = row * self._seq_len
        end = min(begin + self._seq_len, int(self._ends[-1]))
        found = []
        k = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            document_end = int(self._ends[k])
            document_start = int(self._ends[k - 1]) if k else 0
            stop = min(end, document_end)
            shift = int(self._first[k]) - document_start
            found.append((int(self._order[k]), begin + shift, stop + shift))
            begin, k = stop, k + 1
        return found


class ByteWindows:
    """Rows that hold the same text whatever the tokenizer: a token is in the row where its first byte is, so that two
    tokenizers differ by at most one token at each edge. Reads all tokens once."""

    def __init__(
        self, order: np.ndarray, offsets: np.ndarray, seq_len: int, *, token_bytes: np.ndarray, row_bytes: int
    ):
        """token_bytes [tokens] of text that each token of the shards stands for; `seq_len` limits nothing here."""
        start, stop = offsets[:-1][order], offsets[1:][order]
        before = np.cumsum(token_bytes) - token_bytes
        sizes = [token_bytes[a:b].sum() for a, b in zip(start, stop, strict=True)]
        found: list[list[Segment]] = []
        for document, a, b, at in zip(order, start, stop, np.cumsum(sizes) - sizes, strict=True):
            row = (before[a:b] - before[a : a + 1] + at) // row_bytes
            if a < b:  # a document's end stands for no text: it stays with the token before it
                row[-1] = row[-2] if b - a > 1 and not token_bytes[b - 1] else row[-1]
            for first, last in zip(*_runs(row), strict=True):
                found += [[] for _ in range(int(row[first]) + 1 - len(found))]
                found[int(row[first])].append((int(document), int(a + first), int(a + last)))
        self._rows = [row for row in found if row]
        self.longest = max((sum(b - a for _, a, b in row) for row in self._rows), default=0)
        """Tokens."""

    def __len__(self) -> int:
        return len(self._rows)

    def segments(self, row: int) -> list[Segment]:
        return self._rows[row]


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of equal values begin and end."""
    edges = np.flatnonzero(np.diff(values)) + 1
    return np.concatenate([[0], edges])[: len(values)], np.concatenate([edges, [len(values)]])[: len(values)]


class Single:
    def __init__(self, order: np.ndarray, offsets: np.ndarray, cut: np.ndarray):
        """cut [documents]: tokens that each document loses at its beginning."""
        self._order, self._offsets, self._cut = order, offsets, cut

    def __len__(self) -> int:
        return len(self._order)

    def segments(self, row: int) -> list[Segment]:
        document = int(self._order[row])
        start = int(self._offsets[document] + self._cut[document])
        return [(document, start, int(self._offsets[document + 1]))]


class BestFit:
    def __init__(self, order: np.ndarray, offsets: np.ndarray, seq_len: int):
        start, stop = offsets[:-1][order], offsets[1:][order]
        pieces = -(-(stop - start) // seq_len)  # an empty document has none
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = np.repeat(start, pieces) + number * seq_len
        size = np.minimum(np.repeat(stop, pieces) - begin, seq_len)
        longest_first = np.argsort(-size, kind="stable")
        rows = best_fit(size[longest_first], seq_len)
        by_row = longest_first[np.argsort(rows, kind="stable")]
        self._document = np.repeat(order, pieces)[by_row]
        self._begin, self._size = begin[by_row], size[by_row]
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        """[rows + 1] where each row's pieces begin."""

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def segments(self, row: int) -> list[Segment]:
        pieces = range(int(self._bounds[row]), int(self._bounds[row + 1]))
        return [(int(self._document[i]), int(b := self._begin[i]), int(b + self._size[i])) for i in pieces]


PACKINGS = {"windows": Windows, "best_fit": BestFit}


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each piece: in turn, the fullest row that still has room for it, or a new one.

    sizes: falling, each in [1, capacity]. Rows are kept by the room they have left. Pieces of one size s are placed
    together: the fullest rows with room for one, room r, take r // s each, as they would one after the other (behind
    each of these pieces, that row is the fullest). What is left of r is below r / 2, so a row changes its place at most
    log2(capacity) times, and the cost in Python steps depends on the capacity, not on the number of pieces.
    """
    out = np.empty(len(sizes), np.int64)
    rooms: dict[int, list[np.ndarray]] = {}
    """Room -> rows with that room."""
    occupied = 0
    """Bit r is set where there are rows with room r."""
    rows = 0
    edges = np.flatnonzero(np.diff(sizes, prepend=0)).tolist()
    for at, end in zip(edges, [*edges[1:], len(sizes)], strict=True):
        size = int(sizes[at])
        while at < end:
            fitting = occupied >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                found = rooms.pop(room)
                free = np.concatenate(found) if len(found) > 1 else found[0]
                occupied ^= 1 << room
            else:
                room = capacity
                free = np.arange(rows, rows - (at - end) // (capacity // size))  # rounded up
                rows += len(free)
            each = room // size
            used = min(len(free), -(-(end - at) // each))
            count = min(used * each, end - at)
            out[at : at + count] = np.repeat(free[:used], each)[:count]
            last = count - (used - 1) * each  # pieces in the last of the rows, which may be fewer
            for rest, kept in (
                (room - each * size, free[: used - 1]),
                (room - last * size, free[used - 1 : used]),
                (room, free[used:]),
            ):
                if rest and len(kept):
                    rooms.setdefault(rest, []).append(kept)
                    occupied |= 1 << rest
            at += count
    return out
