"""Weights of documents: as repetitions, or as factors of their losses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from adapt.data.batch import PAD
from adapt.data.permute import uniform
from adapt.data.rows import Rows
from adapt.errors import UserError
from tests.data.helpers import make_shards, unique_documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def tokens_of(rows: Rows) -> Counter:
    read = [rows[i] for i in range(len(rows))]
    return Counter(np.concatenate([r["input_ids"][r["role"] != PAD] for r in read]).tolist())


@pytest.mark.parametrize("packing", ["windows", "best_fit"])
def test_whole_weights_are_how_often_a_document_occurs_in_an_epoch(folder, packing):
    documents, weights = unique_documents([5, 9, 2, 7, 30]), [1, 3, 0, 2, 1]
    shards = make_shards(folder, documents, weights=weights)
    rows = Rows(shards, 16, 0, packing=packing, document_weight_as="repeat")
    expected = {t: w for d, w in zip(documents, weights, strict=True) for t in d if w}
    assert tokens_of(rows) == expected
    assert tokens_of(Rows(shards, 16, 0, packing=packing)) == dict.fromkeys([t for d in documents for t in d], 1)


def test_the_expected_share_of_tokens_is_the_weights(folder):
    """A weight of 1.25 is one occurrence, and in a quarter of the draws another."""
    weights = [1.25, 0.5, 2.0]
    documents = unique_documents([4, 4, 4])
    shards = make_shards(folder, documents, weights=weights)
    counts = np.array(
        [
            [tokens_of(Rows(shards, 8, seed, document_weight_as="repeat"))[d[0]] for d in documents]
            for seed in range(400)
        ]
    )
    assert set(counts[:, 0]) == {1, 2}
    assert set(counts[:, 1]) == {0, 1}
    assert set(counts[:, 2]) == {2}
    assert np.abs(counts.mean(0) - weights).max() < 4 * np.sqrt(0.25 / 400)  # four standard errors


def test_draws_are_uniform_and_a_function_of_seed_and_document():
    drawn = uniform(20_000, 5, 1)
    assert np.array_equal(drawn, uniform(20_000, 5, 1))
    assert 0 <= drawn.min() < drawn.max() < 1
    assert np.abs(np.histogram(drawn, 10, (0, 1))[0] / 20_000 - 0.1).max() < 0.01
    assert abs(np.corrcoef(drawn, uniform(20_000, 6, 1))[0, 1]) < 0.03


def test_as_loss_the_mean_weight_over_tokens_is_one(folder):
    documents, weights = unique_documents([5, 9, 2, 7, 30]), [1, 3, 0, 2, 0.5]
    shards = make_shards(folder, documents, weights=weights)
    rows = Rows(shards, 16, 0, document_weight_as="loss")
    read = [rows[i] for i in range(len(rows))]
    factor = {t: w for r in read for t, w in zip(r["input_ids"].tolist(), r["loss_weight"].tolist(), strict=True)}
    real = np.concatenate([r["loss_weight"][r["role"] != PAD] for r in read])
    assert len(real) == 53  # every document is there once
    assert real.mean() == pytest.approx(1)
    scale = factor[documents[0][0]]
    for document, weight in zip(documents, weights, strict=True):
        assert [factor[t] for t in document] == pytest.approx([scale * weight] * len(document))


def test_weights_that_are_no_weights_are_named(folder):
    documents = unique_documents([5, 5])
    for weights, what in (([1, -2], "document 1 has the weight -2"), ([float("nan"), 1], "document 0 has the weight")):
        with pytest.raises(UserError, match=what):
            Rows(make_shards(folder, documents, weights=weights), 8, 0, document_weight_as="repeat")
    none = make_shards(folder, documents, weights=[0, 0])
    with pytest.raises(UserError, match="weights leave none over"):
        Rows(none, 8, 0, document_weight_as="repeat")
    with pytest.raises(UserError, match="every document has the weight 0"):
        Rows(none, 8, 0, document_weight_as="loss")


def test_the_fingerprint_names_weights_and_what_they_do(folder):
    documents = unique_documents([5, 5])
    shards = [make_shards(folder, documents, weights=w) for w in (None, [1, 2], [2, 1])]
    found = [Rows(s, 8, 0, document_weight_as=kind).fingerprint for s in shards for kind in ("repeat", "loss")]
    assert found[0] == found[1] == Rows(shards[0], 8, 0).fingerprint
    assert len(set(found)) == 5


@pytest.mark.parametrize(
    "asked",
    [{"packing": "best_fit"}, {"cross_document_attention": True}, {"document_weight_as": "repeat"}],
    ids=lambda a: next(iter(a)),
)
def test_what_preference_pairs_have_no_use_for_is_refused(folder, asked):
    pairs = make_shards(folder, unique_documents([5, 6]), pairs=True, weights=[1, 1])
    with pytest.raises(UserError, match="preference pairs have a row for each sequence"):
        Rows(pairs, 16, 0, **asked)
