"""Killed at any moment, the run goes on: kill -9 at random times until it is done, and nothing of it shows."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml

from adapt.config import resolve
from adapt.train.fit import fit
from tests import tiny
from tests.recipes import corpus, tiny_recipe
from tests.train.test_fit import ROOT, assert_same_run

STEPS = 40


def mixed(folder) -> dict[str, Any]:
    """Two sources whose weights change, packed by best fit, their inputs masked at a rising ratio."""
    old, new = (
        {
            "source": {"name": "jsonl", "path": str(corpus(folder, 60, seed=i))},
            "name": name,
            "clean": ["unicode", "lines"],
        }
        for i, name in enumerate(("old", "new"), 2)
    )
    train = [old | {"weight": [{"until": 0.5, "weight": 1}, {"weight": 0.3}]}, new | {"weight": 2}]
    return {
        "data": {"train": train, "packing": "best_fit"},
        "objective": {"name": "meap", "ratio": 0.3, "ratio_schedule": {"start": 0.0, "warmup_frac": 0.5}},
        "evaluation": {"suites": ["bpb"], "limit": 4},
        "generation": {"prompts": ["the model"], "max_new_tokens": 8, "samplers": ["ar"]},
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "seed"), [("diffusion", 0), ("diffusion", 1), ("diffusion", 2), ("mixed", 0)])
def test_killed_at_random_moments(kind, seed, tmp_path):
    """Start-up, data preparation, steps, saving and export are all hit; losses and weights equal the straight run's."""
    base = tiny.save_tiny(tmp_path / "base", attention_dropout=0.2)
    over = {"trainer": {"steps": STEPS, "batch_tokens": 256, "microbatch": 2}, "checkpoint": {"every": 3}}
    over |= mixed(tmp_path) if kind == "mixed" else {}
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
    assert_same_run(runs / "killed", runs / "straight")
    assert not list((runs / "killed" / "checkpoints").glob(".partial*")), "what a killed save left is cleaned up"
