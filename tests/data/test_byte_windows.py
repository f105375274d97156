"""Rows cut by bytes of text: the same text in each row, whatever the tokenizer."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from adapt.data.batch import PAD
from adapt.data.packing import ByteWindows
from adapt.data.stream import eval_batches
from tests.data.helpers import make_shards, unique_documents

documents = st.lists(st.lists(st.integers(1, 9), max_size=30), min_size=1, max_size=8)
"""Of each document, the bytes of its tokens; an end of 0 bytes is put behind."""


def windows(lengths: list[list[int]], row_bytes: int) -> tuple[ByteWindows, np.ndarray]:
    lengths = [[*document, 0] for document in lengths]
    offsets = np.cumsum([0, *map(len, lengths)])
    token_bytes = np.concatenate([np.array(d, np.int64) for d in lengths])
    return ByteWindows(np.arange(len(lengths)), offsets, 16, token_bytes=token_bytes, row_bytes=row_bytes), token_bytes


@given(documents, st.integers(9, 40))
def test_every_token_is_in_one_row_and_rows_hold_their_bytes(lengths, row_bytes):
    packing, token_bytes = windows(lengths, row_bytes)
    segments = [s for row in range(len(packing)) for s in packing.segments(row)]
    assert [i for _, a, b in segments for i in range(a, b)] == list(range(len(token_bytes)))
    sizes = [sum(token_bytes[a:b].sum() for _, a, b in packing.segments(row)) for row in range(len(packing))]
    assert all(abs(size - row_bytes) < 9 for size in sizes[:-1])  # up to a token at each edge
    assert packing.longest == max(sum(b - a for _, a, b in packing.segments(row)) for row in range(len(packing)))


@given(documents, st.integers(9, 40), st.data())
def test_a_coarser_tokenizer_has_the_same_rows_up_to_a_token_at_each_edge(lengths, row_bytes, data):
    joined = []
    for document in lengths:
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(document) - 1)))))
        parts = np.split(np.array(document, np.int64), cuts)
        joined.append([int(part.sum()) for part in parts if part.sum()])
    longest = max((size for d in (*lengths, *joined) for size in d), default=0)
    ends = []
    for tokens in (lengths, joined):
        packing, token_bytes = windows(tokens, row_bytes)
        sums = [sum(token_bytes[a:b].sum() for _, a, b in packing.segments(r)) for r in range(len(packing))]
        ends.append(np.cumsum(sums))
    for row in range(min(map(len, ends)) - 1):
        if longest < row_bytes:
            assert abs(ends[0][row] - ends[1][row]) < 2 * longest


def test_a_documents_end_stays_with_its_last_token():
    packing, _ = windows([[8, 8], [8, 8]], 16)
    assert [packing.segments(row) for row in range(len(packing))] == [[(0, 0, 3)], [(1, 3, 6)]]


@pytest.mark.parametrize("world", [1, 2])
def test_batches_are_as_long_as_their_longest_row(tmp_path, world):
    shards = make_shards(tmp_path, unique_documents([5, 3, 40, 7]))
    lengths = np.full(1 + int(shards.tokens(0, shards.num_tokens).max()), 2, np.int64)
    seen = 0
    for rank in range(world):
        for batch in eval_batches(shards, 4, 2, None, rank, world, row_bytes=20, byte_lengths=lengths):
            used = (batch.role != PAD).any(0)
            assert bool(used.all()) or batch.role.shape[1] == 1
            seen += int((batch.role != PAD).sum())
    assert seen == shards.num_tokens
