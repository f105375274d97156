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
        it ends}) if it gets there. `limits`: max_file, bytes that any file may have; user, the number of whom it runs as.
        -> {killed, phase: where, code, said, spent: phase -> [times, seconds], left: processes it left behind}"""
        job = {"recipe": recipe, "cache": str(cache), "aim": aim, **limits}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)

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
        worker = os.fork()
        if worker == 0:
            work(job, recipe, names, says)
        os.close(says)
        print(json.dumps(watch(worker, board, job["aim"], heard)), flush=True)
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
    before = set(sys.modules)
    code = adapt(["fit", "-c", str(recipe), "--resume=auto"])
    if code == 0 and "matplotlib" not in before and "user" not in job:
        names.write_text(json.dumps(sorted(set(sys.modules) - before)))
    sys.stdout.flush()
    os._exit(code)


def watch(worker: int, board: Board, aim: dict[str, Any] | None, heard: int) -> dict[str, Any]:
    began, phase, reached, said = time.monotonic(), "", None, b""
    os.set_blocking(heard, False)
    while True:
        ended, status = os.waitpid(worker, os.WNOHANG)
        with suppress(BlockingIOError):
            while some := os.read(heard, 65536):
                said += some
        if ended:
            code, killed = os.waitstatus_to_exitcode(status), False
            break
        if aim is not None:
            times, seconds = board.entry(aim["phase"])
            if reached is None and times >= aim["nth"]:
                reached = time.monotonic(), seconds
            if reached is not None and (time.monotonic() - reached[0] >= aim["after"] or seconds != reached[1]):
                phase = board.phase
                os.kill(worker, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
                killed = code == -signal.SIGKILL
                break
        time.sleep(0.0005)
    os.close(heard)
    spent = {name: board.entry(name) for name in NAMES}
    spent["start-up"] = (1, time.monotonic() - began)
    text = said.decode(errors="replace")
    return {"killed": killed, "phase": phase, "code": code, "said": text, "spent": spent, "left": left_behind(worker)}


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
