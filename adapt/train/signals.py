"""Ctrl-C, TERM and USR1: finish the step, save, leave with exit code 75. A second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by a signal (or by the time limit); read once a step and agreed upon by all ranks."""

    def __init__(self) -> None:
        self.reason = ""
        self._before: dict[int, object] = {}

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

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            os._exit(130)
        self.reason = signal.Signals(number).name
        hint = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
        print(
            f"\n{self.reason}: finishing this step, then saving a checkpoint{hint}",
            file=sys.stderr,
            flush=True,
        )
