"""Permutation and mixture: orders without state."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from adapt.data.mixture import LONGEST, Mixture, quotas
from adapt.data.permute import Permutation, shuffled


@given(n=st.integers(1, 600), key=st.integers(0, 2**70), epoch=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(n, key, epoch):
    order = Permutation(n, key, epoch)
    assert sorted(order[i] for i in range(n)) == list(range(n))
    assert sorted(shuffled(n, key, epoch).tolist()) == list(range(n))


def test_permutation_differs_by_key_and_leaves_few_in_place():
    orders = [[Permutation(500, seed, epoch)[i] for i in range(500)] for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert all(sum(i == x for i, x in enumerate(o)) < 8 for o in orders)


def test_permutation_needs_few_steps_whatever_the_size(monkeypatch):
    calls = 0
    network = Permutation._network

    def counted(self, i):
        nonlocal calls
        calls += 1
        return network(self, i)

    monkeypatch.setattr(Permutation, "_network", counted)
    for n in (10**3, 2**40 + 1):
        calls = 0
        order = Permutation(n, 3)
        for i in range(0, n, n // 200):
            order[i]
        assert calls < 201 * 8


def test_permutation_refuses_what_is_outside():
    with pytest.raises(IndexError):
        Permutation(5, 0)[5]


def test_orders_stay_the_same_between_releases():
    """A resumed run counts on it: these numbers must never change."""
    assert [Permutation(10, 7, 1)[i] for i in range(10)] == [6, 4, 7, 3, 0, 5, 2, 9, 8, 1]
    assert shuffled(10, 7).tolist() == [0, 5, 1, 8, 7, 6, 9, 2, 4, 3]


weights = st.lists(st.one_of(st.integers(1, 300), st.sampled_from([0.05, 0.95, 0.125, 1.5])), min_size=1, max_size=12)


@given(weights=weights)
@settings(max_examples=60, deadline=None)
def test_mixture_is_exact_to_one_row_at_every_prefix(weights):
    mixture = Mixture(weights)
    counts = [0] * len(weights)
    for n in range(min(2 * mixture.period, 2000)):
        source, earlier = mixture[n]
        assert earlier == counts[source]
        counts[source] += 1
        for count, quota in zip(counts, mixture.quotas, strict=True):
            assert abs(count * mixture.period - quota * (n + 1)) < mixture.period


def test_mixture_takes_decimal_weights_as_written():
    assert quotas([0.05, 0.95]) == [1, 19]
    assert quotas([2.0, 1.0]) == quotas([1, 0.5]) == [2, 1]
    assert quotas([1.0]) == [1]


def test_mixture_rounds_weights_that_no_short_pattern_has():
    rounded = quotas([1.0, 1 / 3, 0.1234567])
    total = 1 + 1 / 3 + 0.1234567
    assert sum(rounded) == LONGEST
    weights = [1, 1 / 3, 0.1234567]
    assert all(abs(r / LONGEST - w / total) < 1 / LONGEST for r, w in zip(rounded, weights, strict=True))
    assert min(quotas([1e-9, 1.0])) == 1  # never rounded away


def test_mixture_with_a_source_of_weight_zero_is_the_mixture_without_it():
    with_zero, without = Mixture([0.5, 0.0, 0.5]), Mixture([0.5, 0.5])
    assert [with_zero[n] for n in range(20)] == [({0: 0, 1: 2}[s], c) for s, c in (without[n] for n in range(20))]


def test_mixture_reads_one_place_of_the_pattern_however_far():
    mixture = Mixture([1, 2, 3])
    source, earlier = mixture[6 * 10**15 + 4]
    assert (source, earlier) == (mixture[4][0], mixture[4][1] + 10**15 * mixture.quotas[source])
