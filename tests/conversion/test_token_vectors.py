"""PPMI and its truncated SVD against the dense definitions, on texts small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapt.conversion import token_vectors
from adapt.conversion.token_vectors import count_pairs, occurrences, ppmi, truncated_svd
from adapt.data.noise import generator
from tests.conversion.said import chatter

IDS = np.array([2, 3, 5, 7, 11, 12])
"""Of a vocabulary with holes: 4 and 9 occur, and are not in it."""


def texts(size: int = 1200) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [*chatter([*IDS, 4, 9], size), rng.choice([2, 2, 3, 7], 300), np.array([5]), np.array([], np.int64)]


def counted(documents, ids, window: int) -> np.ndarray:
    """[V, V] by the definition: every place, every neighbour, both ways."""
    number = {int(i): n for n, i in enumerate(ids)}
    found = np.zeros((len(ids), len(ids)))
    for document in documents:
        for at, token in enumerate(document):
            for other in range(max(0, at - window), min(len(document), at + window + 1)):
                if other != at and int(token) in number and int(document[other]) in number:
                    found[number[int(token)], number[int(document[other])]] += window + 1 - abs(at - other)
    return found


def symmetric(pairs, size: int) -> np.ndarray:
    upper = np.zeros((size, size))
    upper[pairs.left, pairs.right] = pairs.counts
    assert (np.tril(upper, -1) == 0).all()
    return upper + upper.T


@pytest.mark.parametrize("window", [1, 3])
def test_pairs_are_those_of_the_definition(window):
    pairs = count_pairs(texts(), IDS, window)
    assert (symmetric(pairs, len(IDS)) == counted(texts(), IDS, window)).all()


def test_counts_do_not_depend_on_how_texts_are_cut_into_chunks(monkeypatch):
    documents = texts()
    whole = count_pairs(documents, IDS, 3)
    monkeypatch.setattr(token_vectors, "CHUNK", 350)  # no document is longer
    for limit in (None, 40):  # 40: merged again and again, and 21 pairs are all there are
        parts = count_pairs(documents, IDS, 3, limit=limit)
        assert all(np.array_equal(getattr(whole, k), getattr(parts, k)) for k in ("left", "right", "counts"))


def test_beyond_the_limit_the_rarest_pairs_go():
    full, few = count_pairs(texts(), IDS, 3), count_pairs(texts(), IDS, 3, limit=6)
    assert len(few.counts) == 6
    assert sorted(few.counts) == sorted(full.counts)[-6:]


def test_occurrences_are_counted():
    found = occurrences(texts(), 13)
    assert found.sum() == sum(map(len, texts()))
    assert found[5] == sum((d == 5).sum() for d in texts())


def dense_ppmi(counts: np.ndarray) -> np.ndarray:
    joint, context = counts / counts.sum(), counts.sum(0) ** 0.75
    with np.errstate(divide="ignore"):
        return np.maximum(0, np.log(joint / np.outer(joint.sum(1), context / context.sum())))


def test_ppmi_is_the_dense_one():
    found = ppmi(count_pairs(texts(), IDS, 3), len(IDS))
    expected = dense_ppmi(counted(texts(), IDS, 3))
    assert (expected > 0).any()
    np.testing.assert_allclose(found.to_dense().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("dim", [3, 100])
def test_vectors_are_those_of_the_dense_svd(dim):
    ids = np.arange(60)
    documents = [np.sort(np.random.default_rng(i).choice(60, 20)) for i in range(80)]  # near ids keep company
    matrix = ppmi(count_pairs(documents, ids, 2), 60)
    found = truncated_svd(matrix, dim, generator(0))
    left, values, _ = torch.linalg.svd(matrix.to_dense())
    expected = (left * values.sqrt())[:, :dim]
    assert found.shape == expected.shape
    similar, dissimilar = found @ found.T, expected @ expected.T  # signs are free
    torch.testing.assert_close(similar, dissimilar, rtol=0, atol=1e-3 * float(values[0]))


def test_the_same_vectors_every_time():
    matrix = ppmi(count_pairs(texts(), IDS, 3), len(IDS))
    one, two = (truncated_svd(matrix, 2, generator(3)) for _ in range(2))
    assert torch.equal(one, two)
