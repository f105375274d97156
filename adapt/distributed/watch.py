"""Who is missing: every rank tells the others what it is doing, so that one that died or hangs is noticed and named.

A thread of each rank writes a line into the store of the process group every second: where its rank is, and how many
collectives it has come to. Rank 0's thread reads them all. A rank whose lines stop is dead (or its node, or it was
frozen); one that has come to fewer collectives than others, which have waited for it long enough, hangs. What rank 0
finds goes into the store, and every rank ends with it. Collectives of the model itself are not counted: where all ranks
are in the same step for too long, that is said.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from adapt.console import say
from adapt.errors import RankLost, RunLost, StopRequested

INTERVAL = 1.0
"""Seconds between two lines of a rank."""
SILENT = 60.0
"""Seconds without a line after which a rank counts as dead; at most the time-out of a step."""
QUIET = 4 * INTERVAL
"""Seconds without a line after which a rank that others have waited for too long is not there any more."""
GRACE = 10.0
"""Seconds after which ranks that were asked to stop and have nothing to save end where they are."""
LOST, STOP = "adapt/lost", "adapt/stop"


@dataclass
class Seen:
    """The last line of a rank, and when it was new, on this rank's clock."""

    line: dict[str, Any] = field(default_factory=dict)
    new: float = field(default_factory=time.monotonic)


def line_of(rank: int) -> str:
    """Its key in the store."""
    return f"adapt/rank/{rank}"


class Watch:
    def __init__(self, rank: int, size: int, timeout: float, store: dist.Store, flag: Any = None):
        """Writes the first line into the store; every rank makes one, and all must have before `start`. `timeout`: seconds
        that ranks wait for each other in a step. `flag`: a StopFlag, which is passed on to all ranks."""
        self.rank, self.size, self.timeout, self.flag = rank, size, timeout, flag
        self.silent = min(SILENT, timeout)
        self.store = store.clone()  # a connection of its own
        self.phase, self.step, self.calls, self.waiting, self.left = "start", 0, 0, False, ""
        self.changed = time.monotonic()
        self.lost: Callable[[int, str], None] = lambda code, reason: None
        """Told before the process ends: exit code and reason."""
        self._lines, self._heard, self._asked = 0, time.monotonic(), 0.0
        self._over = threading.Event()
        if rank == 0:
            self.store.multi_set([LOST, STOP], [b"", b""])
        self._tell()
        self._seen = {r: Seen() for r in range(size)}

    def start(self) -> None:
        """Every rank's line is there."""
        self._heard = time.monotonic()
        threading.Thread(target=self._run, daemon=True).start()
        if self.rank != 0:  # whose process keeps the store
            threading.Thread(target=self._listen, daemon=True).start()

    def at(self, phase: str, step: int = 0) -> None:
        """What this rank does now: `start` (nothing to save), `step`, `evaluation`, `save`, `end`."""
        self.phase, self.step, self.changed = phase, step, time.monotonic()

    @contextmanager
    def collective(self, patient: bool = False) -> Iterator[None]:
        """Around every collective of the host: this rank has come to it. `patient`: however long it takes."""
        self.calls, self.changed, self.waiting = self.calls + 1, time.monotonic(), not patient
        try:
            yield
        finally:
            self.waiting, self.changed = False, time.monotonic()

    def leave(self, how: str) -> None:
        """This rank ends: `done`, `stopped`, or its error. The thread is over when this returns."""
        self._over.set()
        self.left = how
        try:
            self._tell()
        except Exception:  # the store is gone: nobody is there to be told
            return

    def explain(self, error: Exception) -> Exception:
        """What to raise for an error of a collective: RankLost with the ranks that are missing, RunLost where one ended
        with an error of its own, or `error` itself where all are there."""
        try:
            before = self._read()
            time.sleep(QUIET)
            now = self._read()
        except Exception:
            return RankLost(self._no_store())
        failed = [r for r in now if now[r]["left"] not in ("", "done", "stopped")]
        gone = [r for r in now if r != self.rank and not now[r]["left"] and now[r]["n"] == before[r]["n"]]
        ahead = max(line["calls"] for line in now.values())
        behind = [r for r in now if r != self.rank and not now[r]["left"] and now[r]["calls"] < ahead]
        if gone:
            lost = "; ".join(f"{_who(now[r])} died {_where(now[r])}" for r in gone)
            self._publish(lost)
            return RankLost(lost)
        if failed:
            return RunLost("; ".join(f"{_who(now[r])} ended with an error: {now[r]['left']}" for r in failed))
        if behind:
            return RankLost("; ".join(f"{_who(now[r])} did not arrive: it is {_where(now[r])}" for r in behind))
        return error

    def _line(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "n": self._lines,
            "phase": self.phase,
            "step": self.step,
            "calls": self.calls,
            "waiting": self.waiting,
            "for": time.monotonic() - self.changed,
            "left": self.left,
        }

    def _tell(self) -> None:
        self._lines += 1
        self.store.set(line_of(self.rank), json.dumps(self._line()))

    def _read(self) -> dict[int, dict[str, Any]]:
        lines = self.store.multi_get([line_of(r) for r in range(self.size)])
        return {r: json.loads(line) for r, line in enumerate(lines)}

    def _run(self) -> None:
        loop = time.monotonic()
        while not self._over.wait(INTERVAL):
            now = time.monotonic()
            if now - loop > 5 * INTERVAL:  # this process was held up: it says nothing about the others
                for seen in self._seen.values():
                    seen.new += now - loop
            loop = now
            try:
                self._tell()
                lost, stop, first = self.store.multi_get([LOST, STOP, line_of(0)])
                self._look(json.loads(first))
                if self.rank == 0 and not lost:
                    lost = self._judge()
                    if lost:
                        self._publish(lost)
                self._pass_on(stop.decode())
                self._heard = time.monotonic()
            except Exception:  # torch's store errors are RuntimeErrors of several kinds; `_listen` gives up in time
                lost = b""
            if not lost and self.rank != 0 and self._is_dead(0):
                lost = f"{_who(self._seen[0].line)} died {_where(self._seen[0].line)}"
            if lost and not self._over.is_set():
                self._end(RankLost.exit_code, lost if isinstance(lost, str) else lost.decode())

    def _listen(self) -> None:
        """For a store whose process is frozen: whoever asks it waits for ever."""
        loop = time.monotonic()
        while not self._over.wait(INTERVAL):
            now = time.monotonic()
            self._heard += now - loop if now - loop > 5 * INTERVAL else 0
            loop = now
            if now - self._heard > self.silent:
                self._end(RankLost.exit_code, self._no_store())

    def _publish(self, lost: str) -> None:
        """Tell all ranks, and keep the store until they have read it."""
        self.store.set(LOST, lost)
        if self.rank == 0:
            time.sleep(3 * INTERVAL)

    def _pass_on(self, stop: str) -> None:
        if self.flag is None:
            return
        if self.flag.reason and not stop:
            self.store.set(STOP, self.flag.reason)
        elif stop and not self.flag.reason:
            self.flag.pass_on(stop)
        if self.flag.reason and self.phase == "start":
            self._asked = self._asked or time.monotonic()
            if time.monotonic() - self._asked > GRACE:
                self._end(StopRequested.exit_code, f"stopped on request ({self.flag.reason}); nothing was to be saved")

    def _look(self, line: dict[str, Any]) -> None:
        seen = self._seen[line["rank"]]
        if seen.line.get("n") != line["n"]:
            seen.line, seen.new = line, time.monotonic()

    def _is_dead(self, rank: int) -> bool:
        seen = self._seen[rank]
        return not seen.line.get("left") and time.monotonic() - seen.new > self.silent

    def _judge(self) -> str:
        """Rank 0: what is wrong, or nothing."""
        for line in self._read().values():
            self._look(line)
        dead = [r for r in self._seen if r != 0 and self._is_dead(r)]
        if dead:
            return "; ".join(f"{_who(self._seen[r].line)} died {_where(self._seen[r].line)}" for r in dead)
        lines = [seen.line for seen in self._seen.values() if not seen.line["left"]]
        stuck = [x for x in lines if (x["waiting"] or x["phase"] == "step") and x["for"] > self.timeout]
        if not stuck:
            return ""
        longest = max(x["for"] for x in stuck)
        behind = [x for x in lines if x["calls"] < max(y["calls"] for y in lines)]
        if behind:
            quiet = {r for r, seen in self._seen.items() if time.monotonic() - seen.new > QUIET}
            who = "; ".join(
                f"{_who(x)} {'died' if x['rank'] in quiet else 'did not arrive: it is'} {_where(x)}" for x in behind
            )
            return f"{who}. The others have waited {longest:.0f} s (trainer.timeout={self.timeout:g})"
        return (
            f"all ranks are {_where(stuck[0])} and nothing moved for {longest:.0f} s (trainer.timeout={self.timeout:g}): "
            "a collective of the model hangs, or a step takes longer than that"
        )

    def _no_store(self) -> str:
        line = self._seen[0].line or {"rank": 0, "host": os.environ.get("MASTER_ADDR", "?")}
        return f"{_who(line)} does not answer; it keeps what the ranks know of each other"

    def _end(self, code: int, reason: str) -> None:
        """The main thread may be inside a collective for ever: the process ends from here."""
        self.lost(code, reason)
        if code != StopRequested.exit_code or self.rank == 0:
            say(f"rank {self.rank}: {reason}")
        os._exit(code)


def _who(line: dict[str, Any]) -> str:
    return f"rank {line['rank']} (host {line['host']}" + (f", pid {line['pid']})" if "pid" in line else ")")


def _where(line: dict[str, Any]) -> str:
    phase = {"start": "before the first step", "step": f"in step {line['step'] + 1}", "end": "after the last step"}
    where = phase.get(line["phase"], f"at step {line['step']}, in its {line['phase']}")
    return f"{where} (for {line['for']:.0f} s)"
