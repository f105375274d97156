"""Packing: every token once, and labels, positions and documents as `batch.py` says."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from adapt.data.batch import CONTEXT, PAD, TARGET
from adapt.data.rows import Rows
from adapt.data.shards import TokenShards
from adapt.errors import UserError
from tests.data.helpers import PAD_ID, make_shards, unique_documents

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@given(lengths=lengths, seq_len=st.integers(1, 33), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_token_is_in_exactly_one_row(folder, lengths, seq_len, seed):
    rows = Rows(make_shards(folder, unique_documents(lengths)), seq_len, seed)
    read = [rows[i] for i in range(len(rows))]
    tokens = np.concatenate([r["input_ids"][r["role"] != PAD] for r in read])
    assert sorted(tokens.tolist()) == list(range(100, 100 + sum(lengths)))
    assert len(rows) == -(-sum(lengths) // seq_len)
    assert all((r["role"] != PAD).all() for r in read[:-1])  # only the last row is padded


@given(lengths=lengths, seq_len=st.integers(1, 33), seed=st.integers(0, 5), learned=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_labels_positions_and_documents(folder, lengths, seq_len, seed, learned):
    documents = unique_documents(lengths)
    roles = [[learned.choice((CONTEXT, TARGET)) for _ in d] for d in documents]
    rows = Rows(make_shards(folder, documents, roles), seq_len, seed)
    document_of = {token: i for i, d in enumerate(documents) for token in d}
    role_of = {t: r for d, rs in zip(documents, roles, strict=True) for t, r in zip(d, rs, strict=True)}
    for i in range(len(rows)):
        row = rows[i]
        ids = row["input_ids"].tolist()
        previous = None
        for at, token in enumerate(ids):
            if row["role"][at] == PAD:
                assert token == PAD_ID
                assert row["labels"][at] == -100
                assert row["loss_weight"][at] == 0
                assert row["doc_ids"][at] == row["doc_ids"][-1]
                assert at == 0 or row["role"][at - 1] == PAD or row["doc_ids"][at] == row["doc_ids"][at - 1] + 1
                continue
            assert row["role"][at] == role_of[token]
            begins = previous is None or document_of[token] != document_of[previous]
            if begins:
                assert row["position_ids"][at] == 0
                assert row["doc_ids"][at] == (0 if previous is None else row["doc_ids"][at - 1] + 1)
                assert row["labels"][at] == -100
            else:
                assert token == previous + 1  # the document goes on
                assert row["position_ids"][at] == row["position_ids"][at - 1] + 1
                assert row["doc_ids"][at] == row["doc_ids"][at - 1]
                assert row["labels"][at] == (token if role_of[token] == TARGET else -100)
            previous = token


def test_a_document_cut_at_a_row_border_starts_anew(folder):
    rows = Rows(make_shards(folder, [list(range(100, 110))]), 4, 0)
    assert [rows[i]["input_ids"].tolist() for i in range(3)] == [
        [100, 101, 102, 103],
        [104, 105, 106, 107],
        [108, 109, PAD_ID, PAD_ID],
    ]
    assert rows[1]["position_ids"].tolist() == [0, 1, 2, 3]
    assert rows[1]["labels"].tolist() == [-100, 105, 106, 107]
    assert rows[2]["doc_ids"].tolist() == [0, 0, 1, 1]
    assert rows[2]["position_ids"].tolist() == [0, 1, 0, 1]
    assert rows[2]["labels"].tolist() == [-100, 109, -100, -100]


def test_the_order_of_documents_depends_on_the_seed(folder):
    shards = make_shards(folder, unique_documents([7] * 20))
    first = [Rows(shards, 16, seed)[0]["input_ids"].tolist() for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


@given(lengths=lengths, seq_len=st.integers(1, 33))
@settings(max_examples=20, deadline=None)
def test_each_epoch_reads_every_row_once_in_another_order(folder, lengths, seq_len):
    rows = Rows(make_shards(folder, unique_documents(lengths)), seq_len, 1)
    count = len(rows)
    for epoch in range(3):
        read = [rows.shuffled(epoch * count + i) for i in range(count)]
        assert [e for e, _ in read] == [epoch] * count
        assert sorted(r for _, r in read) == list(range(count))


def test_a_row_is_read_without_touching_the_rest(folder, monkeypatch):
    """Reading one of many rows asks for that row's tokens only, in a few pieces."""
    rows = Rows(make_shards(folder, unique_documents([5] * 400), shard_tokens=10**6), 32, 0)
    touched = []
    tokens = TokenShards.tokens
    monkeypatch.setattr(TokenShards, "tokens", lambda self, a, b: touched.append(b - a) or tokens(self, a, b))
    rows[40]
    assert sum(touched) == 32
    assert len(touched) <= 8


def test_preference_pairs_have_a_row_for_each_sequence(folder):
    documents = unique_documents([5, 6, 3, 30, 8, 8])
    roles = [[CONTEXT, CONTEXT] + [TARGET] * (len(d) - 2) for d in documents]
    rows = Rows(make_shards(folder, documents, roles, pairs=True), 10, 0)
    assert (rows.unit, len(rows), rows.pairs.num_too_long) == (2, 4, 1)  # the answer of 28 tokens does not fit
    assert [int(rows[i]["pair_index"]) for i in range(4)] == [0, 0, 2, 2]
    for i, document in zip(range(4), [documents[0], documents[1], documents[4], documents[5]], strict=True):
        row = rows[i]
        size = len(document)
        assert row["input_ids"][:size].tolist() == document
        assert row["labels"].tolist() == [-100, -100, *document[2:], *[-100] * (10 - size)]
        assert set(row["role"][size:].tolist()) <= {PAD}
    for epoch in range(2):
        read = [rows.shuffled(epoch * 4 + i)[1] for i in range(4)]
        assert sorted(read) == [0, 1, 2, 3]
        assert all(read[i] % 2 == 0 and read[i + 1] == read[i] + 1 for i in (0, 2))


def prompted(prompt: int, *answers: int) -> tuple[list, list]:
    """Documents with the same prompt and answers of these lengths, and their roles."""
    shared = list(range(100, 100 + prompt))
    documents = [shared + list(range(1000 * i, 1000 * i + n)) for i, n in enumerate(answers, 1)]
    return documents, [[CONTEXT] * prompt + [TARGET] * n for n in answers]


@pytest.mark.parametrize("bos", [None, 100, 7])
def test_a_pair_that_is_too_long_loses_the_beginning_of_its_prompt(bos, folder):
    """The same of both sequences, and nothing of an answer; a begin-of-text token (100, where there is one) stays."""
    long, roles = prompted(50, 20, 9)
    short, more = prompted(5, 6, 7)
    shards = make_shards(folder, long + short, roles + more, pairs=True)
    shards.manifest["bos_id"] = bos
    rows = Rows(shards, 60, 0)
    assert (len(rows), rows.facts) == (4, {"row_tokens": 60, "pairs_too_long": 0, "prompts_cut": 1})
    for row, document, answer in zip((rows[0], rows[1]), long, (20, 9), strict=True):
        kept = document[10:]
        kept[0] = 100 if bos == 100 else kept[0]
        size = len(kept)
        assert row["input_ids"][:size].tolist() == kept
        assert row["labels"][: size - answer].tolist() == [-100] * 40
        assert row["labels"][size - answer : size].tolist() == document[-answer:]
        assert row["position_ids"][:size].tolist() == list(range(size))
        assert (row["role"][size:] == PAD).all()
    assert rows[2]["input_ids"][:11].tolist() == short[0]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6),
    st.integers(40, 80),
)
@settings(max_examples=30, deadline=None)
def test_every_pair_is_whole_cut_or_counted(folder, lengths, seq_len):
    """Answers always whole, prompts the same in both, at least 32 tokens of one that was cut, and as many as fit."""
    documents, roles = [], []
    for prompt, a, b in lengths:
        more = prompted(prompt, a, b)
        documents, roles = documents + more[0], roles + more[1]
    expected = {}
    for pair, (prompt, *answers) in enumerate(lengths):
        over = max(0, prompt + max(answers) - seq_len)
        if not over or prompt - over >= 32:
            expected[pair] = prompt - over
    shards = make_shards(folder, documents, roles, pairs=True)
    if not expected:
        with pytest.raises(UserError, match="no preference pair fits"):
            Rows(shards, seq_len, 0)
        return
    rows = Rows(shards, seq_len, 0)
    assert rows.facts["pairs_too_long"] == len(lengths) - len(expected)
    for i in range(len(rows)):
        row = rows[i]
        pair = int(row["pair_index"])
        answer = lengths[pair][1 + i % 2]
        assert int((row["role"] == CONTEXT).sum()) == expected[pair]
        assert row["labels"][row["role"] == TARGET].tolist() == documents[2 * pair + i % 2][-answer:]


def test_pairs_that_all_exceed_the_row_are_refused(folder):
    shards = make_shards(folder, unique_documents([5, 60]), pairs=True)
    with pytest.raises(UserError, match=r"no preference pair fits into data.seq_len=16"):
        Rows(shards, 16, 0)
