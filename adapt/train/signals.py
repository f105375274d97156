"""Ctrl-C, TERM and USR1: finish the step, save, leave with exit code 75. A second Ctrl-C leaves at once.

Where there is nothing to save (data is prepared, weights are read, the export is written) the work ends at once;
elsewhere the ranks agree on it, within the step and between two calls of the model in an evaluation.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adapt.errors import StopRequested

if TYPE_CHECKING:
    from adapt.distributed.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _AtOnce(BaseException):
    """Raised by the handler: no `except Exception` on the way may take it for an error."""


class StopFlag:
    """Set by a signal (or by the time limit, or because another rank was asked)."""

    def __init__(self) -> None:
        self.reason = ""
        self._before: dict[int, object] = {}
        self._at_once = False

    def __enter__(self) -> StopFlag:
        self._before = {s: signal.getsignal(s) for s in SIGNALS}
        self.install()
        return self

    def install(self) -> None:
        """Take the signals (again: Lightning takes TERM for itself when a fit begins)."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """Inside, a signal raises StopRequested where it comes: for work that may be cut off anywhere. `where` is when,
        for the message: `before the first step`."""
        before, self._at_once = self._at_once, True
        try:
            if self.reason:
                raise self.requested(where)
            yield
        except _AtOnce:
            raise self.requested(where) from None
        finally:
            self._at_once = before

    def requested(self, where: str) -> StopRequested:
        return StopRequested(
            f"stopped on request ({self.reason or 'another rank was asked to stop'}) {where}. Go on with --resume."
        )

    def pass_on(self, reason: str) -> None:
        """From another thread: another rank was asked to stop."""
        self.reason = self.reason or reason
        if self._at_once:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            os._exit(130)
        self.reason = self.reason or signal.Signals(number).name
        if self._at_once:
            self._at_once = False  # what is cleaned up on the way out is not cut off again
            raise _AtOnce
        hint = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
        print(
            f"\n{self.reason}: finishing this step, then saving a checkpoint{hint}",
            file=sys.stderr,
            flush=True,
        )


def stop_point(flag: StopFlag, world: World, where: str) -> None:
    """Collective. Raises StopRequested on every rank if any was asked to stop."""
    if world.sum([int(bool(flag.reason))])[0]:
        raise flag.requested(where)
