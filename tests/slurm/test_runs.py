"""Real runs of two ranks on a real SLURM: interrupted, queued again, gone on with; in the end the run it would have been.

What is to happen in the middle of a step happens there on a machine of any speed: rank 1 waits in that step, and rank 0
for rank 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from adapt.attempts import history
from tests import tiny
from tests.recipes import tiny_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.test_scripts import SCRIPTS, ended
from tests.train.test_fit import ROOT, assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]
PATIENCE = 600
"""Seconds: a start takes ten on a machine at leisure, and minutes on one with much else to do."""
COMMAND = """\
#!{python}
# `adapt` of this tree. Rank 1 waits in the step that HOLD says, once in the life of the run, until it is asked to stop or
# a file `go` is there.
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))  # `adapt` takes signals before it imports what this does
# The job's log is written by srun: a rank that outlives it would end at its next word, and with an error of its own.
if os.environ.get("OWN_LOG") and os.environ["SLURM_STEP_ID"] == "0":
    log = os.open("log-" + os.environ["SLURM_PROCID"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
sys.path.insert(0, {root!r})
from adapt.train import module
gradients, hold = module.gradients, int(os.environ.get("HOLD", "0"))
def held(*args, **kwargs):
    if kwargs["step"] == hold - 1 and os.environ["RANK"] == "1" and not os.path.exists("held"):
        open("held", "w").close()
        flag = signal.getsignal(signal.SIGUSR1).__self__
        while not flag.reason and not os.path.exists("go"):
            time.sleep(0.1)
    return gradients(*args, **kwargs)
module.gradients = held
sys.argv[0] = "adapt"
from adapt.cli import entry
entry()
"""


class Straight:
    """The run without a break: two processes of this machine."""

    def __init__(self, folder: Path):
        self.base = tiny.save_tiny(folder / "base", attention_dropout=0.2)
        self.command = folder / "adapt"
        self.command.write_text(COMMAND.format(python=sys.executable, root=str(ROOT)))
        self.command.chmod(0o755)
        # PYTHONPATH: ranks that a run starts itself are `python -m adapt`
        self.environment = {"ADAPT": str(self.command), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.write(folder)
        done = subprocess.run(
            [self.command, "fit", "-c", "recipe.yaml", "trainer.devices=2"],
            cwd=folder,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        self.path = folder / "runs" / "tiny"

    def write(self, folder: Path) -> None:
        recipe = tiny_recipe(self.base, folder, trainer={"steps": 8, "batch_tokens": 256, "microbatch": 2})
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return Straight(tmp_path_factory.mktemp("straight"))


@pytest.fixture
def run(cluster, straight, tmp_path):
    return Run(cluster, straight, tmp_path)


class Run:
    def __init__(self, cluster: Cluster, straight: Straight, folder: Path):
        self.cluster, self.straight, self.folder = cluster, straight, folder
        self.path = folder / "runs" / "tiny"
        straight.write(folder)

    def submit(self, *options: str, hold: int, overrides: tuple[str, ...] = (), **environment: str) -> str:
        """Its rank 1 waits in step `hold`."""
        environment = self.straight.environment | {"HOLD": str(hold), "ADAPT_HEALTH": "no"} | environment
        options += (str(SCRIPTS / "fit.sbatch"), "-c", "recipe.yaml", *overrides)
        self.job = self.cluster.submit("--nodes=2", *options, cwd=self.folder, **environment)
        return self.job

    def holds(self) -> None:
        self.cluster.until((self.folder / "held").exists, PATIENCE, self.log)

    def given_up(self) -> None:
        """SLURM has found a node gone, and queued the job again."""
        self.cluster.until(lambda: self.cluster.job(self.job).get("Restarts") == "1", PATIENCE)

    def completes(self) -> dict[str, str]:
        """What SLURM knows in the end. The run is the one it would have been."""
        end = ended(self.cluster, self.job, self.folder, PATIENCE)
        assert end["JobState"] == "COMPLETED", self.log()
        assert_same_run(self.path, self.straight.path)
        return end

    def log(self) -> str:
        return "".join(f"--- {file.name}\n{file.read_text()}" for file in sorted(self.folder.glob("log*")))


def test_submitted_asked_to_stop_queued_again_gone_on_with_and_the_same(run):
    """What the time limit does, without its minutes."""
    job = run.submit(hold=3, ADAPT_HEALTH="--disk=0.1")
    run.holds()
    run.cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert run.completes()["Restarts"] == "1"
    assert run.log().count("healthy: 2 rank(s)") == 2
    first, second = history(run.path)
    assert (first["code"], second["code"]) == (75, 0)
    assert first["step"] == second["from_step"] >= 3
    assert (first["slurm_job"], first["slurm_restarts"], second["slurm_restarts"]) == (job, 0, 1)


@pytest.mark.slow
def test_a_run_longer_than_its_time_limit(run):
    """SLURM's own signal before its own limit; the run would not end by itself."""
    run.submit("--time=3", "--signal=B:USR1@60", hold=3)
    end = run.completes()
    *stopped, last = history(run.path)
    assert int(end["Restarts"]) >= len(stopped) >= 1
    assert {attempt["code"] for attempt in stopped} == {75}
    assert (last["code"], last["from_step"] >= 3) == (0, True)
    assert "USR1: the run is asked to save" in run.log()
    assert "DUE TO TIME LIMIT" not in run.log()


@pytest.mark.slow
def test_a_preempted_run(run):
    run.submit("--partition=low", hold=3)
    run.holds()
    options = ("--nodes=2", "--exclusive", "--partition=high", "--output=other", "--wrap=sleep 1")
    other = run.cluster.submit(*options, cwd=run.folder)
    assert ended(run.cluster, other, run.folder, PATIENCE)["JobState"] == "COMPLETED"
    assert run.completes()["Restarts"] == "1"
    first, second = history(run.path)
    assert (first["code"], second["code"]) == (75, 0), "saved within KillWait"
    assert second["from_step"] >= 3


@pytest.mark.slow
def test_a_node_that_goes_down(run):
    """SLURM finds it gone, ends the rest of the job and queues it again; the run goes on from its last checkpoint."""
    run.submit(hold=5, overrides=("checkpoint.every=2",))
    run.holds()
    run.cluster.lose("n2")
    run.given_up()
    run.cluster.start_node("n2")
    assert run.completes()["Restarts"] == "1"
    assert [(attempt["generation"], attempt["from_step"] >= 2) for attempt in history(run.path)] == [
        (1, False),
        (2, True),
    ]


@pytest.mark.slow
def test_a_node_that_dies_without_a_word(run):
    """Its processes are gone, and SLURM has not noticed; the rank that is left does, and names it."""
    run.submit(hold=3, overrides=("trainer.timeout=20",))
    run.holds()
    time.sleep(3)  # it tells where it is every second
    run.cluster.lose("n2")
    run.cluster.start_node("n2")
    run.completes()
    assert "rank 1 (host" in run.log()
    assert "died in step 3" in run.log()
    assert len(history(run.path)) == 2


@pytest.mark.slow
def test_what_is_left_of_an_attempt_writes_nothing_into_the_next_ones_folder(run):
    """The network goes: SLURM gives up both nodes, and their ranks live on. They are held up in a step, and go on with it
    when the run has been taken over."""
    run.submit(hold=3, OWN_LOG="yes")
    run.holds()
    orphans = {node: _ranks(run, node) for node in run.cluster.nodes}
    assert [len(pids) for pids in orphans.values()] == [1, 1]
    run.cluster.lose(*orphans, spare=[pid for pids in orphans.values() for pid in pids])
    run.given_up()
    # It would start while SLURM still sends the new daemons its order to end the first start, and be ended by that.
    run.cluster.run("scontrol", "hold", run.job)
    for node in run.cluster.nodes:
        run.cluster.start_node(node)
    run.cluster.until(run.cluster.idle, PATIENCE)
    time.sleep(15)
    run.cluster.run("scontrol", "release", run.job)
    run.cluster.until(lambda: len(history(run.path)) == 2, PATIENCE, run.log)
    assert all(set(pids) <= set(_ranks(run, node)) for node, pids in orphans.items()), run.log()
    (run.folder / "go").touch()
    assert run.completes()["Restarts"] == "1"
    run.cluster.until(lambda: not any(_ranks(run, node) for node in run.cluster.nodes), PATIENCE, run.log)
    first, second = history(run.path)
    assert f"{run.path} was taken over by" in first["reason"]
    assert (first["code"], second["code"], second["from_step"]) == (1, 0, 0)
    assert (run.path / "log.txt").read_text().count(" step 3 | ") == 1


def _ranks(run: Run, node: str) -> list[int]:
    """Processes of the run itself on a node."""
    import psutil

    found = []
    for pid in run.cluster.processes(node):
        try:
            command = psutil.Process(pid).cmdline()
        except psutil.NoSuchProcess:
            continue
        if command[1:2] == [str(run.straight.command)]:
            found.append(pid)
    return found
