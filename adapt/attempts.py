"""Attempts at one run: who trains in a run folder, who did before, and that none but the newest writes there.

An attempt takes the next number, its generation, by creating `attempts/<generation>.json`: the file says who it is, and
only one process can create it. An attempt whose file is not the newest may write nothing more, so that what is left of
an older one (a rank on a node that was given up for dead) cannot spoil the run. The files stay: they are its history.

This relies on what local disks, NFS 3 and later, Lustre and GPFS give: files are created exclusively, renamed in one
piece, and who opens a file or a folder sees what was closed before. A check and the write after it are two things; what
an attempt makes in between is microseconds, and a checkpoint half written is taken from it when the next one begins.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapt.console import say
from adapt.errors import Problem, Superseded, UserError

FOLDER = "attempts"
KINDS = dict.fromkeys(("pid", "slurm_restarts", "from_step", "step", "code"), (int,)) | {"process_began": (int, float)}
"""What a record holds; the run folder, and so the record, may be anybody's."""
BEAT = 10.0
"""Seconds between two signs of life."""
SILENT = 60.0
"""Seconds without one after which an attempt on another machine counts as dead."""


class Attempt:
    """This process's: `check` before every write, `end` when it is over. Ranks other than the first only check."""

    def __init__(self, run: Path, generation: int, record: dict[str, Any] | None = None):
        self.place, self.generation = Path(run) / FOLDER, generation
        self.record = record
        self.step: int | None = None
        self._writing, self._over = threading.Lock(), threading.Event()
        if record is not None:
            self._write()
            threading.Thread(target=self._live, daemon=True).start()

    def check(self) -> None:
        """Raises Superseded where a newer attempt has taken up the run."""
        newest = newest_of(self.place)
        if newest > self.generation:
            who = whose(_read(self.place, newest))
            raise Superseded(
                f"{self.place.parent} was taken over by {who} (attempt {newest}); this is attempt {self.generation}, "
                "and it writes nothing more"
            )

    def begin_at(self, step: int) -> None:
        """Where it goes on, for the history."""
        self.step = step
        if self.record is not None:
            self.record["from_step"] = step

    def end(self, code: int, reason: str) -> None:
        """How it ended, for the history; once."""
        if self.record is not None and not self._over.is_set():
            self._over.set()
            with self._writing:
                self.record |= {"ended": _now(), "code": code, "reason": reason}
                self._write()

    def _live(self) -> None:
        while not self._over.wait(BEAT):
            with self._writing:
                if not self._over.is_set():
                    self._write()

    def _write(self) -> None:
        """A full disk stops no run; that it lives can be told by the file's time, too."""
        self.record |= {"step": self.step, "seen": time.time()}
        file = self.place / f"{self.generation}.json"
        partial = self.place / f".{file.name}.partial"
        try:
            partial.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
            os.replace(partial, file)
        except OSError:
            with suppress(OSError):
                os.utime(file)


def claim(run: Path) -> Attempt:
    """Begin an attempt at the run in this folder. Raises UserError while another one is alive."""
    place = Path(run) / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    while True:
        last = newest_of(place)
        before = _begun(place, last) if last else {"ended": "never begun"}
        over = _over(place, last, before)
        try:
            os.close(os.open(place / f"{last + 1}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:  # somebody else was faster: look at them
            continue
        record = {"generation": last + 1, "began": _now(), **me()}
        if not before.get("ended"):
            record["took_over"] = over
        return Attempt(run, last + 1, record)


def history(run: Path) -> list[dict[str, Any]]:
    """Every attempt at a run, in order; of one that was killed there is no `ended`."""
    place = Path(run) / FOLDER
    return [{"generation": n} | _read(place, n) for n in sorted(_generations(place))]


def me() -> dict[str, Any]:
    """This process, told apart from all others of this machine and of others; and its job, under SLURM."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_began": started(os.getpid()),
        "kernel": _kernel(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
    if "SLURM_JOB_ID" in os.environ:
        found["slurm_job"] = os.environ["SLURM_JOB_ID"]
        found["slurm_restarts"] = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        found["nodes"] = os.environ.get("SLURM_JOB_NODELIST", "")
    return found


def whose(record: Mapping[str, Any]) -> str:
    """`pid 12 on host n1 since 2026-11-25T04:37:08+0000 (SLURM job 7, restart 1)`"""
    job, restarts = record.get("slurm_job"), record.get("slurm_restarts", 0)
    where = f" (SLURM job {job}" + (f", restart {restarts})" if restarts else ")") if job else ""
    known = f"pid {record.get('pid', '?')} on host {record.get('host', '?')}"
    return f"{known} since {record.get('began', '?')}{where}"


def newest_of(place: Path) -> int:
    return max(_generations(place), default=0)


def _generations(place: Path) -> list[int]:
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        return []
    return [int(name[:-5]) for name in names if re.fullmatch(r"[0-9]+\.json", name)]


def _over(place: Path, generation: int, record: Mapping[str, Any]) -> str:
    """Why an attempt is over. Raises UserError where it is not."""
    if record.get("ended"):
        return "it had ended"
    own = me()
    job = own.get("slurm_job")
    if job is not None and job == record.get("slurm_job") and own["slurm_restarts"] > record.get("slurm_restarts", 0):
        return "SLURM had started the job again"
    if all(record.get(key) == own[key] for key in ("host", "kernel")):
        pid = record.get("pid", 0)
        if pid == own["pid"] or not _runs(pid, record.get("process_began", 0.0)):
            return "its process was gone"
    elif _is_silent(place, generation, record):
        return f"it was silent for {SILENT:.0f} s"
    stop = f"scancel {record['slurm_job']}" if "slurm_job" in record else f"kill -TERM {record.get('pid', 'PID')}"
    raise UserError(
        Problem(
            "run.name",
            f"{place.parent} is being trained by {whose(record)}; two at once would spoil it. Wait for that one, stop it "
            f"(`{stop}`: it saves a checkpoint), or choose another run.name",
        )
    )


def started(pid: int) -> float:
    """When a process began, in seconds since the machine did where that is told: nobody sets that clock."""
    import psutil

    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return psutil.Process(pid).create_time()


def _runs(pid: int, began: float) -> bool:
    """Whether a process of this machine is there, and is the one that had that number then."""
    import psutil

    try:
        process = psutil.Process(pid)
        return abs(started(pid) - began) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # or a number that no process has
        return False


def _is_silent(place: Path, generation: int, record: Mapping[str, Any]) -> bool:
    """Watch an attempt of another machine for a while: its clock may be any, so only a change counts."""
    say(f"{place.parent} has an attempt without an end, by {whose(record)}; watching {SILENT:.0f} s for a sign of life")
    first, until = _sign(place, generation), time.monotonic() + SILENT
    while time.monotonic() < until:
        time.sleep(min(1.0, SILENT / 10))
        if _sign(place, generation) != first:
            return False
    return True


def _sign(place: Path, generation: int) -> tuple[str, int]:
    with suppress(OSError), open(place / f"{generation}.json", encoding="utf-8") as file:  # opened: NFS looks again
        return file.read(), os.fstat(file.fileno()).st_mtime_ns
    return "", 0


def _begun(place: Path, generation: int) -> dict[str, Any]:
    """The record of an attempt that may have been created this moment."""
    for _ in range(20):
        if found := _read(place, generation):
            return found
        time.sleep(0.05)
    return {}


def _read(place: Path, generation: int) -> dict[str, Any]:
    try:
        found = json.loads((place / f"{generation}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # just created, or never written
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if type(value) in KINDS.get(key, (type(value),))}


def _kernel() -> str:
    """Of this boot and this process namespace: the same number elsewhere is another process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
