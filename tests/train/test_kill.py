"""Killed at any moment, the run goes on: kill -9 at random times until it is done, and nothing of it shows."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from adapt.config import resolve
from adapt.train.fit import fit
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import ROOT, losses, weights

STEPS = 40


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(seed, tmp_path):
    """Start-up, data preparation, steps, saving and export are all hit; losses and weights equal the straight run's."""
    base = tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)
    over = {"trainer": {"steps": STEPS, "batch_tokens": 256, "microbatch": 2}, "checkpoint": {"every": 3}}
    fit(resolve(tiny_recipe(base, tmp_path, run={"name": "straight"}, **over)))
    recipe = tiny_recipe(base, tmp_path, run={"name": "killed"}, **over)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    rng, kills = random.Random(seed), 0
    command = [sys.executable, "-m", "adapt", "fit", "-c", str(path), "--resume=auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ADAPT_CACHE": str(tmp_path / "cache")}
    while True:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        # The first kills come early, so that preparation is hit; later ones give the run time to get somewhere.
        deadline = time.monotonic() + rng.uniform(1, 8 + kills)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2, "the run was over before it could be killed; the test says nothing"
    runs = tmp_path / "runs"
    assert losses(runs / "killed") == losses(runs / "straight")
    a, b = weights(runs / "straight"), weights(runs / "killed")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list((runs / "killed" / "checkpoints").glob(".partial*")), "what a killed save left is cleaned up"
