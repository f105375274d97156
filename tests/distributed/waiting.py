"""What a rank of the watch's tests runs: collectives without end, until something happens to it at the fifth.

`python waiting.py RANK SIZE PORT WHAT TIMEOUT`; the last rank does WHAT, the others wait for it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from adapt.cli import main
from adapt.distributed import watch
from adapt.distributed import world as worlds
from adapt.runfolder import RunFolder
from adapt.train.outcome import outcome
from adapt.train.signals import StopFlag


def go(rank: int, size: int, port: int, what: str, timeout: float) -> int:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
    watch.GRACE = 2.0
    torch.set_num_threads(1)
    with StopFlag() as flag:
        world = worlds.start("auto", timeout, flag)
        with outcome(RunFolder(Path("nowhere"), main=False), world):
            if what == "alone":
                worlds.on_main(world, alone, flag)
            for step in range(10**6):
                world.at("start" if what == "compile" else "step", step)
                if step == 5 and rank == size - 1:
                    happens(what)
                world.sum([1])
                if rank == 0 and step == 5:
                    print("five", flush=True)
    return 0


def alone() -> None:
    print("alone", flush=True)
    time.sleep(600)


def happens(what: str) -> None:
    if what != "nothing":
        time.sleep(2.5 * watch.INTERVAL)  # a step that takes a while
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what in ("hangs", "compile"):
        print("hangs", flush=True)
        time.sleep(600)
    if what == "fails":
        raise ValueError("a bug")


if __name__ == "__main__":
    rank, size, port, what, timeout = sys.argv[1:]
    from adapt import cli

    cli._dispatch = lambda _: go(int(rank), int(size), int(port), what, float(timeout))
    os._exit(main([]))
