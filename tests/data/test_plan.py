"""The plan of sources: exact in every phase, and never more of a source than there may be."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from adapt.data.mixture import Mixture
from adapt.data.plan import Plan, boundary, tempered

weights = st.lists(st.sampled_from([0, 0.05, 0.5, 1, 2, 3, 7]), min_size=3, max_size=3).filter(any)
phases = st.lists(st.tuples(st.integers(1, 40), weights), min_size=1, max_size=4)
limits = st.lists(st.one_of(st.none(), st.integers(0, 25)), min_size=3, max_size=3)


def built(lengths_and_weights, **kwargs) -> Plan:
    starts = np.cumsum([0, *(n for n, _ in lengths_and_weights[:-1])]).tolist()
    return Plan([(start, w) for start, (_, w) in zip(starts, lengths_and_weights, strict=True)], **kwargs)


def followed(plan: Plan, units: int) -> list[tuple[int, int]]:
    end = units if plan.end is None else min(units, plan.end)
    return [plan.locate(n)[:2] for n in range(end)]


@given(weights=weights, n=st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_counts_and_positions_are_what_reading_one_by_one_gives(weights, n):
    mixture = Mixture(weights)
    read = [mixture[i] for i in range(n)]
    assert mixture.counts(n) == [sum(s == i for s, _ in read) for i in range(3)]
    assert all(mixture.position(source, earlier) == i for i, (source, earlier) in enumerate(read))


@given(phases=phases)
@settings(max_examples=80, deadline=None)
def test_a_mixture_is_exact_to_one_row_at_every_prefix_of_every_phase(phases):
    """Spec invariant 3, |c_i - w_i n| <= 1, in each phase by the weights of that phase."""
    plan = built(phases)
    start = 0
    for length, w in phases:
        counts = np.zeros(3)
        for n in range(1, length + 1):
            counts[plan.locate(start + n - 1)[0]] += 1
            assert (np.abs(counts - np.array(w) / sum(w) * n) <= 1).all()
        start += length


@given(phases=phases, limits=limits, read=st.lists(st.integers(0, 10), min_size=3, max_size=3), on=st.booleans())
@settings(max_examples=120, deadline=None)
def test_counters_go_on_over_phases_and_no_source_gives_more_than_it_may(phases, limits, read, on):
    """Spec invariant 6, the first half. Any unit alone is what it is in a reading from the start."""
    plan = built(phases, limits=limits, read=read, renormalise=on)
    counts = list(read)
    for n, (source, earlier) in enumerate(followed(plan, 200)):
        assert earlier == counts[source]
        counts[source] += 1
        assert limits[source] is None or counts[source] <= limits[source]
        assert plan.counts(n + 1) == counts
    if plan.end is not None:
        with pytest.raises(IndexError):
            plan.locate(plan.end)
        assert plan.counts(plan.end + 5) == plan.counts(plan.end)


@given(phases=phases, limits=limits)
@settings(max_examples=80, deadline=None)
def test_without_renormalising_the_plan_ends_where_the_first_source_is_missed(phases, limits):
    plain, plan = built(phases), built(phases, limits=limits)
    expected = next((n for n in range(300) if _over(plain.counts(n + 1), limits)), None)
    assert plan.end == expected or (expected is None and plan.end >= 300)
    assert followed(plan, 300) == followed(plain, 300 if plan.end is None else min(300, plan.end))


def _over(counts, limits) -> bool:
    return any(limit is not None and c > limit for c, limit in zip(counts, limits, strict=True))


def test_a_source_that_gave_more_than_it_may_gives_no_more():
    """A later stage may allow less than the stages before it have read."""
    assert Plan([(0, [1, 1])], limits=[3, None], read=[5, 5]).end == 0
    plan = Plan([(0, [1, 1])], limits=[3, None], read=[5, 5], renormalise=True)
    assert plan.counts(4) == [5, 9]


def test_when_a_source_runs_dry_the_others_share_its_place_in_proportion():
    plan = Plan([(0, [5, 3, 1])], limits=[10, None, None], renormalise=True)
    ((dry, source),) = plan.dry
    assert source == 0
    assert dry == pytest.approx(18, abs=2)  # 10 rows at 5 of 9
    before = plan.counts(dry)
    assert before[0] == 10
    for n in range(1, 60):
        counts = np.array(plan.counts(dry + n)) - before
        assert counts[0] == 0
        assert (np.abs(counts[1:] - np.array([0.75, 0.25]) * n) <= 1).all()
    assert plan.end is None


def test_renormalising_ends_when_every_source_has_run_dry():
    plan = Plan([(0, [1, 1])], limits=[3, 5], renormalise=True)
    assert plan.end == 8
    assert plan.counts(8) == [3, 5]


def test_a_source_without_weight_in_a_phase_is_not_read_and_misses_nothing():
    plan = Plan([(0, [1, 0]), (10, [0, 1])], limits=[10, None])
    assert plan.end is None
    assert [plan.locate(n)[0] for n in (0, 9, 10, 25)] == [0, 0, 1, 1]


def test_a_far_unit_costs_one_look_up(monkeypatch):
    plan = Plan([(0, [1, 2]), (10, [3, 1]), (10**9, [1, 1])])
    calls = []
    look_up = Mixture.__getitem__
    monkeypatch.setattr(Mixture, "__getitem__", lambda self, n: calls.append(n) or look_up(self, n))
    plan.locate(10**12)
    assert calls == [10**12 - 10**9]


def test_phases_begin_at_zero_and_follow_each_other():
    for starts in ([1], [0, 5, 4]):
        with pytest.raises(ValueError, match="must begin at 0"):
            Plan([(s, [1.0]) for s in starts])


def test_factors_are_the_share_in_the_loss_over_the_share_of_rows():
    plan = Plan([(0, [0.9, 0.1]), (10, [0.5, 0.5])], objective=[1, 1])
    assert [plan.locate(n)[2] for n in range(10)].count(5.0) == 1
    assert {plan.locate(n)[2] for n in range(10)} == {5 / 9, 5.0}
    assert {plan.locate(n)[2] for n in range(10, 30)} == {1.0}


@given(weights=weights.filter(all))
@settings(max_examples=60, deadline=None)
def test_objective_weights_equal_to_the_weights_leave_every_loss_exactly_as_it_is(weights):
    for objective in (weights, [2 * w for w in weights], None):
        assert Plan([(0, weights)], objective=objective).segments[0].factors == (1.0, 1.0, 1.0)


def test_a_source_without_objective_weight_has_its_weight():
    assert Plan([(0, [3, 1])], objective=[None, 3]).segments[0].factors == ((3 / 6) / (3 / 4), (3 / 6) / (1 / 4))


def test_temperature_goes_from_the_weights_to_sizes():
    tokens = [10**9, 10**6]
    assert tempered([0.3, 0.7], tokens, None) == [0.3, 0.7]
    assert tempered([0.3, 0.7], tokens, 0.0) == [0.3, 0.7]
    for alpha in (0.3, 1.0):
        a, b = tempered([1.0, 1.0], tokens, alpha)
        assert a / b == pytest.approx(1000**alpha)
    plan = Plan([(0, tempered([1.0, 2.0], [400, 100], 0.5))])
    assert plan.counts(1000) == [500, 500]


def test_boundaries_are_shares_below_one_and_steps_from_there_on():
    assert [boundary(u, 50) for u in (0.1, 0.5, 0.999, 1, 20)] == [5, 25, 50, 1, 20]
