"""Real runs of two ranks on a real SLURM: interrupted, queued again, gone on with; in the end the run it would have been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from adapt.attempts import history
from tests import tiny
from tests.recipes import tiny_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.test_scripts import SCRIPTS, ended
from tests.train.test_fit import ROOT, assert_same_run, losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]
COMMAND = """\
#!{python}
# `adapt` of this tree; each step of a stage takes as long as SECONDS says.
import os, sys, time
sys.path.insert(0, {root!r})
from adapt.train import module
gradients = module.gradients
def slowly(*args, **kwargs):
    time.sleep(float(os.environ.get("SECONDS_A_STEP", "0")))
    return gradients(*args, **kwargs)
module.gradients = slowly
sys.argv[0] = "adapt"
from adapt.cli import entry
entry()
"""


class Run:
    def __init__(self, cluster: Cluster, folder: Path, steps: int, **trainer):
        self.cluster, self.folder = cluster, folder
        base = tiny.save_tiny(folder / "base", attention_dropout=0.2)
        trainer = {"steps": steps, "batch_tokens": 256, "microbatch": 2} | trainer
        recipe = tiny_recipe(base, folder, run={"name": "straight"}, trainer=trainer)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        command = folder / "adapt"
        command.write_text(COMMAND.format(python=sys.executable, root=str(ROOT)))
        command.chmod(0o755)
        # PYTHONPATH: ranks that a run starts itself are `python -m adapt`
        self.environment = {"ADAPT": str(command), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    @property
    def path(self) -> Path:
        return self.folder / "runs" / "broken"

    def submit(self, *options: str, seconds: float = 0.0, **environment: str) -> str:
        environment = self.environment | {"SECONDS_A_STEP": str(seconds), "ADAPT_HEALTH": "no"} | environment
        options += (str(SCRIPTS / "fit.sbatch"), "-c", "recipe.yaml", "run.name=broken")
        return self.cluster.submit("--nodes=2", *options, cwd=self.folder, **environment)

    def reaches(self, step: int) -> None:
        metrics = self.path / "metrics.jsonl"
        self.cluster.until(
            lambda: metrics.exists() and max(losses(self.path), default=0) >= step, 300, lambda: self.log()
        )

    def log(self) -> str:
        return (self.folder / "log").read_text() if (self.folder / "log").exists() else "no log"

    def is_what_it_would_have_been(self) -> None:
        """Two processes of this machine make it without a break."""
        done = subprocess.run(
            [self.environment["ADAPT"], "fit", "-c", "recipe.yaml", "trainer.devices=2"],
            cwd=self.folder,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert_same_run(self.path, self.folder / "runs" / "straight")


def test_submitted_asked_to_stop_queued_again_gone_on_with_and_the_same(cluster, tmp_path):
    """What the time limit does, without its minute."""
    run = Run(cluster, tmp_path, steps=8)
    job = run.submit(seconds=0.5, ADAPT_HEALTH="--disk=0.1")
    run.reaches(2)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    end = ended(cluster, job, tmp_path, 400)
    assert end["JobState"] == "COMPLETED", run.log()
    assert end["Restarts"] == "1"
    assert run.log().count("healthy: 2 rank(s)") == 2
    first, second = history(run.path)
    assert (first["code"], second["code"]) == (75, 0)
    assert first["step"] == second["from_step"] >= 2
    assert (first["slurm_job"], first["slurm_restarts"], second["slurm_restarts"]) == (job, 0, 1)
    run.is_what_it_would_have_been()


@pytest.mark.slow
def test_a_run_longer_than_its_time_limit(cluster, tmp_path):
    """The limit is a minute, and SLURM's own signal comes before it; the run takes two."""
    run = Run(cluster, tmp_path, steps=60)
    job = run.submit("--time=1", "--signal=B:USR1@30", seconds=1.5)
    end = ended(cluster, job, tmp_path, 540)
    assert end["JobState"] == "COMPLETED", run.log()
    assert int(end["Restarts"]) >= 1
    assert {attempt["code"] for attempt in history(run.path)[:-1]} == {75}
    assert "USR1: the run is asked to save" in run.log()
    assert "DUE TO TIME LIMIT" not in run.log()
    run.is_what_it_would_have_been()


@pytest.mark.slow
def test_a_preempted_run(cluster, tmp_path):
    run = Run(cluster, tmp_path, steps=10)
    job = run.submit("--partition=low", seconds=0.7)
    run.reaches(2)
    high = ("--nodes=2", "--exclusive", "--partition=high", "--output=other", "--wrap=sleep 1")
    other = cluster.submit(*high, cwd=tmp_path)
    assert ended(cluster, other, tmp_path, 120)["JobState"] == "COMPLETED"
    assert ended(cluster, job, tmp_path, 400)["JobState"] == "COMPLETED", run.log()
    first, second = history(run.path)
    assert (first["code"], second["code"]) == (75, 0), "saved within KillWait"
    run.is_what_it_would_have_been()


@pytest.mark.slow
def test_a_node_that_goes_down(cluster, tmp_path):
    """SLURM kills and requeues the job by itself; the run goes on from its last checkpoint."""
    run = Run(cluster, tmp_path, steps=12)
    job = run.submit(seconds=0.7)
    run.reaches(2)
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", 60)
    assert ended(cluster, job, tmp_path, 400)["JobState"] == "COMPLETED", run.log()
    assert [attempt["generation"] for attempt in history(run.path)] == [1, 2]
    run.is_what_it_would_have_been()


@pytest.mark.slow
def test_a_node_that_dies_without_a_word(cluster, tmp_path):
    """Its processes are gone, and SLURM has not noticed; the rank that is left does, and names it."""
    run = Run(cluster, tmp_path, steps=12, timeout=20)
    job = run.submit(seconds=0.7)
    run.reaches(2)
    cluster.lose("n2")
    cluster.start_node("n2")
    assert ended(cluster, job, tmp_path, 400)["JobState"] == "COMPLETED", run.log()
    assert "rank 1 (host" in run.log()
    assert "died in step" in run.log()
    assert len(history(run.path)) == 2
    run.is_what_it_would_have_been()


@pytest.mark.slow
def test_what_is_left_of_an_attempt_writes_nothing_into_the_next_ones_folder(cluster, tmp_path):
    """Both nodes lose their daemons and are given up; the ranks on them were held up, and wake when the run has been
    taken over."""
    run = Run(cluster, tmp_path, steps=14)
    job = run.submit(seconds=0.7)
    run.reaches(2)
    orphans = [pid for node in cluster.nodes for pid in cluster.processes(node) if _is_run(pid)]
    assert len(orphans) == 2
    for pid in (*orphans, *map(cluster.pid, cluster.nodes)):
        os.kill(pid, signal.SIGSTOP if pid in orphans else signal.SIGKILL)
    for node in cluster.nodes:
        for pid in cluster.processes(node):
            if pid not in orphans:  # slurmstepd would end them when the new daemon asks
                os.kill(pid, signal.SIGKILL)
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", 90)
    for node in cluster.nodes:
        cluster.start_node(node)
    cluster.until(lambda: len(history(run.path)) == 2, 300, run.log)
    for pid in orphans:
        os.kill(pid, signal.SIGCONT)
    cluster.until(lambda: not any(map(_is_run, orphans)), 120)
    assert ended(cluster, job, tmp_path, 400)["JobState"] == "COMPLETED", run.log()
    first, second = history(run.path)
    assert first.get("code") != 0
    assert (second["code"], second["from_step"]) == (0, 0)
    run.is_what_it_would_have_been()


def _is_run(pid: int) -> bool:
    import psutil

    try:
        return "fit" in psutil.Process(pid).cmdline() and "slurmstepd" not in psutil.Process(pid).name()
    except psutil.NoSuchProcess:
        return False
