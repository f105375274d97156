"""Worker processes for the work on single documents; results come in the order of the batches.

A worker is `python -c ...` on the other end of two pipes. Against a pool of `multiprocessing` this has it that a worker
never imports the user's `__main__`, that it ends by itself when this process is killed (its input ends), and that one
that dies is an error at once and not a wait for ever.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal, TypeVar

from adapt.data.work import Work
from adapt.errors import UserError

START = 2 * 2**20
"""Characters done in this process before workers are started: small data does not pay for them."""
AHEAD = 2
"""Batches in flight for each worker."""
AHEAD_CHARACTERS = 2**21
"""Characters in flight for each worker; a single longer document is in flight alone."""

B = TypeVar("B")


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    def __init__(self, count: int | Literal["auto"], work: Work, *, key: str = "data.workers", resumes: bool = True):
        """A count of 1: everything is done in this process. `key` is the recipe's for the count, and `resumes` says
        whether the same command goes on where it was cut off: both for the letter when a worker dies."""
        self.count = usable_cpus() if count == "auto" else count
        self.work, self.key, self.resumes = work, key, resumes
        self._pool: _Pool | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def map(
        self, method: str, batches: Iterable[B], arguments: Callable[[B], tuple], size: Callable[[B], int]
    ) -> Iterator[tuple[B, Any]]:
        """(batch, what `work.method(*arguments(batch))` returned) of every batch, in order, a bounded number ahead."""
        waiting: deque[tuple[B, Future, int]] = deque()
        done = in_flight = 0
        for batch in batches:
            characters = size(batch)
            if self.count == 1 or (done < START and not waiting):
                done += characters
                yield batch, getattr(self.work, method)(*arguments(batch))
                continue
            while waiting and (
                len(waiting) >= AHEAD * self.count or in_flight + characters > AHEAD_CHARACTERS * self.count
            ):
                first, future, freed = waiting.popleft()
                in_flight -= freed
                yield first, future.result()
            waiting.append((batch, self._started().submit(method, arguments(batch)), characters))
            in_flight += characters
        while waiting:
            first, future, _ = waiting.popleft()
            yield first, future.result()

    def _started(self) -> _Pool:
        if self._pool is None:
            self._pool = _Pool(self.count, self.work, self.key, self.resumes)
        return self._pool


class _Pool:
    def __init__(self, count: int, work: Work, key: str, resumes: bool):
        self.key, self.resumes = key, resumes
        state = pickle.dumps(work, protocol=pickle.HIGHEST_PROTOCOL)
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self._all = [_launch(state) for _ in range(count)]
        for process in self._all:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(count, "adapt-data")

    def submit(self, method: str, arguments: tuple) -> Future:
        return self._threads.submit(self._call, method, arguments)

    def close(self) -> None:
        for process in self._all:
            process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._all:
            process.wait()
            with suppress(OSError):  # what was not yet sent
                process.stdin.close()
            process.stdout.close()

    def _call(self, method: str, arguments: tuple) -> Any:
        process = self._idle.get()
        try:
            pickle.dump((method, arguments), process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            outcome, value = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise self._died(process) from None
        finally:
            self._idle.put(process)
        if outcome == "problems":
            raise UserError(value)
        if outcome == "failed":
            raise RuntimeError(f"a worker process that prepares data failed:\n{value}")
        return value

    def _died(self, process: subprocess.Popen) -> UserError:
        code = process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return UserError(
            f"a worker process that prepares data {how}. If memory ran out (see `dmesg`), fewer of them need less: "
            f"{self.key}={max(1, len(self._all) // 2)}; with {self.key}=1 there is none"
            + (". The same command goes on from where this one came to" if self.resumes else "")
        )


def _launch(state: bytes) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", "from adapt.data.workers import serve; serve()"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
    )  # its own group: Ctrl-C is for this process, which ends them
    try:
        process.stdin.write(state)
        process.stdin.flush()
    except BrokenPipeError:  # told by the first call
        pass
    return process


def serve() -> None:
    """The worker's side: answers until its input ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    requests = sys.stdin.buffer
    work = pickle.load(requests)
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = ("done", getattr(work, method)(*arguments))
        except UserError as error:
            reply = ("problems", error.problems)
        except Exception:
            reply = ("failed", traceback.format_exc())
        try:
            pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()
        except BrokenPipeError:
            return
