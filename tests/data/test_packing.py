"""Best-fit packing: what the textbook's one-by-one algorithm gives, from counts."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from adapt.data import packing
from adapt.data.batch import PAD
from adapt.data.packing import BestFit, Windows, best_fit
from adapt.data.rows import Rows
from tests.data.helpers import make_shards, unique_documents

lengths = st.lists(st.integers(1, 70), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packing")


def one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is written in books: the room left in each row."""
    rooms: list[int] = []
    for size in sizes:
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(capacity - size)
    return rooms


@given(capacity=st.integers(1, 40), data=st.data())
@settings(max_examples=150, deadline=None)
def test_best_fit_is_best_fit_decreasing(capacity, data):
    sizes = sorted(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)), reverse=True)
    rows = best_fit(np.array(sizes), capacity)
    fill = np.bincount(rows, weights=sizes)
    assert fill.min() > 0  # rows are numbered without gaps
    assert sorted(capacity - fill) == sorted(one_by_one(sizes, capacity))


@given(lengths=lengths, seq_len=st.integers(2, 33), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_token_is_in_exactly_one_row_and_only_long_documents_are_cut(folder, lengths, seq_len, seed):
    documents = unique_documents(lengths)
    rows = Rows(make_shards(folder, documents), seq_len, seed, packing="best_fit")
    read = [rows[i] for i in range(len(rows))]
    pieces = []
    for row in read:
        real = row["role"] != PAD
        for number in np.unique(row["doc_ids"][real]):
            here = real & (row["doc_ids"] == number)
            pieces.append(row["input_ids"][here].tolist())
            assert row["position_ids"][here].tolist() == list(range(len(pieces[-1])))
            assert row["labels"][here].tolist() == [-100, *pieces[-1][1:]]
    tokens = sorted(t for piece in pieces for t in piece)
    assert tokens == list(range(100, 100 + sum(lengths)))
    expected = [d[i : i + seq_len] for d in documents for i in range(0, len(d), seq_len)]
    assert sorted(pieces) == sorted(expected)


def test_the_same_seed_gives_the_same_rows_and_another_one_does_not(folder):
    shards = make_shards(folder, unique_documents([7, 7, 5, 5, 3, 9, 2] * 6))
    a, b, c = (Rows(shards, 16, seed, packing="best_fit") for seed in (0, 0, 1))
    read = [[r[i]["input_ids"].tolist() for i in range(len(r))] for r in (a, b, c)]
    assert read[0] == read[1] != read[2]


def test_epochs_read_every_packed_row_once_in_another_order(folder):
    rows = Rows(make_shards(folder, unique_documents([7, 5, 3, 9, 2] * 9)), 16, 0, packing="best_fit")
    orders = [[rows.shuffled(e * len(rows) + i) for i in range(len(rows))] for e in range(2)]
    assert [sorted(row for _, row in order) for order in orders] == [list(range(len(rows)))] * 2
    assert [row for _, row in orders[0]] != [row for _, row in orders[1]]


def test_best_fit_cuts_fewer_documents_than_windows_and_is_nearly_full():
    sizes = np.random.default_rng(0).lognormal(4, 1, 5000).astype(np.int64) + 1
    offsets, order = np.concatenate([[0], np.cumsum(sizes)]), np.arange(5000)
    cut = {}
    for kind in (Windows, BestFit):
        packed = kind(order, offsets, 512)
        pieces = np.bincount([d for row in range(len(packed)) for d, _, _ in packed.segments(row)], minlength=5000)
        cut[kind] = int((pieces > 1).sum())
        assert sizes.sum() / (len(packed) * 512) > 0.99
    assert cut[BestFit] == int((sizes > 512).sum()) < 0.3 * cut[Windows]


def test_the_cost_follows_the_capacity_and_not_the_number_of_documents(monkeypatch):
    """Steps in Python (each places pieces through one `repeat`), for ten times the documents."""
    calls = []
    repeat = np.repeat
    monkeypatch.setattr(packing.np, "repeat", lambda *args: calls.append(1) or repeat(*args))
    steps = []
    for count in (20_000, 200_000):
        calls.clear()
        sizes = np.random.default_rng(1).integers(1, 257, count)
        best_fit(-np.sort(-sizes), 256)
        steps.append(len(calls))
    assert steps[1] < 1.5 * steps[0] < 4000
