"""The ranks meet: each comes to the store of the first and writes a line into it, which is how those that do not are found.

torch's own rendezvous waits for the time-out of the collectives and says how many came. Here the waiting is short, in
Python (signals are seen), and rank 0, or whoever misses it, says who did not come.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from adapt.distributed.watch import Watch, line_of
from adapt.errors import RankLost, StopRequested

if TYPE_CHECKING:
    from adapt.train.signals import StopFlag

WAIT = 180
"""Seconds that ranks wait for each other to start, where nothing else is said."""
MET = "adapt/met"
ALL, STOPPED = "all", "stopped: "
"""What may stand there, besides the letter of a RankLost."""
POLL = 0.1
"""Seconds between two looks."""
LATE = 15.0
"""How much longer than the time for coming the others wait for rank 0's word on it."""
SHOWN = 8
"""At most so many missing ranks are listed."""
NEXT = (
    "Its own messages say why, if it had the time; else its node is slow or cannot be reached from here. Where nodes take "
    "longer to start, raise trainer.start_timeout (of `adapt health`: --timeout)."
)
UNSAVED = "before the ranks had met; there was nothing to save"


def store(rank: int, size: int, wait: float, flag: StopFlag | None = None) -> dist.Store:
    """The store of the first rank, or torchrun's own. Raises RankLost where it is not there after `wait` seconds."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's name for it, and its spelling
    keeps = rank == 0 and not agents
    until = time.monotonic() + wait
    while not keeps and not _answers(host, port):
        if flag is not None and flag.reason:
            raise flag.requested(UNSAVED)
        if time.monotonic() > until:
            whose = "torchrun's store" if agents else "rank 0"
            raise RankLost(f"this rank waited {wait:g} s for {whose}, which does not answer at {host}:{port}. {NEXT}")
        time.sleep(POLL)
    try:
        return dist.TCPStore(
            host, port, size, keeps, timedelta(seconds=max(wait, 10)), wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise RankLost(f"rank {rank} cannot {'listen' if keeps else 'connect'} at {host}:{port}: {reason}") from None


def gather(watch: Watch, wait: float, flag: StopFlag | None = None) -> None:
    """Until every rank's line is in the store. Raises RankLost on all that came, with the ranks that did not; where one
    of them is asked to stop meanwhile, StopRequested on all that came."""
    lines, here = [line_of(rank) for rank in range(watch.size)], watch.store
    first, word = watch.rank == 0, ""
    until = time.monotonic() + wait + (0 if first else LATE)  # rank 0 says who is missing
    try:
        while not (word := here.get(MET).decode() if here.check([MET]) else ""):
            if flag is not None and flag.reason:
                here.compare_set(MET, "", STOPPED + flag.reason)  # whoever says something first
            elif first and here.check(lines):
                here.compare_set(MET, "", ALL)
            elif time.monotonic() > until:
                here.compare_set(MET, "", _missing(watch, lines, wait))
            else:
                time.sleep(POLL)
        if first and word != ALL:
            time.sleep(5 * POLL)  # the store goes with this process
    except dist.DistError:
        word = "rank 0 is gone: it ended before the ranks had met"
    if word.startswith(STOPPED):
        if flag is None:
            raise StopRequested(f"stopped on request {UNSAVED}")
        flag.pass_on(word.removeprefix(STOPPED))
        raise flag.requested(UNSAVED)
    if word != ALL:
        raise RankLost(word)


def _missing(watch: Watch, lines: list[str], wait: float) -> str:
    gone = [rank for rank, line in enumerate(lines) if not watch.store.check([line])] or [0]
    listed = ", ".join(map(str, gone[:SHOWN])) + (" and others" if len(gone) > SHOWN else "")
    return f"{len(gone)} of {watch.size} ranks did not come within {wait:g} s: rank {listed}. {NEXT}"


def _answers(host: str, port: int) -> bool:
    """torch's client tries as well, but in C++ and with a stack trace for every try."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
