"""Ranks that do not come to the start of a run are named, in time, on all that did."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from adapt.config import resolve
from adapt.distributed import meeting, watch
from adapt.distributed import world as worlds
from adapt.distributed.watch import Watch
from adapt.errors import RankLost, StopRequested, UserError
from adapt.train.signals import StopFlag
from adapt.train.validate import check_or_raise
from tests.recipes import tiny_recipe

WAIT = 1.0


@pytest.fixture(autouse=True)
def place(monkeypatch):
    """Each rank is a thread: nothing here but the store is shared."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(meeting, "LATE", 0.5)
    return port


KEPT: list[dist.Store] = []
"""Until the end of a test: a store goes with its last holder."""


@pytest.fixture(autouse=True)
def _kept():
    yield
    KEPT.clear()


def comes(rank: int, size: int, flag: StopFlag | None = None, after: float = 0.0) -> str:
    time.sleep(after)
    try:
        KEPT.append(meeting.store(rank, size, WAIT, flag))
        meeting.gather(Watch(rank, size, 60, KEPT[-1], flag), WAIT, flag)
    except (RankLost, StopRequested) as error:
        return f"{error.exit_code} {error}"
    return "met"


def come(ranks: list[int], size: int, flags: dict[int, StopFlag] | None = None, after: dict[int, float] | None = None):
    with ThreadPoolExecutor(len(ranks)) as pool:
        told = [pool.submit(comes, rank, size, (flags or {}).get(rank), (after or {}).get(rank, 0.0)) for rank in ranks]
        return [future.result(timeout=60) for future in told]


def test_ranks_meet_in_any_order():
    assert come([0, 1, 2], 3, after={0: 0.4, 2: 0.2}) == ["met"] * 3


def test_those_that_do_not_come_are_named_on_all_that_did():
    told = come([0, 2], 5)
    for text in told:
        assert text.startswith("71 ")
        assert "3 of 5 ranks did not come within 1 s: rank 1, 3, 4." in text
        assert "raise trainer.start_timeout" in text


def test_of_many_some_are_named():
    (told,) = come([0], 20)
    assert "19 of 20 ranks" in told
    assert "rank 1, 2, 3, 4, 5, 6, 7, 8 and others." in told


def test_a_first_rank_that_does_not_come_is_named(place):
    (told,) = come([1], 2)
    assert told.startswith("71 ")
    assert f"for rank 0, which does not answer at 127.0.0.1:{place}" in told


def test_a_first_rank_that_goes_before_the_others_came_is_named():
    """Its store goes with it."""
    left = threading.Event()

    def first() -> None:
        store = meeting.store(0, 3, WAIT)
        Watch(0, 3, 60, store)
        left.wait(30)
        del store

    thread = threading.Thread(target=first)
    thread.start()
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(comes, 1, 3)
        time.sleep(0.5)
        left.set()
        assert told.result(timeout=60).startswith("71 rank 0 is gone")
    thread.join()


def test_torchruns_store_without_a_first_rank(place, monkeypatch):
    """The agent keeps it, so it answers, and rank 0's word does not come."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    KEPT.append(dist.TCPStore("127.0.0.1", place, is_master=True, wait_for_workers=False))
    (told,) = come([1], 2)
    assert "1 of 2 ranks did not come within 1 s: rank 0." in told


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_a_rank_that_waits_reaches_those_that_came(asked):
    flags = {0: StopFlag(), 1: StopFlag()}
    flags[asked].reason = "SIGTERM"
    if asked == 1:  # it is asked when it has come
        flags[1].reason = ""
        threading.Timer(0.5, flags[1].pass_on, ["SIGTERM"]).start()
    told = come([0, 1], 3, flags)
    assert [text[:2] for text in told] == ["75", "75"], told
    assert all("SIGTERM" in text for text in told)


def test_a_port_that_is_taken_is_named(place):
    with socket.create_server(("127.0.0.1", place)):
        (told,) = come([0], 2)
    assert told.startswith(f"71 rank 0 cannot listen at 127.0.0.1:{place}")


def test_a_rank_that_died_between_the_meeting_and_the_first_collective_is_named(monkeypatch):
    """It came, and then nothing of it: the store says so, before any socket could."""
    monkeypatch.setattr(watch, "SILENT", 0.6)
    monkeypatch.setattr(watch, "INTERVAL", 0.1)
    ended: list[tuple[int, str]] = []
    stores = [meeting.store(rank, 2, WAIT) for rank in range(2)]
    first, second = (Watch(rank, 2, 60, stores[rank]) for rank in range(2))
    monkeypatch.setattr(first, "_end", lambda code, reason: (ended.append((code, reason)), first._over.set()))
    first.start()
    until = time.monotonic() + 30
    while not ended and time.monotonic() < until:
        time.sleep(0.05)
    first.leave("")
    assert ended
    assert ended[0][0] == 71
    assert f"rank 1 (host {socket.gethostname()}, pid" in ended[0][1]
    assert "died before the first step" in ended[0][1]
    del second


def test_the_time_to_come_must_be_one(tiny_base, tmp_path):
    with pytest.raises(UserError, match=r"trainer\.start_timeout"):
        check_or_raise(resolve(tiny_recipe(tiny_base, tmp_path, trainer={"start_timeout": 0, "steps": 1})))


def test_start_waits_as_long_as_it_is_told(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RankLost, match=r"waited 0\.3 s for rank 0"):
        worlds.start("auto", wait=0.3)
