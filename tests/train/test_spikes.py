"""`trainer.spike`: an update far outside of what the run is used to is no update, and all ranks say so."""

from __future__ import annotations

import re

import pytest

from adapt.config import resolve
from adapt.errors import StopRequested, UserError
from adapt.objectives.next_token import NextToken
from adapt.train.fit import fit
from adapt.train.spikes import LEAST, WINDOW, remember, spike
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, launch, losses, stop_after


def test_a_norm_is_a_spike_above_a_multiple_of_the_median_only():
    recent = []
    assert spike(1e9, recent, 5.0) == "", "nothing is known yet"
    for norm in (*[1.0] * LEAST, 100.0):
        remember(norm, recent)
    assert spike(5.0, recent, 5.0) == ""
    assert "5.1, 5.1 times the usual 1 (trainer.spike=5)" in spike(5.1, recent, 5.0)
    for _ in range(2 * WINDOW):
        remember(3.0, recent)
    assert recent == [3.0] * WINDOW


def spiking(monkeypatch, steps: set[int]) -> None:
    """A loss a thousand times too large at these steps (prepare and call come in turns, one microbatch a step)."""
    call, prepare = NextToken.__call__, NextToken.prepare
    now = []

    def prepared(self, batch, *, seed, step):
        now[:] = [step]
        return prepare(self, batch, seed=seed, step=step)

    def called(self, *args):
        return {k: v * (1000.0 if now[0] in steps else 1.0) for k, v in call(self, *args).items()}

    monkeypatch.setattr(NextToken, "prepare", prepared)
    monkeypatch.setattr(NextToken, "__call__", called)


def recipe(base, folder, name="tiny", **trainer):
    trainer = {"steps": 24, "batch_tokens": 256, "microbatch": 4, "spike": 20.0} | trainer
    plain = tiny_recipe(base, folder, run={"name": name}, trainer=trainer, evaluation={"suites": []})
    return plain | {"objective": "next_token", "generation": {}, "checkpoint": {"every": 4}}


@pytest.fixture
def spikes_at_20(monkeypatch):
    spiking(monkeypatch, {20})


def test_stop_keeps_the_state_before_it(tiny_base, tmp_path, spikes_at_20):
    with pytest.raises(UserError, match=r"step 20: the gradient norm is .* \(trainer.spike=20\).*non_finite=skip"):
        fit(resolve(recipe(tiny_base, tmp_path)))
    assert fit(resolve(recipe(tiny_base, tmp_path, spike=None)), "yes") == 0


def test_skip_goes_on_without_it_and_resumes_with_the_same_memory(tiny_base, tmp_path, monkeypatch, spikes_at_20):
    fit(resolve(recipe(tiny_base, tmp_path, "straight", non_finite="skip")))
    assert "times the usual" in (tmp_path / "runs" / "straight" / "log.txt").read_text()
    with monkeypatch.context() as patched, pytest.raises(StopRequested):
        stop_after(patched, 18)
        fit(resolve(recipe(tiny_base, tmp_path, "broken", non_finite="skip")))
    fit(resolve(recipe(tiny_base, tmp_path, "broken", non_finite="skip")), "yes")
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "broken")


def test_rewind_leaves_the_data_out(tiny_base, tmp_path, monkeypatch):
    spiking(monkeypatch, {18})
    with pytest.raises(UserError, match="2th time"):  # the poison is in the step's number here, not in its data
        fit(resolve(recipe(tiny_base, tmp_path, non_finite="rewind", max_non_finite=1)))
    log = (tmp_path / "runs" / "tiny" / "log.txt").read_text()
    assert "rewound to step-16, leaving out 3 steps of data" in log
    assert max(losses(tmp_path / "runs" / "tiny")) == 18


def test_two_ranks_skip_the_steps_that_one_skips(tiny_base, tmp_path):
    """At a learning rate that moves nothing, with a limit that ordinary batches pass here and there."""
    skipped = {}
    for ranks in (1, 2):
        over = {"devices": ranks, "microbatch": 2, "spike": 1.02, "non_finite": "skip", "max_non_finite": 99}
        plain = recipe(tiny_base, tmp_path, f"on-{ranks}", **over) | {"optimizer": {"name": "adamw", "lr": 1e-9}}
        done = launch(plain, tmp_path)
        assert done.returncode == 0, done.stderr
        skipped[ranks] = re.findall(r"step (\d+): the gradient norm", done.stdout)
    assert 0 < len(skipped[1]) < 8
    assert skipped[1] == skipped[2]
