"""A real SLURM on this machine: slurmctld and a slurmd for each node, started by whoever runs the tests.

Debian's build takes several slurmds on one host (same NodeHostname, own ports). No root and no munge: auth/none. Nothing
is read from or written to /etc; everything lies in one folder.
"""

from __future__ import annotations

import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]

CONFIG = """\
ClusterName=lab
FirstJobId={first}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
MpiDefault=none
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=10
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=0
PartitionName=patient Nodes=ALL PriorityTier=1 GraceTime=15
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    def __init__(self, folder: Path, nodes: int = 2):
        """Starts it; raises AssertionError with SLURM's log where that takes more than a minute."""
        self.folder = folder
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        for name in ("state", "run", "log", *(f"spool-{n}" for n in self.nodes)):
            (folder / name).mkdir(parents=True)
        controller, *ports = free_ports(1 + nodes)
        lines = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        config = folder / "slurm.conf"
        # Where ranks meet follows from the job's number: clusters of one machine must not meet each other.
        config.write_text(
            CONFIG.format(
                controller=controller,
                user=getpass.getuser(),
                folder=folder,
                first=random.randrange(1, 400),
                nodes="\n".join(lines),
            )
        )
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.environment = clean | {"SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        # Ends it when this process is gone, however that came: the pipe is closed then. Ctrl-C is not for it.
        self.guard = subprocess.Popen(
            [sys.executable, "-m", "tests.slurm.cluster", str(config)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self.run("slurmctld", "-i")
            self.until(lambda: "is UP" in self.run("scontrol", "ping", check=False))
            for node in self.nodes:
                self.start_node(node)
            self.until(self.idle)
        except BaseException:
            self.stop()
            raise

    def run(self, *command: str, check: bool = True, **more) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, **more)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.log()}"
        return done.stdout

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def idle(self) -> bool:
        return set(self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split()) == set(self.nodes)

    def until(self, true: Callable[[], object], seconds: float = 60, what: Callable[[], str] | None = None) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not within {seconds} s. {what() if what else self.log()}"
            time.sleep(0.2)

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """The job's number. Its log is `log` in `cwd`."""
        told = subprocess.run(
            ["sbatch", "--parsable", "--output=log", *arguments],
            env=self.environment | environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert told.returncode == 0, told.stderr + self.log()
        return told.stdout.strip().partition(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows: JobState, ExitCode, Restarts, Reason, NodeList, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", job)))

    def over(self, job: str) -> bool:
        state = self.job(job)["JobState"]
        return state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "PREEMPTED")

    def pid(self, daemon: str) -> int | None:
        """`slurmctld` or a node's name."""
        name = daemon if daemon == "slurmctld" else f"slurmd-{daemon}"
        try:
            return int((self.folder / "run" / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None

    def lose(self, *nodes: str, spare: Collection[int] = ()) -> None:
        """As when their power goes: the daemons, and every process of jobs on them, killed at once. `spare`: processes that
        live on, as they do where the network goes."""
        frozen: set[int] = set()  # none may tell of the others' end, on whatever node
        while new := self._all_of(nodes) - frozen - set(spare):
            for pid in new:
                _send(pid, signal.SIGSTOP)
            self.until(lambda new=new: all(map(_stands, new)))
            frozen |= new
        # Children first: when a parent goes, the kernel wakes the stopped processes it leaves behind (SIGHUP, SIGCONT), and
        # an srun that wakes has its step cancelled.
        for pid in sorted(frozen, key=_depth, reverse=True):
            _send(pid, signal.SIGKILL)

    def _all_of(self, nodes: Collection[str]) -> set[int]:
        tasks = [pid for node in nodes for pid in self.processes(node)]
        return {pid for pid in (*map(self.pid, nodes), *tasks, *map(_step_of, tasks)) if pid is not None}

    def processes(self, node: str) -> list[int]:
        """Of jobs' tasks on that node."""
        return [pid for pid, its in _processes(self.environment["SLURM_CONF"]) if its == node]

    def log(self) -> str:
        files = sorted((self.folder / "log").glob("*.log"))
        return "".join(f"\n--- {f.name}\n" + "\n".join(f.read_text().splitlines()[-25:]) for f in files)

    def clear(self) -> None:
        """End every job, and bring back the nodes."""
        for job in self.run("squeue", "-h", "-o", "%A", check=False).split():
            self.run("scancel", "--signal=KILL", "--full", job, check=False)
            self.run("scancel", job, check=False)
        for node in self.nodes:
            pid = self.pid(node)
            if pid is None or not _lives(pid):
                self.start_node(node)
            self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        self.until(self.idle)

    def stop(self) -> None:
        _end(self.environment["SLURM_CONF"])
        self.guard.communicate()


def _processes(config: str) -> list[tuple[int, str | None]]:
    """Every process of a cluster, and the node of those that belong to jobs."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            if environment.get("SLURM_CONF") == config:
                found.append((process.pid, environment.get("SLURMD_NODENAME")))
    return found


def _step_of(task: int) -> int | None:
    """The slurmstepd that started a task: it hides its environment."""
    import psutil

    with suppress(psutil.Error):
        parent = psutil.Process(task).parent()
        if parent is not None and "slurmstepd" in " ".join(parent.cmdline()):
            return parent.pid
    return None


def _end(config: str) -> None:
    """Kill all of it, and what was being started meanwhile. slurmstepd ends with its tasks."""
    for _ in range(100):
        found = [pid for pid, _ in _processes(config)]
        for pid in {*filter(None, map(_step_of, found)), *found}:
            _send(pid, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _stands(pid: int) -> bool:
    """Whether none of its threads runs: those that did not take the signal themselves stop a moment later."""
    try:
        states = [file.read_text().rpartition(")")[2].split()[0] for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # a thread has ended meanwhile
        return not _lives(pid)
    return set(states) <= set("TtZX")


def _depth(pid: int) -> int:
    import psutil

    with suppress(psutil.Error):
        return len(psutil.Process(pid).parents())
    return 0


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


if __name__ == "__main__":
    sys.stdin.buffer.read()
    _end(sys.argv[1])
