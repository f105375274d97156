"""Killed at any moment, the run goes on: kill -9 at random times until it is done, and nothing of it shows.

Start-up (the recipe read, the model built, the step rehearsed), the preparation of the data, steps, evaluations, saves,
export, samples and report are all hit: each kill is noted with the phase that it came in, and the long loop asks that
the main ones be among them. A worker is a fork of a parent that has imported everything, so that there is time for many.
"""

from __future__ import annotations

import random

import pytest

from tests import tiny
from tests.faults.killing import KINDS, RANKS, Tally, kill


@pytest.fixture
def dropout_base(tmp_path):
    return tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)


def assert_unharmed(tally) -> None:
    assert not tally.lost
    assert not tally.different
    assert not tally.left
    assert not tally.unnoticed


def test_killed_at_ten_random_moments(warm, dropout_base, tmp_path):
    (tally,) = kill(warm, "diffusion", dropout_base, tmp_path, random.Random(0), runs=1, kills=10)
    assert_unharmed(tally)
    assert tally.num_kills == 10


def test_one_of_two_ranks_killed_at_random_moments(warm, dropout_base, tmp_path):
    """The other one notices, names it and ends with 71; two fresh ranks go on."""
    (tally,) = kill(warm, "ranks", dropout_base, tmp_path, random.Random(2), runs=1, kills=4, hasty=True)
    assert_unharmed(tally)
    assert tally.num_kills == 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - RANKS.keys()))
def test_killed_at_a_hundred_random_moments(kind, warm, dropout_base, tmp_path):
    tally = sum(kill(warm, kind, dropout_base, tmp_path, random.Random(1), runs=9, kills=12), Tally())
    assert_unharmed(tally)
    assert tally.num_kills >= 100
    assert {"start-up", "data", "steps", "save", "export"} <= set(tally.kills), f"some were never hit: {tally.kills}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_of_two_ranks_killed_at_fifty_random_moments(warm, dropout_base, tmp_path):
    """The watch looks as often as it does in a run."""
    tally = sum(kill(warm, "ranks", dropout_base, tmp_path, random.Random(1), runs=5, kills=10), Tally())
    assert_unharmed(tally)
    assert tally.num_kills == 50
    assert {"start-up", "data", "steps", "save", "export"} <= set(tally.kills), f"some were never hit: {tally.kills}"
