"""The clock on the wall may say anything: durations and the time limit are of the clock that only goes forward."""

from __future__ import annotations

import itertools
import os
import time

import pytest

from adapt.config import resolve
from adapt.distributed import checkpoint
from adapt.errors import StopRequested
from adapt.train.fit import fit
from tests.recipes import tiny_recipe
from tests.train.test_fit import assert_same_run, stop_after

YEAR = 365 * 24 * 3600.0


def test_jumps_of_years_change_nothing(tiny_base, tmp_path, monkeypatch):
    """Forward and back at every look: the same run, in seconds, with the same files, and no time limit met."""
    over = {"trainer": {"steps": 6, "batch_tokens": 256, "max_time": "01:00:00"}, "checkpoint": {"every": 2}}
    fit(resolve(tiny_recipe(tiny_base, tmp_path, run={"name": "straight"}, **over)))
    jumpy = resolve(tiny_recipe(tiny_base, tmp_path, run={"name": "jumpy"}, **over))
    now, jumps = time.time, itertools.cycle((10 * YEAR, -10 * YEAR, 0.0, 20 * YEAR))
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now() + next(jumps))
        patched.setattr(time, "time_ns", lambda: int((now() + next(jumps)) * 1e9))
        stop_after(patched, 3)
        with pytest.raises(StopRequested, match="after step 3"):
            fit(jumpy)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now() - 10 * YEAR)
        fit(jumpy, "yes")
    runs = tmp_path / "runs"
    assert_same_run(runs / "jumpy", runs / "straight")
    saved = checkpoint.checkpoints(runs / "jumpy" / "checkpoints")
    assert [p.name for p in saved] == [p.name for p in checkpoint.checkpoints(runs / "straight" / "checkpoints")]
    assert 0 < checkpoint.read_state(saved[-1])["seconds"] < YEAR


def test_the_newest_checkpoint_is_that_of_the_last_step(tiny_base, tmp_path, monkeypatch, capsys):
    """Whatever the times of the folders say, as after a copy or a clock set back."""
    recipe = tiny_recipe(tiny_base, tmp_path) | {"checkpoint": {"every": 1, "keep": 9}}
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match="after step 4"):
        stop_after(patched, 4)
        fit(resolve(recipe))
    for age, path in enumerate(checkpoint.checkpoints(tmp_path / "runs" / "tiny" / "checkpoints")):
        os.utime(path, (1e9 - age * YEAR, 1e9 - age * YEAR))
    capsys.readouterr()
    fit(resolve(recipe), "yes")
    assert "steps: 2 of" in capsys.readouterr().out
