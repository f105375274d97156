"""A rank that died, froze, hangs or failed is noticed in time and named by those that are left."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT = 4


class Ranks:
    """Processes that wait for each other; the last of them does `what`."""

    def __init__(self, what: str, size: int = 2, timeout: float = TIMEOUT):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        script = Path(__file__).with_name("waiting.py")
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(script), *map(str, (rank, size, port, what, timeout))],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def end(self, rank: int) -> tuple[int, str]:
        """Exit code and stderr."""
        _, told = self.processes[rank].communicate(timeout=90)
        return self.processes[rank].returncode, told

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_rank_is_named(size):
    with Ranks("killed", size, timeout=9) as ranks:
        last = size - 1
        for rank in range(last):
            code, told = ranks.end(rank)
            assert code == 71, told
            assert f"rank {last} (host {socket.gethostname()}, pid {ranks.processes[last].pid}) died in step 6" in told
            assert "Traceback" not in told


def test_a_rank_that_hangs_is_named_within_the_time_out():
    with Ranks("hangs") as ranks:
        for rank in (0, 1):  # its own thread still runs, and ends it
            code, told = ranks.end(rank)
            assert code == 71, told
            assert "rank 1" in told
            assert "did not arrive: it is in step 6" in told
            assert f"trainer.timeout={TIMEOUT}" in told


def test_a_frozen_rank_is_named():
    """As a node whose power is gone: its connections stay open."""
    with Ranks("frozen", timeout=9) as ranks:
        code, told = ranks.end(0)
        assert code == 71, told
        assert "rank 1" in told
        assert "died in step 6" in told


def test_a_frozen_first_rank_is_named_by_the_others():
    """It keeps the store."""
    with Ranks("nothing", timeout=6) as ranks:
        assert ranks.processes[0].stdout.readline() == "five\n"
        ranks.processes[0].send_signal(signal.SIGSTOP)
        code, told = ranks.end(1)
        assert code == 71, told
        assert "rank 0" in told


def test_a_rank_with_an_error_of_its_own_is_no_lost_rank():
    """Starting again would not help: the exit code is 1, and its message the one to read."""
    with Ranks("fails") as ranks:
        code, told = ranks.end(0)
        assert code == 1, told
        assert "rank 1" in told
        assert "ended with an error: ValueError: a bug" in told
        assert ranks.end(1)[0] == 1


def test_a_signal_to_one_rank_reaches_the_others_where_there_is_nothing_to_save():
    """One of them is in the middle of something long, and neither comes to a point where they could agree."""
    with Ranks("compile", timeout=60) as ranks:
        assert ranks.processes[1].stdout.readline() == "hangs\n"
        ranks.processes[1].send_signal(signal.SIGTERM)
        for rank in (0, 1):
            code, told = ranks.end(rank)
            assert code == 75, told


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_cuts_off_work_of_the_first_rank_alone(asked):
    """Whichever rank gets it."""
    with Ranks("alone", timeout=60) as ranks:
        assert ranks.processes[0].stdout.readline() == "alone\n"
        ranks.processes[asked].send_signal(signal.SIGUSR1)
        for rank in (0, 1):
            code, told = ranks.end(rank)
            assert code == 75, told
            assert "Traceback" not in told
