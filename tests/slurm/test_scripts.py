"""slurm/*.sbatch on a real SLURM, with a stand-in for `adapt` that ends as it is told: what goes back into the queue."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm
SCRIPTS = Path(__file__).parents[2] / "slurm"
STAND_IN = """\
#!/usr/bin/env bash
# Task 0 leaves a line for each start; then every task does what is in `does`.
verb=$1
shift
[ $SLURM_PROCID = 0 ] && echo "$verb $*" >>starts
[ $verb = health ] && exit 0
source ./does
"""


@pytest.fixture
def does(tmp_path):
    """`does(text)`: a folder to submit from, where `adapt fit` is this piece of bash."""

    def make(text: str) -> dict[str, str]:
        (tmp_path / "adapt").write_text(STAND_IN)
        (tmp_path / "adapt").chmod(0o755)
        (tmp_path / "does").write_text(text)
        return {"ADAPT": str(tmp_path / "adapt")}

    return make


def submit(cluster: Cluster, folder: Path, *options: str, script: str = "fit.sbatch", **environment: str) -> str:
    arguments = (*options, str(SCRIPTS / script), "-c", "recipe.yaml", "a.b=1 2")
    return cluster.submit("--nodes=2", *arguments, cwd=folder, **environment)


def ended(cluster: Cluster, job: str, folder: Path, seconds: float = 60) -> dict[str, str]:
    def told() -> str:
        log = folder / "log"
        return f"{cluster.job(job)} {log.read_text() if log.exists() else ''}"

    cluster.until(lambda: cluster.over(job), seconds, told)
    return cluster.job(job)


def starts(folder: Path) -> list[str]:
    file = folder / "starts"
    return [line for line in file.read_text().splitlines() if line.startswith("fit")] if file.exists() else []


def test_a_run_that_is_done_is_done(cluster, does, tmp_path):
    job = submit(cluster, tmp_path, **does("echo rank $SLURM_PROCID at $MASTER_ADDR"))
    assert ended(cluster, job, tmp_path)["JobState"] == "COMPLETED"
    assert starts(tmp_path) == ["fit -c recipe.yaml a.b=1 2 --resume=auto"]
    log = (tmp_path / "log").read_text()
    assert "rank 0 at 127.0.0.1" in log, "the node's address: its name is known to nobody else"
    assert "rank 1 at 127.0.0.1" in log
    assert f"job {job}, start 1: 2 task(s) on n[1-2]" in log


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_is_not_tried_again(code, cluster, does, tmp_path):
    job = submit(cluster, tmp_path, **does(f"exit $((SLURM_PROCID == 0 ? {code} : 0))"))
    end = ended(cluster, job, tmp_path)
    assert (end["JobState"], end["ExitCode"]) == ("FAILED", f"{code}:0")
    assert len(starts(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["exit 75", "[ $SLURM_PROCID = 0 ] && exit 71 || exit 71", "[ $SLURM_PROCID = 1 ] && kill -9 $$; sleep 1; exit 71"],
    ids=["stopped", "lost", "killed"],
)
def test_a_run_to_be_gone_on_with_is_queued_again_and_not_for_ever(how, cluster, does, tmp_path):
    job = submit(cluster, tmp_path, ADAPT_RESTARTS="1", ADAPT_HEALTH="no", **does(how))
    end = ended(cluster, job, tmp_path, 90)
    assert end["JobState"] == "FAILED"
    assert end["Restarts"] == "2"
    assert len(starts(tmp_path)) == 2
    assert "given up after 2 restarts" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_restart_meets_at_another_port(cluster, does, tmp_path):
    how = 'echo port=$MASTER_PORT; [ -n "${SLURM_RESTART_COUNT:-}" ] || exit 75'
    job = submit(cluster, tmp_path, ADAPT_HEALTH="no", **does(how))
    assert ended(cluster, job, tmp_path)["JobState"] == "COMPLETED"
    ports = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("port=")]
    assert ports[0] == ports[1] != ports[2] == ports[3]


WAITS = """\
trap 'echo saved $SLURM_PROCID; exit 75' USR1 TERM
[ -n "${SLURM_RESTART_COUNT:-}" ] && exit 0
echo up >>up; for i in $(seq 300); do sleep 0.2; done
"""


def up(cluster: Cluster, folder: Path) -> None:
    cluster.until(lambda: (folder / "up").exists() and len((folder / "up").read_text().split()) == 2)


def test_the_signal_before_the_time_limit_reaches_every_task_and_the_job_goes_on(cluster, does, tmp_path):
    """Sent as SLURM sends it: to the batch shell alone."""
    job = submit(cluster, tmp_path, **does(WAITS))
    up(cluster, tmp_path)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    assert ended(cluster, job, tmp_path)["JobState"] == "COMPLETED"
    assert len(starts(tmp_path)) == 2
    log = (tmp_path / "log").read_text()
    assert "saved 0" in log
    assert "saved 1" in log


@pytest.mark.slow
def test_a_job_that_reaches_its_limit_before_it_has_saved_goes_on_all_the_same(cluster, does, tmp_path):
    """Asked too late: at the limit itself."""
    job = submit(cluster, tmp_path, "--time=1", "--signal=B:URG@1", **does(WAITS.replace("300", "900")))
    assert ended(cluster, job, tmp_path, 240)["JobState"] == "COMPLETED"
    assert len(starts(tmp_path)) == 2


def test_who_cancels_the_job_means_it(cluster, does, tmp_path):
    """It may save, and does not come back."""
    job = submit(cluster, tmp_path, **does(WAITS))
    up(cluster, tmp_path)
    cluster.run("scancel", job)
    assert ended(cluster, job, tmp_path)["JobState"] == "CANCELLED"
    time.sleep(3)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert len(starts(tmp_path)) == 1
    assert "back into the queue" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["low", "patient"])
def test_a_preempted_job_saves_and_goes_on(partition, cluster, does, tmp_path):
    """`low`: SLURM asks shell and tasks and requeues; `patient`: it asks the tasks first, and they end in time."""
    job = submit(cluster, tmp_path, f"--partition={partition}", **does(WAITS))
    up(cluster, tmp_path)
    other = cluster.submit(
        "--nodes=2", "--exclusive", "--partition=high", "--output=other", "--wrap=sleep 1", cwd=tmp_path
    )
    assert ended(cluster, other, tmp_path)["JobState"] == "COMPLETED"
    end = ended(cluster, job, tmp_path, 90)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    assert len(starts(tmp_path)) == 2
    assert "saved 0" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_sweep_is_a_run_for_each_line(cluster, does, tmp_path):
    (tmp_path / "lines.txt").write_text("run.name=a optimizer.lr=1\nrun.name=b optimizer.lr=2\n\n")
    environment = does("exit 0")
    options = ("--nodes=1", "--array=1-3%1", str(SCRIPTS / "sweep.sbatch"), "lines.txt", "-c", "r.yaml")
    job = cluster.submit(*options, cwd=tmp_path, **environment)
    cluster.until(lambda: not cluster.run("squeue", "-h", "-j", job, check=False).strip())
    assert starts(tmp_path) == [
        f"fit -c r.yaml run.name={name} optimizer.lr={lr} --resume=auto" for name, lr in (("a", 1), ("b", 2))
    ]
    assert "line 3 of lines.txt has no run.name" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("script", ["fit.sbatch", "sweep.sbatch"])
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)]).returncode == 0
