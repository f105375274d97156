"""A warm parent: it imports what a run needs once, then forks a worker for every attempt and kills it when it is told to.

Started as `python -m tests.faults.warm`; a job is a line of JSON on its stdin, the answer a line on its stdout. It has a
single thread and does no arithmetic, so that a fork of it is as good as a new process. A worker notes in shared memory
which phase of the run it is in, and the parent reads there whether the moment to kill it has come.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import pkgutil
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PHASES = {
    "start-up": (),
    "data": ("adapt.data.prepare.prepare",),
    "steps": ("lightning.pytorch.Trainer.fit",),
    "evaluation": ("adapt.train.hooks.Hooks.evaluate",),
    "save": ("adapt.distributed.saver.write",),
    "export": ("adapt.train.finish.export",),
    "samples": ("adapt.train.finish._samples",),
    "report": ("adapt.train.finish.show_end",),
}
"""Phase -> the functions that are it, the innermost that runs; between them, and until the first, it is start-up. While a
checkpoint is written it is that, whatever else goes on."""
NAMES = list(PHASES)
ENTRY = struct.Struct("qd")
"""Times a phase was entered, and seconds in it."""
PATIENCE, HUNG = 120, 1000
"""Seconds that ranks have to end by themselves after the first did, and the code of one that did not."""


class Warm:
    """The parent, as seen from a test."""

    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm", str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def attempt(self, recipe: dict[str, Any], cache: Path, aim: dict[str, Any] | None = None, **limits: int) -> dict:
        """One attempt at the run, killed at `aim` ({phase: nth time it is entered, after: seconds from there, or when
        it ends}) if it gets there. `limits`: max_file, bytes that any file may have; user, the number of whom it runs as; ranks,
        of which `aim` may name one by its `rank`, and `hasty` ones look for each other more often. -> {killed, phase: of
        rank 0, code: of rank 0, codes: of all, said, spent: phase -> [times, seconds], noticed: seconds from the kill to
        the end of the last one, pids, left: processes it left behind}"""
        job = {"recipe": recipe, "cache": str(cache), "aim": aim, **limits}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()  # it holds nothing, and its interpreter takes its time to end
        self.process.communicate()

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Board:
    """What a worker shows of itself: the phase it is in, and how often and how long it was in each."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8 + ENTRY.size * len(NAMES))

    @property
    def phase(self) -> str:
        return "save" if self.memory[1] else NAMES[self.memory[0]]

    def entry(self, phase: str) -> tuple[int, float]:
        return ENTRY.unpack_from(self.memory, 8 + ENTRY.size * NAMES.index(phase))

    def clear(self) -> None:
        self.memory[:] = bytes(len(self.memory))
        self._add("start-up", 1, 0.0)

    def during(self, phase: str, function: Callable) -> Callable:
        @wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            place = 1 if phase == "save" else 0  # that may be on a thread of its own
            before, began = self.memory[place], time.monotonic()
            self.memory[place] = NAMES.index(phase)
            self._add(phase, 1, 0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self.memory[place] = before
                self._add(phase, 0, time.monotonic() - began)

        return marked

    def _add(self, phase: str, times: int, seconds: float) -> None:
        before = self.entry(phase)
        ENTRY.pack_into(self.memory, 8 + ENTRY.size * NAMES.index(phase), before[0] + times, before[1] + seconds)


def main(folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    board, names = Board(), folder / "modules.json"
    for phase, targets in PHASES.items():
        for target in targets:
            owner, _, name = target.rpartition(".")
            holder = pkgutil.resolve_name(owner)
            setattr(holder, name, board.during(phase, getattr(holder, name)))
    for line in sys.stdin:
        job = json.loads(line)
        recipe = Path(f"{job['cache']}.yaml")
        recipe.write_text(json.dumps(job["recipe"]))  # JSON is YAML
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"a process of {threads} threads is not safely forked"
        board.clear()
        heard, says = os.pipe()
        workers, ranks = [], _ranks(job.get("ranks", 1))
        for rank, environment in enumerate(ranks):
            workers.append(os.fork())
            if workers[-1] == 0:
                if rank != 0:
                    board.memory = mmap.mmap(-1, len(board.memory))  # the first one's is looked at
                os.environ.update(environment)
                work(job, recipe, names, says)
        os.close(says)
        print(json.dumps(watch(workers, board, job["aim"], heard)), flush=True)
        if names.exists():  # what the first worker imported, the next ones find here
            for name in json.loads(names.read_text()):
                with suppress(ImportError):  # made up by a library, not imported
                    importlib.import_module(name)
            names.unlink()


def work(job: dict[str, Any], recipe: Path, names: Path, says: int) -> None:
    """The worker. Never returns."""
    from adapt.cli import main as adapt

    os.setsid()
    for number in (1, 2):
        os.dup2(says, number)
    os.close(says)
    os.environ["ADAPT_CACHE"] = job["cache"]
    if "max_file" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_file"], job["max_file"]))
    if "user" in job:
        os.setresuid(job["user"], job["user"], job["user"])
    if job.get("hasty"):
        from adapt.distributed import watch as watching

        watching.INTERVAL, watching.QUIET = watching.INTERVAL / 5, watching.QUIET / 5
    before = set(sys.modules)
    code = adapt(["fit", "-c", str(recipe), "--resume=auto"])
    if code == 0 and "matplotlib" not in before and "user" not in job:
        names.write_text(json.dumps(sorted(set(sys.modules) - before)))
    sys.stdout.flush()
    os._exit(code)


def _ranks(count: int) -> list[dict[str, str]]:
    """Environment of each rank, as torchrun sets it; none where there is one."""
    if count == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(count)}
    return [
        place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} for rank in range(count)
    ]


def watch(workers: list[int], board: Board, aim: dict[str, Any] | None, heard: int) -> dict[str, Any]:
    began, phase, reached, said = time.monotonic(), "", None, b""
    codes: dict[int, int] = {}
    at = 0.0
    victim, killed, over = workers[(aim or {}).get("rank", 0)], False, None
    os.set_blocking(heard, False)
    while True:
        for worker in workers:
            if worker not in codes:
                ended, status = os.waitpid(worker, os.WNOHANG)
                if ended:
                    codes[worker] = os.waitstatus_to_exitcode(status)
                    over = over or time.monotonic() + PATIENCE
        with suppress(BlockingIOError):
            while some := os.read(heard, 65536):
                said += some
        if len(codes) == len(workers):
            break
        if over is not None and time.monotonic() > over:
            for worker in workers:
                if worker not in codes:
                    os.kill(worker, signal.SIGKILL)
                    os.waitpid(worker, 0)
                    codes[worker] = HUNG
            break
        if aim is not None and not codes and not killed:
            times, seconds = board.entry(aim["phase"])
            if reached is None and times >= aim["nth"]:
                reached = time.monotonic(), seconds
            if reached is not None and (time.monotonic() - reached[0] >= aim["after"] or seconds != reached[1]):
                phase, killed, at = board.phase, True, time.monotonic()
                os.kill(victim, signal.SIGKILL)
        time.sleep(0.0005)
    os.close(heard)
    noticed = time.monotonic() - at
    killed = killed and codes[victim] == -signal.SIGKILL
    spent = {name: board.entry(name) for name in NAMES}
    spent["start-up"] = (1, time.monotonic() - began)
    return {
        "killed": killed,
        "phase": phase,
        "code": codes[workers[0]],
        "codes": [codes[worker] for worker in workers],
        "noticed": noticed if killed else None,
        "pids": workers,
        "said": said.decode(errors="replace"),
        "spent": spent,
        "left": sum(left_behind(worker) for worker in workers),
    }


def left_behind(session: int) -> int:
    """Processes of the worker that are still there a while after it."""
    until = time.monotonic() + 5
    while True:
        left = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            left += int(of) == session and state != "Z"
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
