"""Schedules are pure functions of the step: their ends, their shape, and what is decided when."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.components import schedules
from adapt.config import resolve
from adapt.errors import StopRequested
from adapt.optim.schedules.warmup import span
from adapt.train.fit import fit
from adapt.train.validate import problems
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import losses, stop_after, weights

NAMES = ("constant", "cosine", "rewarm_cosine", "linear", "wsd", "infinite")


def made(name, **fields):
    entry = schedules[name]
    return entry.factory(entry.config_type(**fields))


def final_of(name, fields):
    return 1.0 if name == "constant" else fields["final"]


def test_every_schedule_is_tested_here():
    assert set(NAMES) == set(schedules.names())


@pytest.mark.parametrize("name", NAMES)
@given(
    total=st.integers(10, 400),
    warmup=st.one_of(st.floats(0.0, 0.25), st.integers(1, 3)),
    final=st.floats(0.0, 0.5),
    shape=st.sampled_from(["linear", "sqrt"]),
)
def test_invariant_1_ends_and_monotone_after_warm_up(name, total, warmup, final, shape):
    """eta(0) = eta_max / W, eta(W) = eta_max, eta(T) = eta_min to 1e-12, never up after the warm-up; past T it stays."""
    fields = {"warmup": warmup}
    if name != "constant":
        fields |= {"final": final}
    if name in ("wsd", "infinite"):
        fields |= {"shape": shape}
    eta, warm = made(name, **fields), span(total, warmup)
    if warm:
        assert eta(0, total) == pytest.approx(1 / warm, abs=1e-12)
        assert all(eta(s, total) == pytest.approx((s + 1) / warm, abs=1e-12) for s in range(warm))
    assert eta(warm, total) == pytest.approx(1.0, abs=1e-12)
    for past in (0, 1, 7, 10_000):
        assert eta(total + past, total) == pytest.approx(final_of(name, fields), abs=1e-12)
    rates = [eta(s, total) for s in range(warm, total + 1)]
    assert all(a >= b - 1e-15 for a, b in pairwise(rates))
    assert all(eta(s, total) > 0 for s in range(total))


def test_rewarm_cosine_is_the_papers_formula():
    """Ibrahim et al.: eta_min + (eta_max - eta_min) / 2 (1 + cos(pi (t - t_w) / (T - t_w))), 1 % up, down to a tenth."""
    total, warm, low = 1000, 10, 0.1
    eta = made("rewarm_cosine")
    for step in range(warm, total):
        expected = low + (1 - low) / 2 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        assert eta(step, total) == pytest.approx(expected, abs=1e-12)


def test_tails_have_their_shape():
    root, line = (made("wsd", warmup=0, decay=10, final=0.2, shape=s) for s in ("sqrt", "linear"))
    for step in range(10):
        assert root(90 + step, 100) == pytest.approx(1 - 0.8 * math.sqrt(step / 10), abs=1e-12)
        assert line(90 + step, 100) == pytest.approx(1 - 0.8 * step / 10, abs=1e-12)
    eta = made("infinite", warmup=5, cooldown=45, constant=0.5, decay=10, final=0.1)
    assert [eta(s, 100) for s in range(50, 91)] == [0.5] * 41
    assert eta(95, 100) == pytest.approx(0.3, abs=1e-12)


@given(st.integers(30, 200), st.integers(30, 200))
def test_before_the_decay_the_length_of_the_run_does_not_matter(short, long):
    """With spans in steps, nothing before the decay depends on where the run will end."""
    for eta in (
        made("wsd", warmup=3, decay=7, shape="sqrt"),
        made("infinite", warmup=3, cooldown=11, constant=0.4, decay=7),
    ):
        for step in range(min(short, long) - 7):
            assert eta(step, short) == eta(step, long)


BRANCHING = {
    "wsd": {"name": "wsd", "warmup": 2, "decay": 3, "shape": "sqrt"},
    "infinite": {"name": "infinite", "warmup": 1, "cooldown": 2, "constant": 0.5, "decay": 3, "final": 0.1},
}


@pytest.mark.parametrize("name", BRANCHING)
@pytest.mark.parametrize("planned", [20, 7])
def test_invariant_2_branching_the_decay_equals_a_run_planned_that_way(name, planned, tmp_path, monkeypatch):
    """Stopped in the constant phase at step 4 of 20, or of 7 (the run gets longer), then resumed to end at step 8."""
    base = tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)

    def recipe(run, steps):
        found = tiny_recipe(base, tmp_path, run={"name": run}, schedule=BRANCHING[name], objective="next_token")
        found["trainer"]["steps"] = steps
        return found | {"evaluation": {}, "generation": {}}

    fit(resolve(recipe("planned", 8)))
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 4"):
        stop_after(patched, 4)
        fit(resolve(recipe("branched", planned)))
    fit(resolve(recipe("branched", 8)), "yes")
    runs = tmp_path / "runs"
    assert losses(runs / "planned") == losses(runs / "branched")
    a, b = weights(runs / "planned"), weights(runs / "branched")
    assert all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize(
    "schedule, where",
    [
        ({"name": "wsd", "warmup": 3, "decay": 4}, "schedule.decay"),
        ({"name": "wsd", "decay": -1}, "schedule.decay"),
        ({"name": "infinite", "warmup": 1, "cooldown": 5, "decay": 1}, "schedule.cooldown"),
        ({"name": "infinite", "constant": 0.1, "final": 0.2}, "schedule.final"),
        ({"name": "rewarm_cosine", "warmup": 9}, "schedule.warmup"),
        ({"name": "linear", "final": 2}, "schedule.final"),
    ],
)
def test_phases_that_do_not_fit_are_refused(schedule, where, tiny_base, tmp_path):
    found = problems(resolve(tiny_recipe(tiny_base, tmp_path, schedule=schedule)))
    assert [p.where for p in found] == [where]
