"""A signal is seen in every phase of a run, ends it with exit code 75, and costs nothing: gone on with, it is the run it
would have been."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from adapt.attempts import history
from adapt.config import resolve
from adapt.data import build
from adapt.distributed import checkpoint
from adapt.errors import StopRequested
from adapt.train import finish, fit, measure, probe
from adapt.train.signals import StopFlag, stop_point
from tests import tiny
from tests.recipes import tiny_recipe
from tests.train.test_fit import ROOT, assert_same_run, losses


def once(function, at: int = 1):
    """The same function; its `at`-th call gets a TERM first."""

    def wrapped(*args, **kwargs):
        wrapped.calls += 1
        if wrapped.calls == at:
            signal.raise_signal(signal.SIGTERM)
        return function(*args, **kwargs)

    wrapped.calls = 0
    return wrapped


@pytest.fixture
def recipe(tmp_path):
    def make(name):
        made = tiny_recipe(tiny.save_tiny(tmp_path / "base", attention_dropout=0.2), tmp_path, run={"name": name})
        made["evaluation"] |= {"every": 2, "limit": 8}
        return made

    return make


CALLS = 10
"""Calls of the model that an evaluation of this recipe makes."""
PHASES = {
    "data preparation": (build._Preparation, "write", 1, None),
    "reading weights": (fit, "build_root", 1, None),
    "leak probe": (fit, "leak_probe", 1, None),
    "dry run": (probe, "gradients", 1, None),
    "evaluation of the start": (measure, "look", 2, 0),
    "evaluation in the middle": (measure, "look", 1 + CALLS + 2, 2),
    "saving": (checkpoint.dcp, "save", 1, 6),
    "evaluation of the end": (measure, "look", 1 + 3 * CALLS + 2, 6),
    "export": (finish, "export", 1, 6),
    "samples": (finish, "look", 1, 6),
}
"""Where, and the step of the checkpoint that must be there afterwards."""


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_ends_it_and_costs_nothing(phase, recipe, tmp_path, monkeypatch):
    owner, name, at, step = PHASES[phase]
    broken, runs = recipe("broken"), tmp_path / "runs"
    with monkeypatch.context() as patched, pytest.raises(StopRequested, match=r"SIGTERM.*--resume"):
        wrapped = once(getattr(owner, name), at)
        patched.setattr(owner, name, wrapped)
        fit.fit(resolve(broken))
    assert wrapped.calls == at, "nothing further was begun"
    saved = checkpoint.checkpoints(runs / "broken" / "checkpoints")
    assert [p.name for p in saved[-1:]] == ([] if step is None else [f"step-{step}"])
    if phase != "samples":
        assert not (runs / "broken" / "export").exists()
    if (runs / "broken").exists():
        assert history(runs / "broken")[-1]["code"] == 75
    fit.fit(resolve(broken), "auto")
    fit.fit(resolve(recipe("straight")))
    assert_same_run(runs / "broken", runs / "straight")
    a, b = (evaluations(runs / n) for n in ("broken", "straight"))
    assert a == b
    assert sorted(a) == [0, 2, 4, 6]


def evaluations(run: Path) -> dict[int, dict]:
    import json

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [x for x in lines if any(k.startswith("eval/") for k in x)]
    return {x["step"]: {k: v for k, v in x.items() if k.startswith("eval/")} for x in found}


def test_the_command_ends_with_75_before_it_has_read_the_recipe(tmp_path):
    """A real process and a real signal, in the time of its imports."""
    code = (
        "import os, signal, sys\n"
        "import adapt.config\n"
        "adapt.config.load = lambda *_: os.kill(os.getpid(), signal.SIGUSR1)\n"
        "from adapt.cli import main\n"
        "sys.exit(main(['fit', '-c', 'nbdiff']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert "stopped on request (SIGUSR1)" in done.stderr


def test_what_swallows_every_exception_does_not_swallow_a_signal():
    with StopFlag() as flag, pytest.raises(StopRequested, match="SIGUSR1.* here"), flag.at_once("here"):
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Exception:
            pytest.fail("it was taken for an error")


def test_cleaning_up_is_not_cut_off_by_the_next_signal():
    cleaned = []
    with StopFlag() as flag, pytest.raises(StopRequested), flag.at_once("here"):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGUSR1)
            cleaned.append(1)
    assert cleaned


def test_work_that_may_not_be_cut_off_is_not():
    with StopFlag() as flag:
        signal.raise_signal(signal.SIGTERM)
        assert flag.reason == "SIGTERM"
        with pytest.raises(StopRequested), flag.at_once("here"):
            pytest.fail("it had been asked before")


def test_ranks_agree_on_a_stop_point():
    class World:
        def sum(self, numbers):
            return [numbers[0] + 1]

    with pytest.raises(StopRequested, match="another rank was asked to stop"):
        stop_point(StopFlag(), World(), "here")


@pytest.mark.slow
def test_two_ranks_agree_when_one_is_asked_in_an_evaluation(tmp_path):
    """The first rank alone gets the signal; both stop inside the evaluation, and the run goes on to what it would be."""
    base = tiny.save_tiny(tmp_path / "base")
    code = (
        "import os, signal, sys\n"
        "from adapt.train import measure\n"
        "look = measure.look\n"
        "def asked(*args):\n"
        "    asked.calls += 1\n"
        "    if asked.calls == 3 and os.environ['RANK'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return look(*args)\n"
        "asked.calls = 0\n"
        "measure.look = asked\n"
        "from adapt.cli import entry\n"
        "entry()"
    )
    made = tiny_recipe(base, tmp_path, run={"name": "two"}, trainer={"devices": 2})
    made["evaluation"] |= {"limit": 16}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    fit_it = ["fit", "-c", str(path), "--resume=auto"]
    first = subprocess.run(
        [sys.executable, "-c", code, *fit_it], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert first.returncode == 75, first.stderr
    assert "in the evaluation at step 0" in first.stderr
    assert "Traceback" not in first.stderr
    second = subprocess.run([sys.executable, "-m", "adapt", *fit_it], cwd=ROOT, env=environment, capture_output=True)
    assert second.returncode == 0
    assert sorted(losses(tmp_path / "runs" / "two")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler: apt-get install g++")
@pytest.mark.parametrize("devices", [1, 2])
def test_a_signal_while_layers_are_compiled_ends_it(devices, tmp_path):
    """The compiler's processes get it as well, which is how SLURM sends it without cgroups."""
    import psutil

    made = tiny_recipe(tiny.save_tiny(tmp_path / "base"), tmp_path, trainer={"compile": True, "devices": devices})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    command = [sys.executable, "-m", "adapt", "fit", "-c", str(path)]
    with open(tmp_path / "told", "w") as told:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=told, stderr=told)

        def family() -> list[psutil.Process]:
            return [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]

        def compiles() -> bool:
            try:
                return any(child.name() == "cc1plus" for child in family())
            except psutil.Error:
                return False

        try:
            while not compiles():
                assert process.poll() is None, (tmp_path / "told").read_text()
                time.sleep(0.02)
            for one in family():
                with suppress(psutil.Error):
                    one.send_signal(signal.SIGUSR1)
            code = process.wait(300)
        finally:
            process.kill()
    text = (tmp_path / "told").read_text()
    assert code == 75, text
    assert "stopped on request (SIGUSR1)" in text
    assert "nothing was to be saved" in text or "there was nothing to save" in text
